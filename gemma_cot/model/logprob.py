"""Log-probabilities of given tokens: the one function behind policy, old and reference log-probs.

`logp_BT[b, t]` is the log-prob of token t given the tokens before it; the shift by one happens here
and nowhere else. Logits exist for one chunk of positions at a time and are computed once, also
where a gradient is wanted; with `cfg.logprob = "pallas"` only a tile of them, inside a kernel.
"""

import jax
import jax.numpy as jnp

from gemma_cot.axes import round_up
from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import group_states, hidden_states
from gemma_cot.model.kernels.gradients import chosen_once
from gemma_cot.model.kernels.logprob import chosen_logprob
from gemma_cot.model.params import Params

LOGITS_BYTES = 192 * 2**20  # what a device's float32 logits may take at one time
POSITIONS = 256  # a v5e then reads the embedding about as fast as it works


def chunk_of(cfg: ModelConfig, rows: int) -> int:
    """Return how many positions of each of `rows` rows (those of one device) have logits at one
    time: POSITIONS in all, fewer where LOGITS_BYTES has no room for so many."""
    return max(1, min(POSITIONS, LOGITS_BYTES // (4 * cfg.vocab_size)) // rows)


@jax.named_scope("unembed")
def by_chunks(params: Params, x_BTD, target_BT, temperature: float, chunk: int):
    """Return `chosen_once` of all positions, [B, chunk, V] logits existing at one time.

    Chunks are cut along T, so that rows stay on their devices.
    """
    B, T, D = x_BTD.shape
    chunk = max(1, min(chunk, T))
    padding = ((0, 0), (0, round_up(T, chunk) - T))
    x_BTD = jnp.pad(x_BTD, (*padding, (0, 0)))
    parts = x_BTD.reshape(B, -1, chunk, D), jnp.pad(target_BT, padding).reshape(B, -1, chunk)

    def one_chunk(_, xs):
        return None, chosen_once(params["embed"], *xs, temperature)

    _, both = jax.lax.scan(one_chunk, None, tuple(part.swapaxes(0, 1) for part in parts))
    return tuple(value.swapaxes(0, 1).reshape(B, -1)[:, :T] for value in both)


def by_kernel(params: Params, x_BTD, target_BT, temperature: float):
    """Return `chosen_logprob` of all positions, no logits in memory."""
    B, T, D = x_BTD.shape
    both = chosen_logprob(
        x_BTD.reshape(B * T, D), params["embed"], target_BT.reshape(-1), temperature
    )
    return tuple(value.reshape(B, T) for value in both)


def logprobs_and_entropy(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    temperature: float = 1.0,
    *,
    first_column: int = 1,
    group: int = 1,
    remat: str = "none",
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return float32 (logp_BT, entropy_BT); columns before `first_column` (>= 1) are 0.

    The entropy is for the log: it carries no gradient.
    first_column: the prompt's width, when only completion tokens matter: the unembedding, two
    thirds of Gemma 3 1B's smallest batches, then runs at completion positions only.
    group: so many rows in a row have the same prompt, of first_column columns, which is run once.
    chunk: positions of each row per unembedding; None: `chunk_of` these rows.
    """
    if group > 1:
        x_BTD = group_states(
            params, cfg, tokens_BT, start_B, lora, remat, width=first_column, group=group
        )
    else:
        x_BTD, _ = hidden_states(params, cfg, tokens_BT, start_B, lora, remat)
        x_BTD = x_BTD[:, first_column - 1 :]
    x_BTD, target_BT = x_BTD[:, :-1], tokens_BT[:, first_column:]
    if cfg.logprob == "pallas":
        both = by_kernel(params, x_BTD, target_BT, temperature)
    else:
        chunk = chunk or chunk_of(cfg, len(tokens_BT))
        both = by_chunks(params, x_BTD, target_BT, temperature, chunk)
    logp_BT, entropy_BT = (jnp.pad(value, ((0, 0), (first_column, 0))) for value in both)
    return logp_BT, jax.lax.stop_gradient(entropy_BT)


def token_logprobs(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    temperature: float = 1.0,
) -> jax.Array:
    """Return float32 `logp_BT`: log p(token t | tokens before t) at `temperature`; column 0: 0."""
    return logprobs_and_entropy(params, cfg, tokens_BT, start_B, lora, temperature)[0]
