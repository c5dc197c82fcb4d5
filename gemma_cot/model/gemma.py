"""The Gemma 3 forward pass: tokens in, hidden states or logits out.

Layers are stacked and scanned, so the program is compiled once for one layer. LoRA arrives as data
(`gemma_cot.lora.Lora` or None). Knows no cache, no tokenizer, no loss.
"""

import jax
import jax.numpy as jnp

from gemma_cot.config import ModelConfig
from gemma_cot.model.kernels.prefill import prefill_attention
from gemma_cot.model.layers import attention, block, causal_mask, rms_norm, rope_angles
from gemma_cot.model.params import Params


def embed(params: Params, cfg: ModelConfig, tokens_BT: jax.Array) -> jax.Array:
    """Return token embeddings times sqrt(D), the factor rounded to the weights' dtype."""
    table_VD = params["embed"]
    return table_VD[tokens_BT] * jnp.asarray(cfg.embed_dim**0.5, table_VD.dtype)


def positions(start_B: jax.Array, num_positions: int) -> jax.Array:
    """Return `position_BT`: 0 at each row's first real column (padding columns get 0 too)."""
    return jnp.maximum(jnp.arange(num_positions)[None, :] - start_B[:, None], 0)


def lora_parts(lora) -> tuple[dict | None, float]:
    """Return (stacked adapter leaves or None, alpha / rank) of an adapter or of None."""
    return (None, 0.0) if lora is None else (lora.layers, lora.scale)


def hidden_states(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    remat: bool = False,
    keep_kv: bool = False,
):
    """Run all layers and the final norm. Returns (x_BTD, (k_LBSKH, v_LBSKH) or None).

    remat: recompute each layer in the backward pass instead of storing its activations.
    keep_kv: also return every layer's keys and values, which is what prefill is.
    """
    B, T = tokens_BT.shape
    start_B = jnp.zeros((B,), jnp.int32) if start_B is None else start_B
    angle_2BTh = rope_angles(cfg, positions(start_B, T))
    mask_2BTS = causal_mask(start_B, T, cfg.window)
    adapters, scale = lora_parts(lora)

    def layer_step(x_BTD, xs):
        layer, adapter, is_global = xs

        def attend(q_BTNH, k_BTKH, v_BTKH):
            kept = (k_BTKH, v_BTKH) if keep_kv else None
            if cfg.attention == "pallas":
                window = jnp.where(is_global, T, cfg.window)
                return prefill_attention(q_BTNH, k_BTKH, v_BTKH, start_B, window), kept
            return attention(q_BTNH, k_BTKH, v_BTKH, mask_2BTS[is_global]), kept

        return block(cfg, x_BTD, layer, adapter, scale, angle_2BTh[is_global], attend)

    step = jax.checkpoint(layer_step) if remat else layer_step
    is_global_L = jnp.asarray(cfg.global_layers, jnp.int32)
    x_BTD = embed(params, cfg, tokens_BT)
    x_BTD, kv = jax.lax.scan(step, x_BTD, (params["layers"], adapters, is_global_L))
    return rms_norm(x_BTD, params["final_norm"], cfg.norm_eps), kv


def unembed(params: Params, x_BTD: jax.Array) -> jax.Array:
    """Return float32 logits of hidden states against the tied embedding, last axis V."""
    return jnp.einsum("...D,VD->...V", x_BTD, params["embed"], preferred_element_type=jnp.float32)


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
