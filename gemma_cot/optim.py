"""The optimiser of both stages: state, schedule, gradient accumulation, one update.

Gradients are taken with respect to the adapter only; the base weights are an argument that nobody
differentiates or donates. Losses are plain sums over per-token weights, so accumulation is a plain
sum as well and the gradient cannot depend on how a batch is cut. Knows no loss and no model.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.axes import per_device, replicated, sharding_of
from gemma_cot.config import TrainConfig


@flax.struct.dataclass
class TrainState:
    """What an update changes."""

    step: jax.Array  # optimiser steps done in this stage, int32
    lora: object  # lora.Lora, float32
    opt_state: optax.OptState


def make_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Return step -> learning rate of update 1, 2, ...: linear up to `peak`, then cosine down.

    It would be 0 at step 0 and again at step total_steps + 1, so that every update moves.
    """
    warmup = max(1, round(warmup_fraction * total_steps))
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(total_steps, warmup) + 1)


def make_optimizer(cfg: TrainConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW under a clip of the global norm (applied once, after accumulation).

    The schedule is asked for step + 1, so that the first update already moves.
    """
    return optax.chain(
        optax.clip_by_global_norm(cfg.max_grad_norm),
        optax.adamw(
            lambda step: schedule(step + 1),
            b1=cfg.adam_b1,
            b2=cfg.adam_b2,
            weight_decay=cfg.weight_decay,
        ),
    )


def init_state(optimizer: optax.GradientTransformation, lora) -> TrainState:
    """Return the state before the first update."""
    return TrainState(jnp.zeros((), jnp.int32), lora, optimizer.init(lora))


def split_batch(batch: dict, rows_per_micro: int, mesh: Mesh) -> dict:
    """Cut host arrays [B, ...] into [M, rows, ...] on the mesh, each micro-batch over `data`.

    B must be divisible by rows_per_micro = data devices x rows a device runs at a time.
    """

    def place(value: np.ndarray):
        micro = value.reshape(-1, rows_per_micro, *value.shape[1:])
        return hosts.place(micro, sharding_of("MBT"[: micro.ndim], mesh))

    return {name: place(np.asarray(value)) for name, value in batch.items()}


def accumulate_gradients(loss_fn: Callable, lora, batch: dict) -> tuple:
    """Sum loss_fn's gradient and metrics over the micro-batches of `batch` ([M, ...] leaves).

    loss_fn(lora, micro) -> (loss, metrics): plain sums over the rows of the micro-batch, except
    metrics whose name ends in `_max`, of which the largest is kept. Returns (grads, metrics).
    """

    def one(carry, micro):
        grads, metrics = carry
        new_grads, new_metrics = jax.grad(loss_fn, has_aux=True)(lora, micro)
        joined = {
            name: (jnp.maximum if name.endswith("_max") else jnp.add)(metrics[name], value)
            for name, value in new_metrics.items()
        }
        return (jax.tree.map(jnp.add, grads, new_grads), joined), None

    first = {name: value[0] for name, value in batch.items()}
    if all(len(value) == 1 for value in batch.values()):
        return jax.grad(loss_fn, has_aux=True)(lora, first)  # and no memory for a sum
    shapes = jax.eval_shape(lambda: loss_fn(lora, first)[1])
    start_metrics = {
        name: jnp.full(leaf.shape, -jnp.inf if name.endswith("_max") else 0, leaf.dtype)
        for name, leaf in shapes.items()
    }
    start = (jax.tree.map(jnp.zeros_like, lora), start_metrics)
    (grads, metrics), _ = jax.lax.scan(one, start, batch)
    return grads, metrics


def data_parallel_gradients(loss_fn: Callable, mesh: Mesh) -> Callable:
    """Return f(lora, params, batch) -> (grads, metrics), `accumulate_gradients` over all devices.

    loss_fn(lora, params, micro). Every data shard accumulates over its own rows; what the shards
    have is then summed once, by one all-reduce.
    """

    def on_shard(lora, params, batch):
        grads, metrics = accumulate_gradients(
            lambda lora, micro: loss_fn(lora, params, micro), lora, batch
        )
        largest = {name: metrics.pop(name) for name in list(metrics) if name.endswith("_max")}
        grads, metrics = jax.lax.psum((grads, metrics), "data")
        return grads, metrics | jax.lax.pmax(largest, "data")

    gradients = per_device(on_shard, ",,MB->,", mesh)

    def whole_gradients(lora, params, batch):
        grads, metrics = gradients(lora, params, batch)
        return jax.lax.with_sharding_constraint(grads, replicated(mesh)), metrics

    return whole_gradients


@jax.named_scope("apply_gradients")
def apply_gradients(
    optimizer: optax.GradientTransformation, state: TrainState, grads, loss: jax.Array | float = 0.0
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Make one update. Returns (new state, {"grad_norm": before clipping, "skipped": 0 or 1}).

    Where gradient or loss is not finite, only the counters go on (of steps and of the schedule);
    adapter and moments stay.
    """
    norm = optax.tree.norm(grads)
    good = jnp.isfinite(norm) & jnp.isfinite(loss)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to its int32 counter
        updates, opt_state = optimizer.update(grads, state.opt_state, state.lora)
    new = TrainState(state.step + 1, optax.apply_updates(state.lora, updates), opt_state)

    def kept(new, old):
        return jnp.where(good, new, old) if jnp.issubdtype(new.dtype, jnp.floating) else new

    state = jax.tree.map(kept, new, state)
    return state, {"grad_norm": norm, "skipped": 1.0 - good.astype(jnp.float32)}
