"""What the kernels share: where they are interpreted, exact products of tiles, the running softmax.

Tiles are two-dimensional; a quantity per row is a column [rows, 1]. Letters inside a kernel are
those of the tile, not of the whole array.
"""

import jax
import jax.numpy as jnp

from gemma_cot.axes import platform
from gemma_cot.model.kernels.gradients import MASKED


def interpreted(interpret: bool | None) -> bool:
    """Return `interpret`, or when None whether this will run on anything but a TPU."""
    return platform() != "tpu" if interpret is None else interpret


def check_head_dim(head_dim: int, interpret: bool) -> None:
    """Raise ValueError when a TPU cannot hold a tile of this width (Gemma 3: 256, 27B: 128)."""
    if not interpret and head_dim % 128:
        raise ValueError(
            f"--attention=pallas: the head dimension must be a multiple of 128 on a TPU, got "
            f"{head_dim}; set --attention=reference"
        )


def product(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the float32 product of two matrices over axes `contract` = (of a, of b).

    float32 tiles are multiplied in full precision, bfloat16 tiles natively: exact products, summed
    in float32. Explicit, because the session's default precision must not reach a bfloat16 tile.
    """
    is_f32 = a.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if is_f32 else jax.lax.Precision.DEFAULT
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def columns_of(shape: tuple[int, int], first: jax.Array | int, axis: int = 1) -> jax.Array:
    """Return int32 indices first, first + 1, ... along `axis` of a tile."""
    return first + jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def grow_softmax(scores, seen, max_ref, sum_ref):
    """Take a tile of scores into the running (max, sum of exponentials) of its rows.

    Returns (e, shrink): exp(score - new max), 0 where not `seen`, and exp(old max - new max), by
    which every sum so far must be multiplied (Milakov & Gimelshein 2018, arXiv:1805.02867).
    """
    scores = jnp.where(seen, scores, MASKED)
    old = max_ref[...]
    new = jnp.maximum(old, scores.max(axis=1, keepdims=True))
    shrink = jnp.exp(old - new)
    e = jnp.where(seen, jnp.exp(scores - new), 0.0)
    max_ref[...] = new
    sum_ref[...] = shrink * sum_ref[...] + e.sum(axis=1, keepdims=True)
    return e, shrink
