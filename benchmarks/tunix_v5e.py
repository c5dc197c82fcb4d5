"""What Tunix's GRPO train step needs on a TPU v5e, compiled for it without one.

    python benchmarks/tunix_v5e.py --remat=NONE     # an environment with google-tunix and libtpu

Gemma 3 1B in bfloat16, LoRA rank 32, 4 rows of 256 + 512 tokens a chip, eight chips data parallel,
weights replicated: what `v5e_compile.py --only="4 x 768"` compiles of ours. Weights and optimiser
are abstract; loss, model, adapter and trainer are Tunix's own. Prints one JSON line: HBM of a chip
in GiB (arguments + results - results in place of arguments + temporaries) and seconds to compile.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-8")
os.environ["JAX_PLATFORMS"] = "cpu"

import argparse
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import shapes
import tunix.rl.grpo.grpo_learner as learner
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tunix.models.gemma3 import model as gemma3
from tunix.rl import function_registry
from tunix.sft import peft_trainer

PROMPT, NEW, ROWS_A_CHIP = 256, 512, 4
TARGETS = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"


def optimizer() -> optax.GradientTransformation:
    """Return the optimiser of `ours.py`."""
    return optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(3e-6, b1=0.9, b2=0.99, weight_decay=0.1)
    )


def model_and_optimizer(remat: str):
    """Return Tunix's Gemma 3 1B with LoRA, and the state of its optimiser."""
    size = shapes.SHAPES["1b"]
    cfg = gemma3.ModelConfig(
        num_layers=size["num_layers"], num_embed=size["vocab_size"], embed_dim=size["embed_dim"],
        hidden_dim=size["mlp_dim"], num_heads=size["num_heads"], head_dim=size["head_dim"],
        num_kv_heads=size["num_kv_heads"], sliding_window_size=shapes.WINDOW,
        local_base_frequency=10_000, global_base_frequency=1_000_000,
        remat_config=gemma3.RematConfig[remat], param_dtype=jnp.bfloat16,
        shd_config=gemma3.ShardingConfig.get_default_sharding(is_sampling=True),
    )  # fmt: skip
    base = gemma3.Gemma3(cfg, rngs=nnx.Rngs(params=0))
    provider = qwix.LoraProvider(module_path=TARGETS, rank=shapes.RANK, alpha=shapes.RANK / 2)
    inputs = dict(base.get_model_input(), rngs=nnx.Rngs(params=1, lora=1))
    model = qwix.apply_lora_to_model(base, provider, **inputs)
    return model, nnx.Optimizer(model, optimizer(), wrt=nnx.LoRAParam)


def train_step(model, state):
    """Return Tunix's own train step for GRPO; its trainer would else make a state of its own."""
    algorithm = learner.GRPOConfig(
        num_generations=shapes.GROUP, num_iterations=1, beta=shapes.BETA, epsilon=0.2
    )
    algorithm.temperature = shapes.TEMPERATURE
    loss = function_registry.get_policy_loss_fn("grpo")
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=10**6)
    with mock.patch.object(nnx, "Optimizer", lambda *args, **kwargs: state):
        trainer = peft_trainer.PeftTrainer(model, optimizer(), config)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algorithm, pad_id=0, eos_id=1
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    return trainer.create_train_step_fn()


def example(mesh: Mesh) -> learner.TrainExample:
    """Return the shapes of one batch, cut over the chips."""
    rows = ROWS_A_CHIP * mesh.size

    def array(*shape, dtype=jnp.int32):
        cut = NamedSharding(mesh, PartitionSpec("fsdp", *[None] * (len(shape) - 1)))
        return jax.ShapeDtypeStruct(shape, dtype, sharding=cut)

    return learner.TrainExample(
        prompt_ids=array(rows, PROMPT), prompt_mask=array(rows, PROMPT, dtype=jnp.bool_),
        completion_ids=array(rows, NEW), completion_mask=array(rows, NEW),
        advantages=array(rows, dtype=jnp.float32),
        ref_per_token_logps=array(rows, NEW, dtype=jnp.float32), old_per_token_logps=None,
    )  # fmt: skip


def measure(remat: str) -> dict:
    """Compile the train step; return its memory on a chip and the seconds it took."""
    chips = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    mesh = Mesh(np.array(chips).reshape(-1, 1), ("fsdp", "tp"))
    whole = NamedSharding(mesh, PartitionSpec())
    nodes = nnx.eval_shape(lambda: model_and_optimizer(remat))
    for node in nodes:
        placed = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), nnx.state(node)
        )
        nnx.update(node, placed)
    # Tunix leaves its activations' shardings out where the first device is a CPU.
    with mesh, mock.patch.object(jax, "devices", lambda *args: list(chips)):
        step = nnx.jit(train_step(*nodes), donate_argnums=(1,))
        began = time.perf_counter()
        lowered = step.lower(*nodes, example(mesh))
        traced = time.perf_counter() - began
        program = lowered.compile()
    memory = program.memory_analysis()
    total = (
        memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )  # fmt: skip
    return {
        "topology": "v5e:2x4", "rows_a_chip": ROWS_A_CHIP, "hbm_gib": round(total / 2**30, 3),
        "trace_seconds": round(traced, 1),
        "compile_seconds": round(time.perf_counter() - began - traced, 1),
        "load": round(os.getloadavg()[0], 1),
    }  # fmt: skip


parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--remat", choices=[name.name for name in gemma3.RematConfig], default="NONE")
flags = parser.parse_args()
versions = ("google-tunix", "jax", "libtpu", "flax", "qwix")
shapes.emit("tunix", flags, versions, measure(flags.remat))
