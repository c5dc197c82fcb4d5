"""The Gemma 3 forward pass: tokens in, hidden states or logits out.

Layers are stacked and scanned, so the program is compiled once for one layer. LoRA arrives as data
(`gemma_cot.lora.Lora` or None). Knows no cache, no tokenizer, no loss.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from gemma_cot.config import ModelConfig
from gemma_cot.model.kernels.gradients import PRODUCT, as_product, logits_of
from gemma_cot.model.kernels.prefill import prefill_attention
from gemma_cot.model.layers import attention, block, causal_mask, rms_norm, rotations
from gemma_cot.model.params import Params


@jax.named_scope("embed")
def embed(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """Return token embeddings times sqrt(D), the factor rounded to the weights' dtype."""
    table_VD = params["embed"]
    return table_VD[tokens_BT] * jnp.asarray(cfg.embed_dim**0.5, table_VD.dtype)


def positions(start_B: jax.Array, num_positions: int) -> jax.Array:
    """Return `position_BT`: 0 at each row's first real column (padding columns get 0 too)."""
    return jnp.maximum(jnp.arange(num_positions)[None, :] - start_B[:, None], 0)


def lora_parts(lora, dtype) -> tuple[dict | None, float]:
    """Return (stacked adapter leaves in `dtype` or None, alpha / rank) of an adapter or of None.

    Cast before the layers are scanned, so that the scan stacks gradients in `dtype` too: each is
    a product of activations in `dtype` and no wider than that.
    """
    if lora is None:
        return None, 0.0
    return jax.tree.map(lambda x: x.astype(dtype), lora.layers), lora.scale


def rematerialised(layer_step: Callable, remat: str) -> Callable:
    """Return a layer whose backward pass computes again: "none", all but "products", or "all"."""
    if remat == "none":
        return layer_step
    keep = jax.checkpoint_policies.save_only_these_names(*(PRODUCT,) * (remat == "products"))
    # Forward and backward are two loops: there is nothing for CSE to undo the recomputing with.
    return jax.checkpoint(layer_step, prevent_cse=False, policy=keep)


def run_layers(params: Params, cfg: ModelConfig, x_BTD, turn_2BT2h, lora, remat: str, attend):
    """Run all layers and the final norm. Returns (x_BTD, what `attend` kept, stacked by layer).

    attend(is_global, q, k, v) as in `block`; remat: what the backward pass computes again, as in
    `rematerialised`.
    """
    adapters, scale = lora_parts(lora, params["embed"].dtype)

    def layer_step(x_BTD, xs):
        layer, adapter, is_global = xs
        # Else some TPU compilers turn these two stacks round, whole, before the loop.
        layer = layer | jax.lax.optimization_barrier({name: layer[name] for name in ("q", "o")})
        turn_BT2h, here = turn_2BT2h[is_global], partial(attend, is_global)
        return block(cfg, x_BTD, layer, adapter, scale, turn_BT2h, here)

    xs = params["layers"], adapters, jnp.asarray(cfg.global_layers, jnp.int32)
    x_BTD, kept = jax.lax.scan(rematerialised(layer_step, remat), x_BTD, xs)
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps), kept


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    remat: str = "none",
    keep_kv: bool = False,
):
    """Run the model over tokens. Returns (x_BTD, (k_LBSKH, v_LBSKH) or None).

    keep_kv: also return every layer's keys and values, which is what prefill is.
    """
    B, T = tokens_BT.shape
    start_B = jnp.zeros((B,), jnp.int32) if start_B is None else start_B
    mask_2BTS = causal_mask(start_B, T, cfg.window)

    def attend(is_global, q_BTNH, k_BTKH, v_BTKH):
        kept = (k_BTKH, v_BTKH) if keep_kv else None
        if cfg.attention == "pallas":
            window = jnp.where(is_global, T, cfg.window)
            mix_BTNH = prefill_attention(q_BTNH, k_BTKH, v_BTKH, start_B, window)
            return as_product(mix_BTNH), kept
        return attention(q_BTNH, k_BTKH, v_BTKH, mask_2BTS[is_global]), kept

    x_BTD, turn_2BT2h = embed(params, cfg, tokens_BT), rotations(cfg, positions(start_B, T))
    return run_layers(params, cfg, x_BTD, turn_2BT2h, lora, remat, attend)


def group_states(
    params: Params, cfg: ModelConfig, tokens_BT, start_B, lora, remat: str, *,
    width: int, group: int,
) -> jax.Array:  # fmt: skip
    """Return `hidden_states`[:, width - 1 :] of rows that share their prompt, each prompt run once.

    Rows p * group + g for g < group are one prompt's: equal in the columns before `width`. Saves
    (group - 1) / group of the prompts' work; value and gradient are the same. Where a weight meets
    them all tokens lie in one row, prompts first; attention cuts it apart.
    """
    B, T = tokens_BT.shape
    mask_2BTS = causal_mask(start_B, T, cfg.window)

    def in_one_row(prompts_PS, rows_BT):
        """Join [P, width, ...] and [B, T - width, ...] to [1, tokens, ...]."""
        parts = [x.reshape(1, -1, *x.shape[2:]) for x in (prompts_PS, rows_BT)]
        return jnp.concatenate(parts, axis=1)

    def cut(x_1T):
        """Undo `in_one_row`."""
        prompts, rows = jnp.split(x_1T, [B // group * width], axis=1)
        return prompts.reshape(-1, width, *x_1T.shape[2:]), rows.reshape(B, -1, *x_1T.shape[2:])

    def attend(is_global, *qkv_1TNH):
        mask_BTS = mask_2BTS[is_global]
        (q_PSNH, q_BTNH), *kv = map(cut, qkv_1TNH)
        mask_PSS = mask_BTS[::group, :width, :width]
        mix_PSNH = attention(q_PSNH, *(prompts for prompts, _ in kv), mask_PSS)
        both = [jnp.concatenate([jnp.repeat(p, group, axis=0), x], axis=1) for p, x in kv]
        return in_one_row(mix_PSNH, attention(q_BTNH, *both, mask_BTS[:, width:])), None

    tokens_1T, position_1T = (
        in_one_row(x[::group, :width], x[:, width:]) for x in (tokens_BT, positions(start_B, T))
    )
    x_1TD, turn_21T2h = embed(params, cfg, tokens_1T), rotations(cfg, position_1T)
    x_1TD, _ = run_layers(params, cfg, x_1TD, turn_21T2h, lora, remat, attend)
    x_PSD, x_BTD = cut(x_1TD)
    return jnp.concatenate([jnp.repeat(x_PSD[:, -1:], group, axis=0), x_BTD], axis=1)


@jax.named_scope("unembed")
def unembed(params: Params, x_BTD: jax.Array, product=jnp.einsum) -> jax.Array:
    """Return float32 logits of hidden states against the tied embedding, last axis V."""
    return logits_of(params["embed"], x_BTD, product)


def logits(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
) -> jax.Array:
    """Return float32 `logits_BTV`. start_B: first real column of a left-padded row (None = 0)."""
    x_BTD, _ = hidden_states(params, cfg, tokens_BT, start_B, lora)
    return unembed(params, x_BTD)
