"""From a scored rollout to updates: cut it into mini-batches, add log-probs, take gradient steps.

One rollout of P prompts gives P / mini_batch optimiser steps. Policy, old and reference log-probs
all come from `model.logprob`; when a rollout feeds one update only, pi_old is the policy itself
(ratio 1), else it is the policy from before the first of them.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_cot.axes import per_device, replicated
from gemma_cot.config import ModelConfig, TrainConfig
from gemma_cot.grpo.loss import group_advantages, grpo_loss, token_weights
from gemma_cot.model.logprob import logprobs_and_entropy
from gemma_cot.model.params import Params
from gemma_cot.model.sample import Samples
from gemma_cot.optim import TrainState, apply_gradients, data_parallel_gradients, split_batch


def mini_batches(samples: Samples, cfg: TrainConfig, mesh: Mesh) -> list[dict]:
    """Return sampled rows (host arrays) as batches [M, rows, ...] on the mesh, one per update.

    Token weights are those of each mini-batch. Needs no reward, so that the devices can work on
    log-probs while the host scores; `add_advantages` completes the batches.
    """
    rows = cfg.mini_batch * cfg.num_generations
    batches = []
    for first in range(0, len(samples.tokens_BT), rows):
        part = slice(first, first + rows)
        mask_BT = jnp.asarray(samples.completion_mask_BT[part])
        weight_BT = token_weights(mask_BT, cfg.aggregation, cfg.max_completion_tokens)
        batch = {
            "tokens_BT": samples.tokens_BT[part],
            "start_B": samples.start_B[part],
            "logp_sampler_BT": samples.logp_BT[part],
            "weight_BT": np.asarray(weight_BT),
        }
        batches.append(split_batch(batch, mesh.shape["data"] * cfg.micro_batch, mesh))
    return batches


def add_advantages(
    batches: list[dict], reward_PG: np.ndarray, valid_PG: np.ndarray, cfg: TrainConfig, mesh: Mesh
) -> list[dict]:
    """Return the batches with `advantage_B`, taken over the whole rollout."""
    advantage_PG = group_advantages(
        jnp.asarray(reward_PG), jnp.asarray(valid_PG), scale=cfg.advantage_scale
    )
    parts = np.asarray(advantage_PG).reshape(len(batches), -1)
    rows_per_micro = mesh.shape["data"] * cfg.micro_batch
    return [
        batch | split_batch({"advantage_B": part}, rows_per_micro, mesh)
        for batch, part in zip(batches, parts, strict=True)
    ]


def shared_rows(model_cfg: ModelConfig, cfg: TrainConfig) -> int:
    """Return how many rows of a micro-batch share a prompt that is run once for all of them: the
    group's, where a device's micro-batch holds whole groups, else 1."""
    whole_groups = cfg.micro_batch % cfg.num_generations == 0
    return cfg.num_generations if whole_groups and model_cfg.attention == "reference" else 1


def make_logprobs(model_cfg: ModelConfig, cfg: TrainConfig, mesh: Mesh, width: int):
    """Return the jitted f(params, lora, batch) -> logp [M, rows, T], for old and reference."""

    def logprobs(params: Params, lora, batch: dict) -> jax.Array:
        def one(micro):
            logp_BT, _ = logprobs_and_entropy(
                params, model_cfg, *micro, lora, cfg.temperature, first_column=width,
                group=shared_rows(model_cfg, cfg),
            )  # fmt: skip
            return logp_BT

        return jax.lax.map(one, (batch["tokens_BT"], batch["start_B"]))

    return jax.jit(per_device(logprobs, ",,MB->MBT", mesh))


def add_logprobs(logprobs, params: Params, batches: list[dict], policy, reference, beta: float):
    """Return the batches with `logp_old_BT` (when there are several) and `logp_ref_BT` (beta > 0).

    Call it before the first update of the rollout; policy and reference are adapters (or None).
    """
    if len(batches) > 1:
        batches = [b | {"logp_old_BT": logprobs(params, policy, b)} for b in batches]
    if beta:
        batches = [b | {"logp_ref_BT": logprobs(params, reference, b)} for b in batches]
    return batches


def make_grpo_step(
    model_cfg: ModelConfig,
    cfg: TrainConfig,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    width: int,
):
    """Return the jitted step(state, params, batch) -> (state, metrics); `state` is donated.

    batch: one of `mini_batches` with its log-probs; width: columns of the prompt.
    """

    def loss_fn(lora, params, micro):
        logp_BT, entropy_BT = logprobs_and_entropy(
            params, model_cfg, micro["tokens_BT"], micro["start_B"], lora, cfg.temperature,
            first_column=width, group=shared_rows(model_cfg, cfg), remat=cfg.remat,
        )  # fmt: skip
        old_BT = micro.get("logp_old_BT")
        loss, metrics = grpo_loss(
            logp_BT, old_BT, micro.get("logp_ref_BT"), micro["advantage_B"], micro["weight_BT"],
            epsilon_low=cfg.epsilon, epsilon_high=cfg.epsilon_high, beta=cfg.beta, kl=cfg.kl,
        )  # fmt: skip
        in_loss_BT = micro["weight_BT"] > 0
        at_rollout_BT = logp_BT if old_BT is None else old_BT
        drift_BT = jnp.where(in_loss_BT, jnp.abs(at_rollout_BT - micro["logp_sampler_BT"]), 0.0)
        return loss, metrics | {
            "loss": loss,
            "tokens": in_loss_BT.sum(dtype=jnp.float32),
            "entropy": jnp.where(in_loss_BT, entropy_BT, 0.0).sum(),
            "logp_drift_mean": drift_BT.sum(),
            "logp_drift_max": drift_BT.max(),
        }

    gradients = data_parallel_gradients(loss_fn, mesh)

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: TrainState, params: Params, batch: dict):
        grads, metrics = gradients(state.lora, params, batch)
        state, norm = apply_gradients(optimizer, state, grads)
        for name in ("kl", "clip_share", "entropy", "logp_drift_mean"):  # sums over tokens so far
            metrics[name] = metrics[name] / jnp.maximum(metrics["tokens"], 1.0)
        return state, metrics | {"grad_norm": norm}

    return step
