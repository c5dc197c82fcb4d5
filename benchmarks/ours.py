"""Time one piece of our work on random weights: python benchmarks/ours.py --work=sample --rows=16

The functions are those of `gemma_cot.train`; prints one JSON line. `compare.py` runs it beside the
peers, `utilisation.py` beside what the device can do: for that the line holds the work counted from
shapes (`plan.cost`), of a whole call. Rows never stop early, so that every run has as many tokens.
"""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import shapes

from gemma_cot.axes import make_mesh, replicated
from gemma_cot.cli import trim_after_compiling
from gemma_cot.config import ModelConfig, TrainConfig, five_to_one
from gemma_cot.grpo.rollout import sample_prompts
from gemma_cot.grpo.step import (
    add_advantages,
    add_logprobs,
    make_grpo_step,
    make_logprobs,
    mini_batches,
    shared_rows,
)
from gemma_cot.lora import init_lora
from gemma_cot.model.gemma import logits
from gemma_cot.model.params import init_params
from gemma_cot.model.sample import Samples
from gemma_cot.optim import init_state, make_optimizer, make_schedule
from gemma_cot.plan.cost import Cost, Rows, Share, forward, gradient, sampling

flags = shapes.parse("gemma_cot", devices=True)
jax.config.update("jax_num_cpu_devices", flags.devices)
trim_after_compiling()  # as every command does
size = shapes.SHAPES[flags.shape]
model_cfg = ModelConfig(
    **size, window=shapes.WINDOW, global_layers=five_to_one(size["num_layers"]),
    query_scalar=float(size["head_dim"]),
)  # fmt: skip
num_prompts = max(1, flags.rows // shapes.GROUP)
cfg = TrainConfig(
    num_generations=shapes.GROUP, prompts_per_rollout=num_prompts, mini_batch=num_prompts,
    micro_batch=min(flags.micro, flags.rows // flags.devices), remat="products",
    beta=shapes.BETA, temperature=shapes.TEMPERATURE,
    max_prompt_tokens=flags.prompt, max_completion_tokens=flags.new,
)  # fmt: skip
mesh = make_mesh(devices=jax.devices()[: flags.devices])
params = jax.jit(
    lambda: init_params(jax.random.key(0), model_cfg, flags.dtype), out_shardings=replicated(mesh)
)()
optimizer = make_optimizer(cfg, make_schedule(3e-6, 1000, 0.1))
tokens_BT = shapes.tokens(flags)


def adapter():
    """Return an adapter whose b is not 0."""
    lora = init_lora(jax.random.key(1), model_cfg, shapes.RANK, shapes.RANK / 2)
    return jax.device_put(jax.tree.map(lambda x: x + 1e-3, lora), replicated(mesh))


def roll_out(lora, seed: int = 0) -> Samples:
    """Sample as a run does."""
    prompts = [row[: flags.prompt].tolist() for row in tokens_BT[:: shapes.GROUP]]
    return jax.device_get(
        sample_prompts(
            params, model_cfg, lora, prompts, flags.prompt, jax.random.key(seed), mesh,
            prompt_ids=list(range(num_prompts)), num_completions=min(flags.rows, shapes.GROUP),
            max_new_tokens=flags.new, temperature=shapes.TEMPERATURE, stop_ids=(),
        )
    )  # fmt: skip


def given_samples() -> Samples:
    """Return the random tokens as if they had been sampled."""
    mask_BT = np.broadcast_to(np.arange(tokens_BT.shape[1]) >= flags.prompt, tokens_BT.shape)
    B = len(tokens_BT)
    return Samples(
        tokens_BT, mask_BT, np.zeros(tokens_BT.shape, np.float32), np.zeros(B, np.int32),
        np.zeros(B, bool), np.ones(B, np.float32),
    )  # fmt: skip


def counted() -> list[Cost]:
    """Return the work of one call of "sample" (prefill, decoding: of caches what is visible),
    "logprobs" or "update"."""
    item = jnp.dtype(flags.dtype).itemsize
    share = Share(model_cfg, shapes.RANK, flags.devices, 1, item)
    if flags.work == "sample":
        seen = replace(model_cfg, attention="pallas")  # which is counted by what a token may see
        share = replace(share, cfg=seen)
        group = min(flags.rows, shapes.GROUP)
        return sampling(share, num_prompts, group, num_prompts * group, flags.prompt, flags.new)
    group = Rows(cfg.micro_batch, flags.prompt, flags.new, shared_rows(model_cfg, cfg))
    one = forward(share, group) if flags.work == "logprobs" else gradient(share, group, cfg.remat)
    return [one.times(flags.rows / cfg.micro_batch)]


reward_PG = np.arange(num_prompts * shapes.GROUP, dtype=np.float32).reshape(-1, shapes.GROUP) % 4
lora = adapter()
logprobs = make_logprobs(model_cfg, cfg, mesh, flags.prompt)
if flags.work == "forward":
    forward = jax.jit(partial(logits, cfg=model_cfg))
    figures = shapes.seconds(
        lambda: jax.block_until_ready(forward(params, tokens_BT=tokens_BT)), flags.repeats
    )
elif flags.work == "sample":
    figures = shapes.seconds(lambda: roll_out(lora), flags.repeats)
elif flags.work == "logprobs":
    (batch,) = mini_batches(given_samples(), cfg, mesh)
    figures = shapes.seconds(
        lambda: jax.block_until_ready(logprobs(params, lora, batch)), flags.repeats
    )
else:
    step = make_grpo_step(model_cfg, cfg, optimizer, mesh, flags.prompt)
    state = init_state(optimizer, jax.tree.map(jnp.copy, lora))
    held = {"state": jax.device_put(state, replicated(mesh))}  # donated by each step

    def update(samples: Samples, reference) -> None:
        """Take one optimiser step; with `reference` None its log-probs are those of the batch."""
        batches = mini_batches(samples, cfg, mesh)
        if reference is None:
            batches = [b | {"logp_ref_BT": b["logp_sampler_BT"] - 9.0} for b in batches]
        else:
            batches = add_logprobs(logprobs, params, batches, None, reference, cfg)
        everywhere = np.ones(reward_PG.shape, bool)
        (batch,) = add_advantages(batches, reward_PG, everywhere, cfg, mesh)
        held["state"], metrics = step(held["state"], params, batch)
        jax.block_until_ready(metrics)

    if flags.work == "update":
        figures = shapes.seconds(lambda: update(given_samples(), None), flags.repeats)
    else:
        figures = shapes.seconds(
            lambda: update(roll_out(held["state"].lora), lora), flags.repeats
        )
if flags.work in ("sample", "logprobs", "update"):
    figures |= {"flops": [c.flops for c in counted()], "hbm_bytes": [c.hbm for c in counted()]}
device = jax.devices()[0]
memory = device.memory_stats() or {}  # None of a CPU
shapes.emit(
    "gemma_cot", flags, ("jax",), figures, device.device_kind, memory.get("peak_bytes_in_use")
)
