"""What every kernel of this room must compute: the model's own functions behind array-only
signatures, so that a kernel can be compared without parameters, a config or a cache.

Nothing is written a second time here: masks and attention come from `layers` and `cache`, the
log-prob from `gradients`. The kernels do not import this file, so that the model may call them.
"""

import jax
import jax.numpy as jnp

from gemma_cot.model.cache import Cache, decode_masks
from gemma_cot.model.kernels.gradients import logits_of, of_logits
from gemma_cot.model.kernels.layout import shared_attention
from gemma_cot.model.layers import attention, causal_mask


def prefill_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    start_B: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Return `mix_BTNH`: causal grouped-query attention of left-padded rows, S = T.

    Query t of row b sees key s when start_b <= s <= t and t - s < window (None: no window); q
    already carries the query scale. Queries before start_b see nothing: what is returned there is
    not part of the contract, except that it is finite.
    """
    T = q_BTNH.shape[1]
    mask_BTS = causal_mask(start_B, T, T if window is None else window)[0]
    return attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS)


def decode_attention(
    q_BNH: jax.Array,
    prompt_k_PSKH: jax.Array,
    prompt_v_PSKH: jax.Array,
    tail_k_BSKH: jax.Array,
    tail_v_BSKH: jax.Array,
    start_P: jax.Array,
    clock: jax.Array,
    window: int | None = None,
    began_P: jax.Array | None = None,
) -> jax.Array:
    """Return `mix_BNH`: attention of one new token of every row over its prompt and its tail.

    Row p * G + g belongs to prompt p and began at clock began_p (None: 0); its new token is number
    clock - began_p, in column clock mod S of the tail, a ring. It sees prompt columns from start_p
    on and its own tokens, those nearer than `window` if given.
    """
    began_P = jnp.zeros_like(start_P) if began_P is None else began_P
    parts = (prompt_k_PSKH, prompt_v_PSKH, tail_k_BSKH, tail_v_BSKH)
    cache = Cache(*((part[None],) for part in parts), start_P, began_P)
    prompt_2PS, tail_2PS = decode_masks(cache, clock, 1 if window is None else window)
    is_global = int(window is None)
    return shared_attention(q_BNH, *parts, (prompt_2PS[is_global], tail_2PS[is_global]))


def chosen_logprob(
    x_CD: jax.Array, embed_VD: jax.Array, target_C: jax.Array, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return float32 (log p(target) [C], entropy in nats [C]) of softmax(x embed^T / temperature).

    Holds the logits [C, V]: 1.0 GiB for 1,024 positions of Gemma 3.
    """
    return of_logits(logits_of(embed_VD, x_CD), target_C, temperature)
