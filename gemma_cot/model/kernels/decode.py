"""Attention of one new token per row over the shared prompt and its own tail, reading only the part
of either cache that the token may see.

One kernel, called on each part: R query rows over one sequence of keys, columns [low, high), giving
an unnormalised mix with its maximum and sum. On prompts R = G * Q, so the group reads its prompt
once; on tails R = Q, and a tail that runs over the ring's end is two parts. The softmaxes are then
joined. Equals `reference.decode_attention`; sampling takes no gradient, so there is none.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_cot.axes import MESH_AXES, per_device
from gemma_cot.model.kernels.tiles import (
    MASKED,
    check_head_dim,
    columns_of,
    grow_softmax,
    interpreted,
    product,
)

BLOCK = 256  # keys a tile


def decode_attention(
    q_BNH: jax.Array,
    prompt_k_PSKH: jax.Array,
    prompt_v_PSKH: jax.Array,
    tail_k_BSKH: jax.Array,
    tail_v_BSKH: jax.Array,
    start_P: jax.Array,
    clock: jax.Array | int,
    window: jax.Array | int | None = None,
    began_P: jax.Array | None = None,
    *,
    layer: jax.Array | int | None = None,
    block: int = BLOCK,
    interpret: bool | None = None,
) -> jax.Array:
    """Return `mix_BNH` of the new token of every row; row p * G + g belongs to prompt p; q scaled.

    With (m_i, z_i, a_i) the maximum, sum of exponentials and unnormalised mix of each part, and m
    the largest m_i: mix = sum_i e^(m_i - m) a_i / sum_i e^(m_i - m) z_i.
    layer: given, the four caches have L in front and this layer of them is read, in place. clock,
    window, began_P and layer may be traced; block, interpret (None: off TPU) are static. Raises
    ValueError for a head dimension that a TPU cannot tile.
    """
    caches = (prompt_k_PSKH, prompt_v_PSKH, tail_k_BSKH, tail_v_BSKH)
    if layer is None:
        caches, layer = tuple(x[None] for x in caches), 0
    static = (block, interpreted(interpret))
    check_head_dim(q_BNH.shape[2], static[1])
    began_P = jnp.zeros_like(start_P) if began_P is None else began_P
    everything = caches[0].shape[2] + caches[2].shape[2]
    scalars = (clock, everything if window is None else window, layer)
    letters = "BNH,LPSKH,LPSKH,LBSKH,LBSKH,P,P,,,->BNH"
    attend = per_device(partial(_attend, static), letters, axes=MESH_AXES)
    return attend(q_BNH, *caches, start_P, began_P, *(jnp.asarray(x, jnp.int32) for x in scalars))


def _attend(static, q_BNH, prompt_k, prompt_v, tail_k, tail_v, start_P, began_P, *scalars):
    """Attend over the parts of one layer of the caches [L, ...] and join their softmaxes."""
    clock, window, layer = scalars
    B, N, H = q_BNH.shape
    (_, P, width, K, _), ring = prompt_k.shape, tail_k.shape[2]
    G, Q = B // P, N // K
    token_P = clock - began_P
    low_P = jnp.clip(jnp.maximum(start_P, width + token_P - (window - 1)), 0, width)
    high_P = jnp.full((P,), width, jnp.int32)
    q_PKRH = q_BNH.reshape(P, G, K, Q, H).swapaxes(1, 2).reshape(P, K, G * Q, H)
    on_prompt = partial_attention(q_PKRH, prompt_k, prompt_v, layer, low_P, high_P, *static)
    parts = [
        tuple(x.reshape(P, K, G, Q, -1).swapaxes(1, 2).reshape(B, K, Q, -1) for x in on_prompt)
    ]
    now = clock % ring
    oldest_B = jnp.repeat(now - jnp.minimum(token_P, jnp.minimum(window, ring) - 1), G)
    to_now = jnp.maximum(oldest_B, 0), jnp.broadcast_to(now + 1, (B,))
    over_the_end = oldest_B % ring, jnp.where(oldest_B < 0, ring, 0)
    q_BKQH = q_BNH.reshape(B, K, Q, H)
    for low_B, high_B in (to_now, over_the_end):
        parts.append(partial_attention(q_BKQH, tail_k, tail_v, layer, low_B, high_B, *static))
    m = jnp.maximum(jnp.maximum(parts[0][0], parts[1][0]), parts[2][0])
    shrunk = [(jnp.exp(m_i - m), z_i, a_i) for m_i, z_i, a_i in parts]
    mix_BKQH = sum(w * a for w, _, a in shrunk) / sum(w * z for w, z, _ in shrunk)
    return mix_BKQH.reshape(B, N, H).astype(q_BNH.dtype)


def partial_attention(q_BKRH, k_LBSKH, v_LBSKH, layer, low_B, high_B, block: int, interpret: bool):
    """Return float32 (max_BKR1, sum_BKR1, mix_BKRH) of R queries over keys low_b <= s < high_b.

    Here R counts query rows. Nothing visible (low_b >= high_b): (MASKED, 0, 0).
    """
    B, K, R, H = q_BKRH.shape
    L, S = k_LBSKH.shape[0], k_LBSKH.shape[2]
    block = min(block, S)

    def queries_of(b, k, j, layer, low, high):
        return b, k, 0, 0

    def keys_of(b, k, j, layer, low, high):  # clamped to what is seen: a repeated tile is not read
        last = jax.lax.div(jnp.maximum(high[b] - 1, 0), block)
        return layer[0], b, jnp.clip(j, jnp.minimum(jax.lax.div(low[b], block), last), last), k

    def out(size):
        return pl.BlockSpec((1, 1, R, size), queries_of)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=3,
        grid=(B, K, pl.cdiv(S, block)),
        in_specs=[out(H), *[pl.BlockSpec((1, 1, block, H), keys_of)] * 2],
        out_specs=[out(1), out(1), out(H)],
    )
    return pl.pallas_call(
        _kernel,
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct((B, K, R, size), jnp.float32) for size in (1, 1, H)],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="decode_attention",
    )(layer[None], low_B, high_B, q_BKRH, *(x.reshape(L, B, S, K * H) for x in (k_LBSKH, v_LBSKH)))


def _kernel(layer_ref, low_ref, high_ref, q_ref, k_ref, v_ref, max_ref, sum_ref, mix_ref):
    b, j = pl.program_id(0), pl.program_id(2)
    low, high = low_ref[b], high_ref[b]
    block, H = k_ref.shape[2:]
    first = j * block

    @pl.when(j == 0)
    def begin():
        max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        mix_ref[...] = jnp.zeros(mix_ref.shape, jnp.float32)

    @pl.when((first < high) & (first + block > low))
    def take_tile():
        scores = product(q_ref[0, 0], k_ref[0, 0], (1, 1))
        s = columns_of(scores.shape, first)
        e, shrink = grow_softmax(
            scores, (s >= low) & (s < high), max_ref.at[0, 0], sum_ref.at[0, 0]
        )
        # Unwritten or beyond the edge lies anything, and 0 * anything must be 0.
        real = columns_of((block, H), first, axis=0) < high
        v = jnp.where(real, v_ref[0, 0], jnp.zeros((), v_ref.dtype))
        mix_ref[0, 0] = shrink * mix_ref[0, 0] + product(e.astype(v.dtype), v, (1, 0))
