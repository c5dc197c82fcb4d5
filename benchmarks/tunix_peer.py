"""Time one piece of Tunix, by its public API: python benchmarks/tunix_peer.py --work=sample

In an environment of its own: `pip install google-tunix`. Same shapes, tokens, LoRA rank, group and
lengths as `ours.py`; top-k 50, as in Tunix's own Gemma 3 example, because its sampler without top-k
is slower. Rows never stop early. Prints one JSON line.
"""

import os
import time

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import numpy as np
import optax
import qwix
import shapes
from flax import nnx
from jax.sharding import Mesh
from tunix.models.gemma3 import model as gemma3

flags = shapes.parse("Tunix", dtypes=("float32",))
size = shapes.SHAPES[flags.shape]
V = size["vocab_size"]
NEVER = [V + 7]  # an id that cannot be sampled
TARGETS = ".*q_einsum|.*kv_einsum|.*gate_proj|.*down_proj|.*up_proj|.*attn_vec_einsum"
tokens_BT = shapes.tokens(flags)
ids = jnp.asarray(tokens_BT)


class Digits:
    """A tokenizer whose text is decimal ids."""

    def encode(self, text, **_):
        return [int(word) for word in text.split()]

    def decode(self, ids, **_):
        return " ".join(str(int(i)) for i in ids)

    def pad_id(self):
        return 0

    def eos_id(self):
        return 1

    def bos_id(self):
        return 2


def base_model():
    """Return Tunix's Gemma 3 with random weights; its MLP kernels begin as zeros."""
    cfg = gemma3.ModelConfig(
        num_layers=size["num_layers"], num_embed=V, embed_dim=size["embed_dim"],
        hidden_dim=size["mlp_dim"], num_heads=size["num_heads"], head_dim=size["head_dim"],
        num_kv_heads=size["num_kv_heads"], sliding_window_size=shapes.WINDOW,
        local_base_frequency=10_000, global_base_frequency=1_000_000,
        remat_config=gemma3.RematConfig.NONE, param_dtype=jnp.float32,
    )  # fmt: skip
    model = gemma3.Gemma3(cfg, rngs=nnx.Rngs(params=0))
    for i, layer in enumerate(model.layers):
        for j, name in enumerate(("gate_proj", "up_proj", "down_proj")):
            kernel = getattr(layer.mlp, name).kernel
            key = jax.random.fold_in(jax.random.key(7), 3 * i + j)
            kernel.value = 0.02 * jax.random.normal(key, kernel.value.shape, kernel.value.dtype)
    return model


def with_lora(model):
    """Return the model with LoRA on the seven matrices, fused as Tunix has them."""
    provider = qwix.LoraProvider(
        module_path=TARGETS, rank=shapes.RANK, alpha=shapes.RANK / 2
    )
    inputs = dict(model.get_model_input(), rngs=nnx.Rngs(params=1, lora=1))
    return qwix.apply_lora_to_model(model, provider, **inputs)


def optimizer():
    """Return the optimiser of `ours.py`."""
    return optax.chain(
        optax.clip_by_global_norm(0.1), optax.adamw(3e-6, b1=0.9, b2=0.99, weight_decay=0.1)
    )


def forward() -> dict:
    """Full logits of all rows."""
    model = base_model()

    @nnx.jit
    def run(model, ids):
        B, T = ids.shape
        position = jnp.broadcast_to(jnp.arange(T), (B, T))
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((T, T), bool)), (B, T, T))
        return model(ids, position, None, mask)[0]

    return shapes.seconds(lambda: jax.block_until_ready(run(model, ids)), flags.repeats)


def sample() -> dict:
    """Tunix's Sampler, on text prompts as it wants them."""
    from tunix.generate import sampler

    cache = sampler.CacheConfig(
        cache_size=flags.prompt + flags.new, num_layers=size["num_layers"],
        num_kv_heads=size["num_kv_heads"], head_dim=size["head_dim"],
    )  # fmt: skip
    run = sampler.Sampler(with_lora(base_model()), Digits(), cache)
    prompts = [" ".join(map(str, row[: flags.prompt - 1])) for row in tokens_BT]  # BOS is added

    def once():
        out = run(
            prompts, max_generation_steps=flags.new, max_prompt_length=flags.prompt,
            temperature=shapes.TEMPERATURE, top_p=1.0, top_k=50, seed=0, eos_tokens=NEVER,
            pad_output=True,
        )  # fmt: skip
        assert np.shape(jax.block_until_ready(out.tokens)) == (flags.rows, flags.new)

    return shapes.seconds(once, flags.repeats)


def logprobs() -> dict:
    """Tunix's per-token log-probs of the completions."""
    from tunix.rl import common

    graph, state = nnx.split(with_lora(base_model()))
    parts = ids[:, : flags.prompt], ids[:, flags.prompt :]
    return shapes.seconds(
        lambda: jax.block_until_ready(
            common.compute_per_token_logps(graph, state, *parts, 0, 1)
        ),
        flags.repeats,
    )


def update() -> dict:
    """Tunix's jitted GRPO step on one batch."""
    import tunix.rl.grpo.grpo_learner as learner
    from tunix.rl import function_registry
    from tunix.sft import peft_trainer

    B, S = flags.rows, flags.prompt
    example = learner.TrainExample(
        prompt_ids=ids[:, :S], prompt_mask=jnp.ones((B, S), bool), completion_ids=ids[:, S:],
        completion_mask=jnp.ones((B, flags.new), jnp.int32),
        advantages=jnp.asarray(np.arange(B) % 4 - 1.5, jnp.float32),
        ref_per_token_logps=jnp.full((B, flags.new), -9.0, jnp.float32),
        old_per_token_logps=None,
    )  # fmt: skip
    algorithm = learner.GRPOConfig(
        num_generations=shapes.GROUP, num_iterations=1, beta=shapes.BETA, epsilon=0.2
    )
    algorithm.temperature = shapes.TEMPERATURE
    find = getattr(function_registry, "get_policy_loss_fn", None)
    loss = (
        find("grpo") if find else function_registry.default_registry.get("policy_loss_fn", "grpo")
    )
    config = peft_trainer.TrainingConfig(eval_every_n_steps=10**6, max_steps=10**6)
    trainer = peft_trainer.PeftTrainer(with_lora(base_model()), optimizer(), config)
    trainer.with_loss_fn(
        lambda model, train_example, algo_config: loss(
            model, train_example, algo_config=algorithm, pad_id=0, eos_id=1
        ),
        has_aux=True,
    )
    trainer.with_gen_model_input_fn(lambda x: {"train_example": x, "algo_config": algorithm})
    step, _ = trainer.jit_train_and_eval_step()
    last = (jnp.array(True),) if hasattr(trainer, "grad_accumulator") else ()
    return shapes.seconds(lambda: jax.block_until_ready(step(example, *last)[0]), flags.repeats)


def iteration() -> dict:
    """Tunix's GRPOLearner: the time from one batch of prompts it asks for to the next."""
    from tunix.rl import rl_cluster
    from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
    from tunix.rl.rollout import base_rollout

    num_prompts = flags.rows // shapes.GROUP
    base = base_model()
    role = rl_cluster.Role
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = rl_cluster.ClusterConfig(
        role_to_mesh={role.ACTOR: mesh, role.REFERENCE: mesh, role.ROLLOUT: mesh},
        rollout_engine="vanilla", offload_to_cpu=False,
        training_config=rl_cluster.RLTrainingConfig(
            actor_optimizer=optimizer(), eval_every_n_steps=10**6, max_steps=flags.repeats + 1,
            mini_batch_size=num_prompts, train_micro_batch_size=1, rollout_micro_batch_size=1,
        ),
        rollout_config=base_rollout.RolloutConfig(
            max_tokens_to_generate=flags.new, max_prompt_length=flags.prompt,
            kv_cache_size=flags.prompt + flags.new, temperature=shapes.TEMPERATURE, top_p=1.0,
            top_k=50, eos_tokens=NEVER,
        ),
    )  # fmt: skip
    maker = getattr(rl_cluster, "RLEngine", None) or rl_cluster.RLCluster
    engine = maker(
        actor=with_lora(base), reference=base, tokenizer=Digits(), cluster_config=cluster
    )
    name = "rl_engine" if hasattr(rl_cluster, "RLEngine") else "rl_cluster"
    algorithm = GRPOConfig(
        num_generations=shapes.GROUP, num_iterations=1, beta=shapes.BETA, epsilon=0.2
    )

    def reward(prompts, completions, **_):
        return [float(i % 4) for i in range(len(completions))]

    learner = GRPOLearner(reward_fns=[reward], algo_config=algorithm, **{name: engine})
    asked = []

    def data():
        while True:
            asked.append(time.perf_counter())
            rows = shapes.tokens(flags, len(asked))[:: shapes.GROUP, : flags.prompt - 1]
            prompts = np.array([" ".join(map(str, row)) for row in rows])
            yield {"prompts": prompts, "answer": np.array(["0"] * num_prompts)}

    shapes.forget_peak()
    learner.train(data())
    asked.append(time.perf_counter())
    gaps = np.diff(asked).tolist()
    return shapes.spread(gaps[1:]) | {"first_call_s": gaps[0]}


shapes.emit("tunix", flags, ("google-tunix", "jax", "flax", "qwix"), globals()[flags.work]())
