"""Sampling: prefill each prompt once, fan its cache out to G completions, decode in one while-loop.

Every draw is a function of (key, prompt, completion index, position) and of nothing else: not of
the batch's layout, its size, or the number of devices. Stop tokens are looked at here and become
`completion_mask_BT`; nobody after this compares token values again.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.config import ModelConfig
from gemma_cot.model.cache import decode_step, prefill
from gemma_cot.model.params import Params


@flax.struct.dataclass
class Samples:
    """What sampling returns. Row p * G + g is completion g of prompt p; T = prompt + completion."""

    tokens_BT: jax.Array  # int32; left-padded prompt, then the completion, then zeros
    completion_mask_BT: jax.Array  # bool; True on completion tokens up to and including the stop
    logp_BT: jax.Array  # float32; log-prob at the sampling temperature, 0 outside the mask
    start_B: jax.Array  # int32; first real column
    stopped_B: jax.Array  # bool; False = truncated by max_new_tokens


def prompt_hash(tokens_PT: jax.Array, start_P: jax.Array) -> jax.Array:
    """Return a uint32 per prompt that depends on its real tokens only, not on its padding."""
    T = tokens_PT.shape[1]
    powers = [1]
    for _ in range(T - 1):
        powers.append(powers[-1] * 1_000_003 % 2**32)
    power_T = jnp.asarray(np.array(powers[::-1], np.uint32))
    real_PT = jnp.arange(T)[None, :] >= start_P[:, None]
    term_PT = (tokens_PT.astype(jnp.uint32) + jnp.uint32(1)) * power_T[None, :]
    return jnp.where(real_PT, term_PT, jnp.uint32(0)).sum(axis=1, dtype=jnp.uint32)


def draw(logits_BV: jax.Array, key_B: jax.Array, temperature: float) -> tuple:
    """Draw one token a row by inverting the CDF with a single uniform; temperature 0 is argmax.

    Returns (token_B int32, logp_B float32 at `temperature`, or at 1 when greedy).
    """
    scaled_BV = logits_BV / (temperature or 1.0)
    logp_BV = jax.nn.log_softmax(scaled_BV, axis=-1)
    if temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        cdf_BV = jnp.cumsum(jnp.exp(logp_BV), axis=-1)
        total_B = cdf_BV[:, -1]
        u_B = jax.vmap(jax.random.uniform)(key_B) * total_B
        # below the total even after rounding, so that the token found has positive probability
        u_B = jnp.minimum(u_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
        token_B = jnp.sum(cdf_BV <= u_B[:, None], axis=-1)
    token_B = token_B.astype(jnp.int32)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


def row_keys(key: jax.Array, prompt_P: jax.Array, num_completions: int) -> jax.Array:
    """Return `key_B`: key folded with the prompt's number, then with the completion's index."""
    key_P = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_P)
    group = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(group, (0, None))(key_P, jnp.arange(num_completions)).reshape(-1)


def record_token(step, logits_BV, done_B, out, *, key_B, temperature: float, stop_ids: tuple):
    """Draw token `step` of every row and write it into `out` = (tokens, logp, mask).

    Rows that are done emit 0. Returns (token_B, done_B, out); a row is done after its stop token.
    """
    tokens, logp, mask = out
    key_now_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, step)
    token_B, logp_B = draw(logits_BV, key_now_B, temperature)
    token_B = jnp.where(done_B, 0, token_B)
    tokens = tokens.at[:, step].set(token_B)
    logp = logp.at[:, step].set(jnp.where(done_B, 0.0, logp_B))
    mask = mask.at[:, step].set(~done_B)
    stop_S = jnp.asarray(stop_ids, jnp.int32)
    done_B = done_B | (token_B[:, None] == stop_S[None, :]).any(-1)
    return token_B, done_B, (tokens, logp, mask)


@partial(
    jax.jit,
    static_argnames=("cfg", "num_completions", "max_new_tokens", "temperature", "stop_ids"),
)
def sample(
    params: Params,
    cfg: ModelConfig,
    tokens_PT: jax.Array,
    start_P: jax.Array,
    key: jax.Array,
    *,
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
    lora=None,
    prompt_id_P: jax.Array | None = None,
) -> Samples:
    """Sample `num_completions` completions of every left-padded prompt, stopping at any stop id.

    prompt_id_P: the number each prompt's draws are keyed by; by default a hash of its tokens (so
    that equal prompts in one batch get equal completions).
    """
    P, width = tokens_PT.shape
    B = P * num_completions
    prompt_id_P = prompt_hash(tokens_PT, start_P) if prompt_id_P is None else prompt_id_P
    key_B = row_keys(key, prompt_id_P, num_completions)
    logits_PV, cache = prefill(
        params, cfg, tokens_PT, start_P, lora, num_completions, max_new_tokens
    )

    record = partial(record_token, key_B=key_B, temperature=temperature, stop_ids=stop_ids)

    def unfinished(carry):
        step, _, done_B, _, _ = carry
        return (step < max_new_tokens) & ~done_B.all()

    def body(carry):
        step, token_B, done_B, cache, out = carry
        logits_BV, cache = decode_step(params, cfg, token_B, step - 1, cache, lora)
        token_B, done_B, out = record(step, logits_BV, done_B, out)
        return step + 1, token_B, done_B, cache, out

    out = (
        jnp.zeros((B, max_new_tokens), jnp.int32),
        jnp.zeros((B, max_new_tokens), jnp.float32),
        jnp.zeros((B, max_new_tokens), bool),
    )
    first_logits_BV = jnp.repeat(logits_PV, num_completions, axis=0)
    token_B, done_B, out = record(0, first_logits_BV, jnp.zeros((B,), bool), out)
    carry = (jnp.int32(1), token_B, done_B, cache, out)
    _, _, done_B, _, (tokens, logp, mask) = jax.lax.while_loop(unfinished, body, carry)

    prompt_BT = jnp.repeat(tokens_PT.astype(jnp.int32), num_completions, axis=0)
    before = ((0, 0), (width, 0))
    return Samples(
        tokens_BT=jnp.concatenate([prompt_BT, tokens], axis=1),
        completion_mask_BT=jnp.pad(mask, before),
        logp_BT=jnp.pad(logp, before),
        start_B=jnp.repeat(start_P, num_completions).astype(jnp.int32),
        stopped_B=done_B,
    )
