"""Unembedding and log-prob of the chosen token in one kernel: `[C, V]` logits exist nowhere, only
one tile of them in fast memory, forward and backward.

Grid (tiles of positions, tiles of the vocabulary): each row keeps a running max, a running sum of
exponentials, the sum for its entropy and its chosen logit. Knows no model; equals
`reference.chosen_logprob`. Gradients for x and for the embedding are kernels too.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gemma_cot.axes import MESH_AXES, per_device, round_up
from gemma_cot.model.kernels.tiles import (
    MASKED,
    columns_of,
    grow_softmax,
    interpreted,
    product,
)

# A tile of positions reads the whole embedding once: at 512 a v5e is bound by its matrix unit.
BLOCK_C, BLOCK_V = 512, 512
TILE_BYTES = 8 * 2**20  # a wider model gets shorter tiles, for all of them must fit at once


def chosen_logprob(
    x_CD: jax.Array,
    embed_VD: jax.Array,
    target_C: jax.Array,
    temperature: float = 1.0,
    *,
    block_C: int = BLOCK_C,
    block_V: int = BLOCK_V,
    interpret: bool | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return float32 (log p(target) [C], entropy in nats [C]) of softmax(x embed^T / temperature).

    With l the logits of a row, m their maximum, z = sum_v e^(l_v - m), u = sum_v (l_v - m)
    e^(l_v - m), all three kept while running over the vocabulary:
        log p(y) = l_y - m - log z        entropy = log z - u / z
    Differentiable in x and embed; the gradient of an unused embedding costs nothing under `jit`.
    temperature, blocks, interpret (None: off TPU) are static. Targets outside [0, V) are undefined.
    """
    static = (float(temperature), block_C, block_V, interpreted(interpret))
    kernel = per_device(partial(_padded, static), "CD,VD,C->C,C", axes=MESH_AXES)
    return kernel(x_CD, embed_VD, target_C)


def _padded(static, x_CD, embed_VD, target_C):
    """Pad the rows to whole tiles and run the kernel on them."""
    C, D = x_CD.shape
    temperature, block_C, block_V, interpret = static
    longest = TILE_BYTES // (D * x_CD.dtype.itemsize) // 128 * 128
    rows = max(C, 1)
    block_C = min(block_C, longest, round_up(rows, 16))
    static = (temperature, block_C, min(block_V, longest), interpret)
    padding = round_up(rows, block_C) - C
    x_CD = jnp.pad(x_CD, ((0, padding), (0, 0)))
    target_C1 = jnp.pad(target_C.astype(jnp.int32), (0, padding))[:, None]
    logp_C1, entropy_C1 = _chosen(x_CD, embed_VD, target_C1, static)
    return logp_C1[:C, 0], entropy_C1[:C, 0]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _chosen(x_CD, embed_VD, target_C1, static):
    return _forward(x_CD, embed_VD, target_C1, static)[:2]


def _chosen_fwd(x_CD, embed_VD, target_C1, static):
    logp_C1, entropy_C1, log_z_C1 = _forward(x_CD, embed_VD, target_C1, static)
    return (logp_C1, entropy_C1), (x_CD, embed_VD, target_C1, log_z_C1, entropy_C1)


def _chosen_bwd(static, saved, cotangents):
    x_CD, embed_VD, *rest_C1 = saved
    rows_C1 = (*rest_C1, *cotangents)
    d_x_CD = _backward(_grad_x_kernel, 0, x_CD, embed_VD, rows_C1, static)
    d_embed_VD = _backward(_grad_embed_kernel, 1, x_CD, embed_VD, rows_C1, static)
    return d_x_CD, d_embed_VD, None


_chosen.defvjp(_chosen_fwd, _chosen_bwd)


def _forward(x_CD, embed_VD, target_C1, static):
    """Return (logp_C1, entropy_C1, log_z_C1) of padded rows."""
    temperature, c, v, interpret = static
    (C, D), V = x_CD.shape, embed_VD.shape[0]
    v = min(v, V)
    column = pl.BlockSpec((c, 1), lambda i, j: (i, 0))
    return pl.pallas_call(
        partial(_forward_kernel, temperature=temperature, num_tokens=V),
        grid=(C // c, pl.cdiv(V, v)),
        in_specs=[
            pl.BlockSpec((c, D), lambda i, j: (i, 0)),
            pl.BlockSpec((v, D), lambda i, j: (j, 0)),
            column,
        ],
        out_specs=[column] * 3,
        out_shape=[jax.ShapeDtypeStruct((C, 1), jnp.float32)] * 3,
        scratch_shapes=[pltpu.VMEM((c, 1), jnp.float32)] * 4,
        compiler_params=_PARAMS,
        interpret=interpret,
        name="chosen_logprob",
    )(x_CD, embed_VD, target_C1)


def _forward_kernel(
    x_ref, embed_ref, target_ref, logp_ref, entropy_ref, log_z_ref, m_ref, z_ref, u_ref, y_ref,
    *, temperature, num_tokens,
):  # fmt: skip
    j = pl.program_id(1)

    @pl.when(j == 0)
    def start():
        m_ref[...] = jnp.full(m_ref.shape, MASKED, jnp.float32)
        for ref in (z_ref, u_ref, y_ref):
            ref[...] = jnp.zeros(ref.shape, jnp.float32)

    logits = product(x_ref[...], embed_ref[...], (1, 1)) / temperature
    token = columns_of(logits.shape, j * logits.shape[1])
    old_m, old_z = m_ref[...], z_ref[...]
    e, shrink = grow_softmax(logits, token < num_tokens, m_ref, z_ref)
    above = jnp.where(token < num_tokens, logits - m_ref[...], 0.0)
    moved = u_ref[...] + old_z * (old_m - m_ref[...])  # u is about the maximum, which rose
    u_ref[...] = shrink * moved + (e * above).sum(axis=1, keepdims=True)
    is_target = token == target_ref[...]
    y_ref[...] += jnp.where(is_target, logits, 0.0).sum(axis=1, keepdims=True)

    @pl.when(j == pl.num_programs(1) - 1)
    def finish():
        log_z = jnp.log(z_ref[...])
        logp_ref[...] = y_ref[...] - m_ref[...] - log_z
        entropy_ref[...] = log_z - u_ref[...] / z_ref[...]
        log_z_ref[...] = m_ref[...] + log_z


def _backward(kernel, axis, x_CD, embed_VD, rows_C1, static):
    """Return the gradient of argument `axis` (0 x, 1 embed); the other axis' tiles are summed."""
    temperature, c, v, interpret = static
    (C, D), V = x_CD.shape, embed_VD.shape[0]
    v = min(v, V)
    tiles = (C // c, pl.cdiv(V, v))
    grid = tiles if axis == 0 else tiles[::-1]
    of_c = (lambda i, j: (i, 0)) if axis == 0 else (lambda i, j: (j, 0))
    of_v = (lambda i, j: (j, 0)) if axis == 0 else (lambda i, j: (i, 0))
    out, rows, of_out = ((x_CD, c, of_c), (embed_VD, v, of_v))[axis]
    return pl.pallas_call(
        partial(kernel, temperature=temperature, num_tokens=V),
        grid=grid,
        in_specs=[
            pl.BlockSpec((c, D), of_c),
            pl.BlockSpec((v, D), of_v),
            *[pl.BlockSpec((c, 1), of_c)] * len(rows_C1),
        ],
        out_specs=pl.BlockSpec((rows, D), of_out),
        out_shape=jax.ShapeDtypeStruct(out.shape, out.dtype),
        scratch_shapes=[pltpu.VMEM((rows, D), jnp.float32)],
        compiler_params=_PARAMS,
        interpret=interpret,
        name=f"chosen_logprob_grad_{('x', 'embed')[axis]}",
    )(x_CD, embed_VD, *rows_C1)


def _grad_logits(x, embed, rows, first, temperature, num_tokens):
    """Return the cotangent of a tile of x embed^T, 0 outside the vocabulary.

    d log p(y) / d l_v = 1[v = y] - p_v        d entropy / d l_v = -p_v (log p_v + entropy)
    """
    target, log_z, entropy, g_logp, g_entropy = (ref[...] for ref in rows)
    logits = product(x, embed, (1, 1)) / temperature
    token = columns_of(logits.shape, first)
    logp = jnp.where(token < num_tokens, logits - log_z, MASKED)
    p = jnp.exp(logp)
    g = jnp.where(token == target, g_logp, 0.0) - p * g_logp
    g = g - jnp.where(token < num_tokens, g_entropy * p * (logp + entropy), 0.0)
    return g / temperature


def _grad_x_kernel(x_ref, embed_ref, *refs, temperature, num_tokens):
    *rows, out_ref, sum_ref = refs
    j = pl.program_id(1)
    first = j * embed_ref.shape[0]
    # The last tile hangs over the vocabulary's edge: 0 * whatever lies there must be 0.
    token = columns_of(embed_ref.shape, first, axis=0)
    embed = jnp.where(token < num_tokens, embed_ref[...], jnp.zeros((), embed_ref.dtype))
    g = _grad_logits(x_ref[...], embed, rows, first, temperature, num_tokens)
    _accumulate(j, product(g.astype(embed.dtype), embed, (1, 0)), out_ref, sum_ref)


def _grad_embed_kernel(x_ref, embed_ref, *refs, temperature, num_tokens):
    *rows, out_ref, sum_ref = refs
    first = pl.program_id(0) * embed_ref.shape[0]
    x = x_ref[...]
    g = _grad_logits(x, embed_ref[...], rows, first, temperature, num_tokens)
    _accumulate(pl.program_id(1), product(g.astype(x.dtype), x, (0, 0)), out_ref, sum_ref)


def _accumulate(j, tile, out_ref, sum_ref):
    @pl.when(j == 0)
    def start():
        sum_ref[...] = tile

    @pl.when(j > 0)
    def add():
        sum_ref[...] += tile

    @pl.when(j == pl.num_programs(1) - 1)
    def finish():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


# 16 MiB is the compiler's habit, 128 MiB what a v5e has: room for float32 and the wider models.
_PARAMS = pltpu.CompilerParams(
    dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=96 * 2**20
)
