"""The parts of a Gemma 3 layer: rotary embedding, linear (where LoRA meets a weight), attention
masks, attention, MLP, and the block that joins them with the norm of `kernels.gradients`.

Pure functions on arrays; knows no cache, no sampling and no files. `attend` is passed into the
block, so that the full forward pass and the cached one are the same code.
"""

import jax
import jax.numpy as jnp

from gemma_cot.config import ModelConfig
from gemma_cot.model.kernels.gradients import (
    adapted_product,
    as_product,
    block_attention,
    rms_norm,
)

QUERY_BLOCK = 128  # queries whose scores exist at one time
PRODUCTS = {  # how x meets each weight
    "q": "BTD,DNH->BTNH", "k": "BTD,DKH->BTKH", "v": "BTD,DKH->BTKH", "o": "BTNH,NHD->BTD",
    "gate": "BTD,DF->BTF", "up": "BTD,DF->BTF", "down": "BTF,FD->BTD",
}  # fmt: skip


def rotations(cfg: ModelConfig, position_BT: jax.Array) -> jax.Array:
    """Return float32 `turn_2BT2h` (h = H/2): cos and sin of angles, [0] local, [1] global layers.

    angle_h = position / base^(2h/H), radians (Su et al. 2021, arXiv:2104.09864); global layers of
    the larger models divide positions by `rope_scale_global`.
    """
    exponent = jnp.arange(0, cfg.head_dim, 2, dtype=jnp.float32)[None, None] / cfg.head_dim
    position = position_BT.astype(jnp.float32)[..., None]
    wide = position / cfg.rope_scale_global / cfg.rope_base_global**exponent
    angle_2BTh = jnp.stack([position / cfg.rope_base_local**exponent, wide])
    return jnp.stack([jnp.cos(angle_2BTh), jnp.sin(angle_2BTh)], axis=-2)


def apply_rope(x_BTNH: jax.Array, turn_BT2h: jax.Array) -> jax.Array:
    """Rotate the halves (x1, x2) of each head by its angle: (x1 cos - x2 sin, x2 cos + x1 sin)."""
    cos, sin = turn_BT2h[:, :, None, 0], turn_BT2h[:, :, None, 1]
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def linear(einsum: str, x, layer: dict, name: str, lora, scale: float):
    """Return einsum(x, w) plus, when `lora` has `name`, scale * (x·a)·b.

    The only place where an adapter meets a weight, decoding apart (`kernels.layout.all_at_once`).
    y = W x + (alpha / r) B A x, Hu et al. 2021 (arXiv:2106.09685), section 4.1.
    """
    if lora is None or name not in lora:
        y = jnp.einsum(einsum, x, layer[name])
    else:
        a, b = (lora[name][part].astype(x.dtype) for part in ("a", "b"))
        y = adapted_product(einsum, x, layer[name], a, b, scale)
    return as_product(y)


def each_by_itself(layer: dict, lora: dict | None, scale: float, x, *names: str) -> tuple:
    """Return the products of x with the weights of these names, one after the other."""
    return tuple(linear(PRODUCTS[name], x, layer, name, lora, scale) for name in names)


def causal_mask(start_B: jax.Array, num_positions: int, window: int) -> jax.Array:
    """Return `mask_2BTS` (True = may attend): [0] local layers, [1] global layers.

    One left-padded row of 5 columns with start 1 and window 2 (row = query, column = key):
        global      local
        . . . . .   . . . . .
        . 1 . . .   . 1 . . .
        . 1 1 . .   . 1 1 . .
        . 1 1 1 .   . . 1 1 .
        . 1 1 1 1   . . . 1 1
    """
    t = jnp.arange(num_positions)
    distance_TS = t[:, None] - t[None, :]
    real_BTS = (t[None, :] >= start_B[:, None])[:, None, :]
    wide_BTS = (distance_TS >= 0)[None] & real_BTS
    local_BTS = wide_BTS & (distance_TS < window)[None]
    return jnp.stack([local_BTS, wide_BTS])


@jax.named_scope("attention")
def attention(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array):
    """Return causal grouped-query attention `mix_BTNH`; q already carries the query scale.

    The queries are the last T of the S columns, QUERY_BLOCK of them at a time: the keys behind
    a block are not looked at, and only its scores exist.
    """
    B, T, N, H = q_BTNH.shape
    S, K = k_BSKH.shape[1:3]
    q_BKQTH = q_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    parts = []
    for first in range(0, T, QUERY_BLOCK):
        rows, seen = slice(first, first + QUERY_BLOCK), min(S, S - T + first + QUERY_BLOCK)
        parts.append(
            block_attention(
                q_BKQTH[:, :, :, rows],
                k_BKSH[:, :, :seen],
                v_BKSH[:, :, :seen],
                mask_BTS[:, rows, :seen],
            )
        )
    mix_BKQTH = jnp.concatenate(parts, axis=3)
    return mix_BKQTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


@jax.named_scope("mlp")
def mlp(x_BTD, layer: dict, lora: dict | None, scale: float, project=each_by_itself) -> jax.Array:
    """Return down(gelu_tanh(gate(x)) * up(x)), the gated MLP of Gemma."""
    gate_BTF, up_BTF = project(layer, lora, scale, x_BTD, "gate", "up")
    hidden_BTF = jax.nn.gelu(gate_BTF, approximate=True) * up_BTF
    (out_BTD,) = project(layer, lora, scale, hidden_BTF, "down")
    return out_BTD


def block(cfg: ModelConfig, x_BTD, layer, lora, scale, turn_BT2h, attend, project=each_by_itself):
    """Run one layer: norms before and after both attention and MLP, residuals around each pair.

    `attend(q_BTNH, k_BTKH, v_BTKH) -> (mix_BTNH, kept)` decides what is attended to and what is
    kept of the new keys and values. project: how x meets the weights that it is multiplied by.
    Returns (x_BTD, kept).
    """
    h_BTD = rms_norm(x_BTD, layer["pre_attn_norm"], cfg.norm_eps)
    q_BTNH, k_BTKH, v_BTKH = project(layer, lora, scale, h_BTD, "q", "k", "v")
    q_BTNH = apply_rope(rms_norm(q_BTNH, layer["q_norm"], cfg.norm_eps), turn_BT2h)
    k_BTKH = apply_rope(rms_norm(k_BTKH, layer["k_norm"], cfg.norm_eps), turn_BT2h)
    mix_BTNH, kept = attend(q_BTNH * cfg.query_scalar**-0.5, k_BTKH, v_BTKH)
    (out_BTD,) = project(layer, lora, scale, mix_BTNH, "o")
    x_BTD = x_BTD + rms_norm(out_BTD, layer["post_attn_norm"], cfg.norm_eps)
    h_BTD = rms_norm(x_BTD, layer["pre_mlp_norm"], cfg.norm_eps)
    out_BTD = mlp(h_BTD, layer, lora, scale, project)
    return x_BTD + rms_norm(out_BTD, layer["post_mlp_norm"], cfg.norm_eps), kept
