"""From a scored rollout to updates: cut it into mini-batches, add log-probs, take gradient steps.

One rollout of P prompts gives P / mini_batch optimiser steps. Policy, old and reference log-probs
all come from `model.logprob`; when a rollout feeds one update only, pi_old is the policy itself
(ratio 1), else, and where else `needs_old` says, that from before the first of them, frozen.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.axes import per_device, replicated, round_up
from gemma_cot.config import ModelConfig, TrainConfig
from gemma_cot.grpo.loss import group_advantages, grpo_loss, kl_penalty, token_weights
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
        columns = slice(columns_of(samples.completion_mask_BT[part], cfg))
        batch = {
            "tokens_BT": samples.tokens_BT[part, columns],
            "start_B": samples.start_B[part],
            "logp_sampler_BT": samples.logp_BT[part, columns],
        }
        batches.append(weighted_batch(batch, samples.completion_mask_BT[part, columns], cfg, mesh))
    return batches


def columns_of(mask_BT: np.ndarray, cfg: TrainConfig) -> int:
    """Return how many columns an update needs: the prompt's, and one of `length_buckets` widths
    that holds its longest completion. All of them with dynamic sampling, whose groups wait."""
    T, longest = mask_BT.shape[1], cfg.max_completion_tokens
    if cfg.dynamic_sampling or cfg.length_buckets == 1:
        return T
    width = round_up(int(mask_BT.sum(axis=1).max()), math.ceil(longest / cfg.length_buckets))
    return T - longest + min(longest, width)


def weighted_batch(batch: dict, mask_BT: np.ndarray, cfg: TrainConfig, mesh: Mesh) -> dict:
    """Return the rows of one update (host arrays) with `weight_BT`, cut and placed on the mesh."""
    mask_BT = jnp.asarray(mask_BT)
    weight_BT = token_weights(mask_BT, cfg.aggregation, cfg.max_completion_tokens)
    batch = batch | {"weight_BT": np.asarray(weight_BT)}
    return split_batch(batch, mesh.shape["data"] * cfg.micro_batch, mesh)


def add_advantages(
    batches: list[dict], reward_PG: np.ndarray, valid_PG: np.ndarray, cfg: TrainConfig, mesh: Mesh
) -> list[dict]:
    """Return the batches with `advantage_B`, taken over all their groups (the whole rollout)."""
    if cfg.beta and cfg.kl_in == "reward":
        kl_B = [kl_penalty(b["logp_old_BT"], b["logp_ref_BT"], b["weight_BT"] > 0, cfg.kl)
                for b in batches]  # fmt: skip
        kl_B = np.concatenate(hosts.fetch(kl_B), axis=None)
        reward_PG = reward_PG - cfg.beta * kl_B.reshape(reward_PG.shape)
    advantage_PG = group_advantages(
        jnp.asarray(reward_PG), jnp.asarray(valid_PG), scale=cfg.advantage_scale,
        baseline=cfg.baseline,
    )  # fmt: skip
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


def make_logprobs(
    model_cfg: ModelConfig, cfg: TrainConfig, mesh: Mesh, width: int, entropy: bool = False
):
    """Return the jitted f(params, lora, batch) -> logp [M, rows, T], for old and reference;
    entropy: -> (logp, entropy), for traces."""

    def logprobs(params: Params, lora, batch: dict):
        def one(micro):
            both = logprobs_and_entropy(
                params, model_cfg, *micro, lora, cfg.temperature, first_column=width,
                group=shared_rows(model_cfg, cfg),
            )  # fmt: skip
            return both if entropy else both[0]

        return jax.lax.map(one, (batch["tokens_BT"], batch["start_B"]))

    return jax.jit(per_device(logprobs, f",,MB->MBT{',MBT' * entropy}", mesh))


def needs_old(cfg: TrainConfig) -> bool:
    """Return whether a rollout's log-probs are asked for after an update, or by its rewards."""
    once = cfg.prompts_per_rollout == cfg.mini_batch and cfg.num_iterations == 1
    return not once or cfg.dynamic_sampling or bool(cfg.beta and cfg.kl_in == "reward")


def add_logprobs(
    logprobs, params: Params, batches: list[dict], policy, reference, cfg: TrainConfig
) -> list[dict]:
    """Return the batches with `logp_old_BT` (`needs_old`) and `logp_ref_BT` (beta > 0).

    Call it before the first update of the rollout; policy and reference are adapters (or None).
    """
    if needs_old(cfg):
        batches = [b | {"logp_old_BT": logprobs(params, policy, b)} for b in batches]
    if cfg.beta:
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

    batch: one of `mini_batches` with its log-probs and advantages; width: columns of the prompt.
    """

    def loss_fn(lora, params, micro):
        logp_BT, entropy_BT = logprobs_and_entropy(
            params, model_cfg, micro["tokens_BT"], micro["start_B"], lora, cfg.temperature,
            first_column=width, group=shared_rows(model_cfg, cfg), remat=cfg.remat,
        )  # fmt: skip
        old_BT = micro.get("logp_old_BT")
        loss, metrics = grpo_loss(
            logp_BT, old_BT, micro.get("logp_ref_BT"), micro["advantage_B"], micro["weight_BT"],
            objective=cfg.objective, epsilon_low=cfg.epsilon, epsilon_high=cfg.epsilon_high,
            beta=cfg.beta if cfg.kl_in == "loss" else 0.0, kl=cfg.kl,
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
        state, update = apply_gradients(optimizer, state, grads, metrics["loss"])
        for name in [n for n in ("kl", "clip_share", "entropy", "logp_drift_mean") if n in metrics]:
            metrics[name] = metrics[name] / jnp.maximum(metrics["tokens"], 1.0)  # a sum so far
        return state, metrics | update

    return step
