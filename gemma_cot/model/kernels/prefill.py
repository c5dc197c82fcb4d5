"""Causal attention of whole rows, with window and left padding, without `[T, S]` scores in memory.

Grid (rows, key/value heads, tiles of queries, tiles of keys): the Q query heads of one key/value
head share each tile of keys, tiles that no query of a tile may see are neither read nor computed.
Equals `reference.prefill_attention` (Dao et al. 2022, arXiv:2205.14135). The backward pass is not
a kernel: it is that of `layers.attention`, whose scores exist for a block of queries at a time.
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
from gemma_cot.model.layers import attention, causal_mask

BLOCK = 256  # queries and keys a tile


def prefill_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_B: jax.Array,
    window: jax.Array | int | None = None,
    *,
    block: int = BLOCK,
    interpret: bool | None = None,
) -> jax.Array:
    """Return `mix_BTNH` in q's dtype; 0 for queries before start_b, which see nothing.

    softmax over {s : start_b <= s <= t, t - s < window} of q_t . k_s, times v_s; S = T, q already
    scaled. Differentiable in q, k, v. window may be traced; block, interpret (None: off TPU) are
    static. Raises ValueError for a head dimension that a TPU cannot tile.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    if T != S:
        raise ValueError(f"prefill_attention: queries and keys must be as many, got {T} and {S}")
    static = (min(block, T), interpreted(interpret))
    check_head_dim(q_BTNH.shape[3], static[1])
    window = jnp.asarray(T if window is None else window, jnp.int32)
    attend = per_device(partial(_attend, static), "BTNH,BSKH,BSKH,B,->BTNH", axes=MESH_AXES)
    return attend(q_BTNH, k_BSKH, v_BSKH, start_B.astype(jnp.int32), window)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, q_BTNH, k_BSKH, v_BSKH, start_B, window):
    block, interpret = static
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    width = N // K * H  # the query heads of one key/value head lie side by side
    tiles = pl.cdiv(T, block)

    def queries_of(b, k, i, j, start, window):
        return b, i, k

    def keys_of(b, k, i, j, start, window):  # clamped: a tile seen before is not read again
        oldest = jax.lax.div(jnp.maximum(i * block - window[0] + 1, 0), block)
        return b, jnp.clip(j, oldest, i), k

    queries = pl.BlockSpec((1, block, width), queries_of)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(B, K, tiles, tiles),
        in_specs=[queries, *[pl.BlockSpec((1, block, H), keys_of)] * 2],
        out_specs=queries,
        scratch_shapes=[
            pltpu.VMEM((N // K, block, 1), jnp.float32),
            pltpu.VMEM((N // K, block, 1), jnp.float32),
            pltpu.VMEM((N // K, block, H), jnp.float32),
        ],
    )
    rows = [x.reshape(B, T, -1) for x in (q_BTNH, k_BSKH, v_BSKH)]
    mix = pl.pallas_call(
        partial(_kernel, num_positions=T),
        grid_spec=grid,
        out_shape=jax.ShapeDtypeStruct((B, T, N * H), q_BTNH.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="prefill_attention",
    )(start_B, window[None], *rows)
    return mix.reshape(B, T, N, H)


def _kernel(
    start_ref, window_ref, q_ref, k_ref, v_ref, out_ref, max_ref, sum_ref, mix_ref, *, num_positions
):
    start, window = start_ref[pl.program_id(0)], window_ref[0]
    i, j = pl.program_id(2), pl.program_id(3)
    Q, block, H = mix_ref.shape

    @pl.when(j == 0)
    def begin():
        max_ref[...] = jnp.full(max_ref.shape, MASKED, jnp.float32)
        sum_ref[...] = jnp.zeros(sum_ref.shape, jnp.float32)
        mix_ref[...] = jnp.zeros(mix_ref.shape, jnp.float32)

    first_key, past_key = j * block, (j + 1) * block
    sees = (j <= i) & (past_key > i * block - window + 1) & (past_key > start)

    @pl.when(sees)
    def take_tile():
        s = columns_of((block, block), first_key)
        t = columns_of((block, block), i * block, axis=0)
        seen = (s <= t) & (t - s < window) & (s >= start) & (s < num_positions)
        # Past the last column lies anything, and 0 * anything must be 0.
        real = columns_of((block, H), first_key, axis=0) < num_positions
        v = jnp.where(real, v_ref[0], jnp.zeros((), v_ref.dtype))
        for h in range(Q):
            scores = product(q_ref[0, :, h * H : (h + 1) * H], k_ref[0], (1, 1))
            e, shrink = grow_softmax(scores, seen, max_ref.at[h], sum_ref.at[h])
            mix_ref[h] = shrink * mix_ref[h] + product(e.astype(v.dtype), v, (1, 0))

    @pl.when(j == pl.num_programs(3) - 1)
    def finish():
        for h in range(Q):
            total = jnp.where(sum_ref[h] == 0.0, 1.0, sum_ref[h])
            out_ref[0, :, h * H : (h + 1) * H] = (mix_ref[h] / total).astype(out_ref.dtype)


def _attend_fwd(static, *arguments):
    return _attend(static, *arguments), arguments


def _attend_bwd(static, saved, g_BTNH):
    *qkv, start_B, window = saved
    T = g_BTNH.shape[1]
    mask_BTS = causal_mask(start_B, T, window)[0]
    real_BT = jnp.arange(T)[None, :] >= start_B[:, None]
    g_BTNH = jnp.where(real_BT[:, :, None, None], g_BTNH, jnp.zeros((), g_BTNH.dtype))
    _, pull_back = jax.vjp(lambda q, k, v: attention(q, k, v, mask_BTS), *qkv)
    return *pull_back(g_BTNH), None, None


_attend.defvjp(_attend_fwd, _attend_bwd)
