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

from gemma_cot.axes import replicated, sharding_of
from gemma_cot.config import ModelConfig, TrainConfig
from gemma_cot.grpo.loss import group_advantages, grpo_loss, token_weights
from gemma_cot.grpo.rollout import Rollout
from gemma_cot.model.logprob import chunk_of, logprobs_and_entropy
from gemma_cot.model.params import Params
from gemma_cot.optim import TrainState, accumulate_gradients, apply_gradients, split_batch


def mini_batches(rollout: Rollout, cfg: TrainConfig, mesh: Mesh) -> list[dict]:
    """Return the rollout as batches [M, rows, ...] on the mesh, one per optimiser step.

    Advantages are taken over the whole rollout, token weights over each mini-batch.
    """
    advantage_PG = group_advantages(
        jnp.asarray(rollout.reward_PG), jnp.asarray(rollout.valid_PG), scale=cfg.advantage_scale
    )
    advantage_B = np.asarray(advantage_PG).reshape(-1)
    rows = cfg.mini_batch * cfg.num_generations
    batches = []
    for first in range(0, len(advantage_B), rows):
        part = slice(first, first + rows)
        mask_BT = rollout.mask_BT[part]
        weight_BT = token_weights(
            jnp.asarray(mask_BT), cfg.aggregation, cfg.max_completion_tokens
        )
        batch = {
            "tokens_BT": rollout.tokens_BT[part],
            "start_B": rollout.start_B[part],
            "logp_sampler_BT": rollout.logp_BT[part],
            "advantage_B": advantage_B[part],
            "weight_BT": np.asarray(weight_BT),
        }
        batches.append(split_batch(batch, mesh.shape["data"] * cfg.micro_batch, mesh))
    return batches


def make_logprobs(model_cfg: ModelConfig, cfg: TrainConfig, mesh: Mesh, width: int):
    """Return the jitted f(params, lora, batch) -> logp [M, rows, T], for old and reference."""

    @partial(jax.jit, out_shardings=sharding_of("MBT", mesh))
    def logprobs(params: Params, lora, batch: dict) -> jax.Array:
        def one(micro):
            logp_BT, _ = logprobs_and_entropy(
                params, model_cfg, *micro, lora, cfg.temperature, first_column=width,
                chunk=chunk_of(model_cfg, cfg.micro_batch),
            )  # fmt: skip
            return logp_BT

        return jax.lax.map(one, (batch["tokens_BT"], batch["start_B"]))

    return logprobs


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

    def loss_fn(lora, micro, params):
        logp_BT, entropy_BT = logprobs_and_entropy(
            params, model_cfg, micro["tokens_BT"], micro["start_B"], lora, cfg.temperature,
            first_column=width, remat=cfg.remat, chunk=chunk_of(model_cfg, cfg.micro_batch),
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
            "entropy": jnp.where(in_loss_BT, entropy_BT, 0.0).sum(),
            "logp_drift_mean": drift_BT.sum(),
            "logp_drift_max": drift_BT.max(),
        }

    @partial(jax.jit, donate_argnums=0, out_shardings=replicated(mesh))
    def step(state: TrainState, params: Params, batch: dict):
        def with_params(lora, micro):
            return loss_fn(lora, micro, params)

        grads, metrics = accumulate_gradients(with_params, state.lora, batch)
        state, norm = apply_gradients(optimizer, state, grads)
        tokens = (batch["weight_BT"] > 0).sum().astype(jnp.float32)
        for name in ("kl", "clip_share", "entropy", "logp_drift_mean"):  # sums over tokens so far
            metrics[name] = metrics[name] / jnp.maximum(tokens, 1.0)
        return state, metrics | {"grad_norm": norm, "tokens": tokens}

    return step
