"""How weights and caches lie in memory while decoding: on a TPU all layers in one stack, elsewhere
each by itself; and attention of one new token per row in plain jnp, for either.

On a CPU and on a GPU XLA copies a layer out of a stack of layers every time it is used, on a CPU a
factor that is in another order too; when decoding, that costs more than the products. And few large
products cost less there than many small ones.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.axes import platform, shape_of
from gemma_cot.config import ModelConfig
from gemma_cot.model.kernels.gradients import MASKED, lora_axes
from gemma_cot.model.params import LAYER_TABLE

TOGETHER = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))  # weights that meet the same x


def by_layer(cfg: ModelConfig) -> bool:
    """Return whether decoding holds every layer by itself: not on a TPU, nor for kernels, nor where
    the compiler cuts weights along `model` (what is joined would be gathered again each token)."""
    is_cut = jax.sharding.get_abstract_mesh().shape.get("model", 1) > 1
    return platform() != "tpu" and cfg.attention != "pallas" and not is_cut


def few_rows() -> Callable:
    """Return the einsum of few rows with a weight whose summed axes are last."""
    return weight_first if platform() == "cpu" else jnp.einsum


def weight_first(einsum: str, x: jax.Array, w: jax.Array, **options) -> jax.Array:
    """Return einsum(x, w) of a weight whose summed axes are last, e.g. "BI,OI->BO".

    For few rows on a CPU, where XLA orders the second factor of a product anew each time: here it
    is x, and the weight is read once, as it lies.
    """
    _, _, _, summed, kept = lora_axes(einsum)
    size = math.prod(w.shape[len(kept) :])
    y_OB = jnp.matmul(w.reshape(-1, size), x.reshape(-1, size).T, **options)
    y_OB = jax.lax.optimization_barrier(y_OB)  # or XLA exchanges the factors again
    return y_OB.T.reshape(*x.shape[: -len(summed)], *w.shape[: len(kept)])


def joined(layers: dict, adapters: dict | None) -> tuple[dict, dict]:
    """Return stacked layers in which weights that meet the same x are one matrix, "qkv" for three,
    and of each such matrix that has adapters their b.

    A matrix is [L, O, I], I being what is summed over. Its rows: those of each weight, then of each
    adapter's a, so that one product gives both; b is block-diagonal, [L, rows of a, O of weights].
    """
    layers, b = dict(layers), {}
    for names in TOGETHER:
        weights = [rows_of(name, layers.pop(name)) for name in names]
        sizes = [w.shape[1] for w in weights]
        pairs = {i: adapters[name] for i, name in enumerate(names) if name in (adapters or {})}
        weights += [rows_of(names[i], pair["a"]) for i, pair in pairs.items()]
        layers["".join(names)] = jnp.concatenate(weights, axis=1)
        if pairs:
            blocks = [among(pair["b"], sizes[:i], sizes[i + 1 :]) for i, pair in pairs.items()]
            b["".join(names)] = jnp.concatenate(blocks, axis=1)
    return layers, b


def rows_of(name: str, x: jax.Array) -> jax.Array:
    """Return a stacked weight, or its adapter's a, as [L, O, I], I being what is summed over."""
    summed = len(LAYER_TABLE[name].fan_in)
    return x.reshape(len(x), math.prod(x.shape[1 : 1 + summed]), -1).swapaxes(1, 2)


def among(b: jax.Array, before: list[int], behind: list[int]) -> jax.Array:
    """Return an adapter's stacked b as [L, R, O], zeros for the weights beside its own."""
    zeros = (0, 0), (0, 0), (sum(before), sum(behind))
    return jnp.pad(b.reshape(*b.shape[:2], -1), zeros)


def all_at_once(cfg: ModelConfig, layer: dict, b: dict, scale: float, x, *names: str) -> tuple:
    """Return `layers.each_by_itself` of a layer of `joined`, in one product for all names."""
    kept = [LAYER_TABLE[name].adapter_letters[1].removeprefix("LR") for name in names]
    shapes = [shape_of(letters, cfg.sizes) for letters in kept]
    ends = np.cumsum([math.prod(shape) for shape in shapes])
    w_OI, b_RO = layer["".join(names)], b.get("".join(names))
    y_BO = few_rows()("BI,OI->BO", x.reshape(-1, w_OI.shape[1]), w_OI)
    y_BO, z_BR = jnp.split(y_BO, ends[-1:], axis=1)
    if b_RO is not None:
        y_BO = y_BO + scale * (z_BR @ b_RO)
    parts = jnp.split(y_BO, ends[:-1], axis=1)
    return tuple(
        part.reshape(*x.shape[:2], *shape) for part, shape in zip(parts, shapes, strict=True)
    )


def stored(cfg: ModelConfig, kv_LBSKH: tuple[jax.Array, jax.Array]) -> tuple[tuple, tuple]:
    """Return keys and values of all layers as a `Cache` holds them."""
    if not by_layer(cfg):
        return tuple((x,) for x in kv_LBSKH)
    k_LBKHS, v_LBKSH = kv_LBSKH[0].transpose(0, 1, 3, 4, 2), kv_LBSKH[1].swapaxes(2, 3)
    L = len(k_LBKHS)
    return tuple(tuple(x.reshape(L, -1, *x.shape[3:])) for x in (k_LBKHS, v_LBKSH))


def lengthen(k: jax.Array, v: jax.Array, more: int) -> tuple:
    """Return the tails (k, v) with `more` columns at their end."""
    k_axis, v_axis = (2, 2) if k.ndim == 5 else (2, 1)
    return tuple(
        jnp.pad(x, [(0, more * (i == axis)) for i in range(x.ndim)])
        for x, axis in ((k, k_axis), (v, v_axis))
    )


def write(k: jax.Array, v: jax.Array, new_k_BTKH, new_v_BTKH, column, layer: int) -> tuple:
    """Return the tails (k, v) with the keys and values of one token, T = 1, in `column`."""
    update = jax.lax.dynamic_update_slice
    if k.ndim == 5:
        at = (layer, 0, column, 0, 0)
        return update(k, new_k_BTKH[None], at), update(v, new_v_BTKH[None], at)
    (rows, H, _), zero = k.shape, jnp.zeros_like(column)
    k = update(k, new_k_BTKH.reshape(rows, H, 1), (zero, zero, column))
    return k, update(v, new_v_BTKH.reshape(rows, 1, H), (zero, column, zero))


def scores_of(q_BKRH: jax.Array, k: jax.Array) -> jax.Array:
    """Return float32 `scores_BKRS` of R queries over the keys of a layer of a cache."""
    if k.ndim == 4:
        return jnp.einsum("BKRH,BSKH->BKRS", q_BKRH, k, preferred_element_type=jnp.float32)
    (B, K, R, H), S = q_BKRH.shape, k.shape[2]
    q, f32 = q_BKRH.reshape(B * K, R, H), jnp.float32
    return jnp.matmul(q, k, preferred_element_type=f32).reshape(B, K, R, S)


def mix_of(w_BKRS: jax.Array, v: jax.Array) -> jax.Array:
    """Return `mix_BKRH`, the values of a layer of a cache weighted."""
    if v.ndim == 4:
        return jnp.einsum("BKRS,BSKH->BKRH", w_BKRS, v)
    B, K, R, S = w_BKRS.shape
    return (w_BKRS.reshape(B * K, R, S) @ v).reshape(B, K, R, -1)


def shared_attention(q_BNH, prompt_k, prompt_v, tail_k, tail_v, masks):
    """Return attention of one query per row over its prompt's cache and its own tail, `mix_BNH`.

    One softmax over both parts; the prompt's keys are read once for all G rows of the prompt (here
    R counts its G * Q queries, *_prompt are [P, K, R, S], *_tail [B, K, Q, S]).
    """
    prompt_PS, tail_PS = masks
    (B, N, H), P = q_BNH.shape, len(prompt_PS)
    K = prompt_k.shape[2] if prompt_k.ndim == 4 else len(prompt_k) // P
    G, Q = B // P, N // K

    def of_prompts(x_BKQ):
        return x_BKQ.reshape(P, G, K, Q, -1).swapaxes(1, 2).reshape(P, K, G * Q, -1)

    def of_rows(x_PKR):
        return x_PKR.reshape(P, K, G, Q, -1).swapaxes(1, 2).reshape(B, K, Q, -1)

    q_BKQH = q_BNH.reshape(B, K, Q, H)
    seen_PKRS, seen_BKQS = prompt_PS[:, None, None], jnp.repeat(tail_PS, G, axis=0)[:, None, None]
    on_prompt = jnp.where(seen_PKRS, scores_of(of_prompts(q_BKQH), prompt_k), MASKED)
    on_tail = jnp.where(seen_BKQS, scores_of(q_BKQH, tail_k), MASKED)
    if platform() == "gpu":  # one softmax, which is one kernel there
        w_BKQS = jax.nn.softmax(jnp.concatenate([of_rows(on_prompt), on_tail], axis=-1), axis=-1)
        w_prompt, w_tail = jnp.split(w_BKQS.astype(q_BNH.dtype), on_prompt.shape[-1:], axis=-1)
        w_prompt = of_prompts(w_prompt)
    else:  # the softmax of both parts side by side, which are never put side by side
        top_BKQ1 = jnp.maximum(of_rows(on_prompt.max(-1)), on_tail.max(-1, keepdims=True))
        e_prompt, e_tail = jnp.exp(on_prompt - of_prompts(top_BKQ1)), jnp.exp(on_tail - top_BKQ1)
        total_BKQ1 = of_rows(e_prompt.sum(-1)) + e_tail.sum(-1, keepdims=True)
        w_prompt = (e_prompt / of_prompts(total_BKQ1)).astype(q_BNH.dtype)
        w_tail = (e_tail / total_BKQ1).astype(q_BNH.dtype)
    return (of_rows(mix_of(w_prompt, prompt_v)) + mix_of(w_tail, tail_v)).reshape(B, N, H)
