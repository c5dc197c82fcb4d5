"""The Gemma 3 forward pass: tokens in, hidden states or logits out.

Layers are stacked and scanned, so the program is compiled once for one layer. LoRA arrives as data
(`gemma_cot.lora.Lora` or None). Knows no cache, no tokenizer, no loss.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from gemma_cot.config import ModelConfig
from gemma_cot.model.kernels.gradients import PRODUCT, logits_of
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


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    remat: str = "none",
    keep_kv: bool = False,
):
    """Run all layers and the final norm. Returns (x_BTD, (k_LBSKH, v_LBSKH) or None).

    remat: what the backward pass computes again, as in `rematerialised`.
    keep_kv: also return every layer's keys and values, which is what prefill is.
    """
    B, T = tokens_BT.shape
    start_B = jnp.zeros((B,), jnp.int32) if start_B is None else start_B
    turn_2BT2h = rotations(cfg, positions(start_B, T))
    mask_2BTS = causal_mask(start_B, T, cfg.window)
    adapters, scale = lora_parts(lora, params["embed"].dtype)

    def layer_step(x_BTD, xs):
        layer, adapter, is_global = xs

        def attend(q_BTNH, k_BTKH, v_BTKH):
            kept = (k_BTKH, v_BTKH) if keep_kv else None
            if cfg.attention == "pallas":
                window = jnp.where(is_global, T, cfg.window)
                mix_BTNH = prefill_attention(q_BTNH, k_BTKH, v_BTKH, start_B, window)
                return checkpoint_name(mix_BTNH, PRODUCT), kept
            return attention(q_BTNH, k_BTKH, v_BTKH, mask_2BTS[is_global]), kept

        return block(cfg, x_BTD, layer, adapter, scale, turn_2BT2h[is_global], attend)

    step = rematerialised(layer_step, remat)
    is_global_L = jnp.asarray(cfg.global_layers, jnp.int32)
    x_BTD = embed(params, cfg, tokens_BT)
    x_BTD, kv = jax.lax.scan(step, x_BTD, (params["layers"], adapters, is_global_L))
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps), kv


def group_states(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array,
    lora,
    remat: str,
    *,
    width: int,
    group: int,
) -> jax.Array:
    """Return `hidden_states`[:, width - 1 :] of rows that share their prompt, each prompt run once.

    Rows p * group + g for g < group are one prompt's: equal in the columns before `width`. Saves
    (group - 1) / group of the prompts' work; value and gradient are the same.
    """
    T = tokens_BT.shape[1]
    turn_2BT2h = rotations(cfg, positions(start_B, T))
    mask_2BTS = causal_mask(start_B, T, cfg.window)
    adapters, scale = lora_parts(lora, params["embed"].dtype)

    def layer_step(carry, xs):
        x_PSD, x_BTD = carry
        layer, adapter, is_global = xs
        turn_BT2h, mask_BTS = turn_2BT2h[is_global], mask_2BTS[is_global]

        def within_prompt(q_PSNH, k_PSKH, v_PSKH):
            mask_PTS = mask_BTS[::group, :width, :width]
            return attention(q_PSNH, k_PSKH, v_PSKH, mask_PTS), (k_PSKH, v_PSKH)

        turn_PS2h = turn_BT2h[::group, :width]
        x_PSD, kv = block(cfg, x_PSD, layer, adapter, scale, turn_PS2h, within_prompt)
        prompt_kv = [jnp.repeat(x_PSKH, group, axis=0) for x_PSKH in kv]

        def over_both(q_BTNH, *own_kv):
            both = (jnp.concatenate(pair, axis=1) for pair in zip(prompt_kv, own_kv, strict=True))
            return attention(q_BTNH, *both, mask_BTS[:, width:]), None

        x_BTD, _ = block(cfg, x_BTD, layer, adapter, scale, turn_BT2h[:, width:], over_both)
        return (x_PSD, x_BTD), None

    step = rematerialised(layer_step, remat)
    is_global_L = jnp.asarray(cfg.global_layers, jnp.int32)
    parts = embed(params, cfg, tokens_BT[::group, :width]), embed(params, cfg, tokens_BT[:, width:])
    (x_PSD, x_BTD), _ = jax.lax.scan(step, parts, (params["layers"], adapters, is_global_L))
    x_BTD = jnp.concatenate([jnp.repeat(x_PSD[:, -1:], group, axis=0), x_BTD], axis=1)
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps)


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
