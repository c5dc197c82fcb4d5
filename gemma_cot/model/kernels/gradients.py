"""The two products of the model whose gradient is written out: attention, and x·a·b of LoRA.

Automatic differentiation would keep the attention weights and transpose arrays of their size, which
on a CPU costs more than the products do. Values are those of the plain einsums; knows no model.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# Large and finite: a row that may attend to nothing gets uniform weights, never NaN.
MASKED = -2.0e38
PRODUCT = "product"  # the name of what `gemma.rematerialised` may keep


def softmax(scores: jax.Array) -> jax.Array:
    """Return the softmax over the last axis, in float32."""
    return jax.nn.softmax(scores.astype(jnp.float32), axis=-1)


def attention_weights(q_BKQTH: jax.Array, k_BKSH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Return float32 `weight_BKQTS` = softmax over S of the visible scores."""
    scores_BKQTS = jnp.einsum(
        "BKQTH,BKSH->BKQTS", q_BKQTH, k_BKSH, preferred_element_type=jnp.float32
    )
    return softmax(jnp.where(mask_BTS[:, None, None], scores_BKQTS, MASKED))


@jax.custom_vjp
def block_attention(q_BKQTH, k_BKSH, v_BKSH, mask_BTS):
    """Return `mix_BKQTH` = weight v, its gradient written out.

    As in FlashAttention (Dao et al. 2022, arXiv:2205.14135, appendix B.2) the gradient computes the
    weights again. Nothing of their size is transposed: on a CPU that costs more than the products.
    """
    return _block_attention_forward(q_BKQTH, k_BKSH, v_BKSH, mask_BTS)[0]


def _block_attention_forward(q_BKQTH, k_BKSH, v_BKSH, mask_BTS):
    weight_BKQTS = attention_weights(q_BKQTH, k_BKSH, mask_BTS).astype(v_BKSH.dtype)
    mix_BKQTH = jnp.einsum("BKQTS,BKSH->BKQTH", weight_BKQTS, v_BKSH)
    mix_BKQTH = checkpoint_name(mix_BKQTH, PRODUCT)
    return mix_BKQTH, (q_BKQTH, k_BKSH, v_BKSH, mask_BTS)


def _block_attention_backward(kept, d_mix_BKQTH):
    q_BKQTH, k_BKSH, v_BKSH, mask_BTS = kept
    weight_BKQTS = attention_weights(q_BKQTH, k_BKSH, mask_BTS)
    d_v_BKHS = jnp.einsum("BKQTH,BKQTS->BKHS", d_mix_BKQTH, weight_BKQTS.astype(v_BKSH.dtype))
    d_weight_BKQTS = jnp.einsum(
        "BKQTH,BKSH->BKQTS", d_mix_BKQTH, v_BKSH, preferred_element_type=jnp.float32
    )
    mean_BKQT1 = (weight_BKQTS * d_weight_BKQTS).sum(-1, keepdims=True)
    d_scores_BKQTS = (weight_BKQTS * (d_weight_BKQTS - mean_BKQT1)).astype(k_BKSH.dtype)
    d_q_BKQTH = jnp.einsum("BKQTS,BKSH->BKQTH", d_scores_BKQTS, k_BKSH)
    d_k_BKHS = jnp.einsum("BKQTH,BKQTS->BKHS", q_BKQTH, d_scores_BKQTS)
    return d_q_BKQTH, d_k_BKHS.swapaxes(2, 3), d_v_BKHS.swapaxes(2, 3), None


block_attention.defvjp(_block_attention_forward, _block_attention_backward)


@cache
def lora_axes(einsum: str) -> tuple[str, str, str, str, str]:
    """Return the axes (x, z, y, summed, kept) of x·a = z and z·b = y, where z ends in the rank R:
    "BTD,DNH->BTNH" gives ("BTD", "BTR", "BTNH", "D", "NH")."""
    inputs, y = einsum.split("->")
    x, w = inputs.split(",")
    summed = "".join(c for c in w if c not in y)
    kept = "".join(c for c in w if c in y)
    return x, "".join(c for c in x if c not in summed) + "R", y, summed, kept


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def lora_product(einsum: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Return (x·a)·b, its gradient written out: only what has the rank's width is transposed."""
    return _lora_product_forward(einsum, x, a, b)[0]


def _lora_product_forward(einsum: str, x, a, b):
    x_, z_, y_, summed, kept = lora_axes(einsum)
    z = checkpoint_name(jnp.einsum(f"{x_},{summed}R->{z_}", x, a), PRODUCT)
    return jnp.einsum(f"{z_},R{kept}->{y_}", z, b), (x, z, a, b)


def _lora_product_backward(einsum: str, inputs, d_y):
    x, z, a, b = inputs
    x_, z_, y_, summed, kept = lora_axes(einsum)
    d_z = jnp.einsum(f"{y_},R{kept}->{z_}", d_y, b)
    d_x = jnp.einsum(f"{z_},{summed}R->{x_}", d_z, a)
    d_a = jnp.moveaxis(jnp.einsum(f"{z_},{x_}->R{summed}", d_z, x), 0, -1)
    return d_x, d_a, jnp.einsum(f"{z_},{y_}->R{kept}", z, d_y)


lora_product.defvjp(_lora_product_forward, _lora_product_backward)
