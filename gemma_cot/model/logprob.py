"""Log-probabilities of given tokens: the one function behind policy, old and reference log-probs.

`logp_BT[b, t]` is the log-prob of token t given the tokens before it; the shift by one happens here
and nowhere else. Logits exist for one chunk of positions at a time, forward and backward.
"""

import jax
import jax.numpy as jnp

from gemma_cot.axes import round_up
from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import hidden_states, unembed
from gemma_cot.model.params import Params

CHUNK = 1024  # positions whose [C, V] logits exist at one time


def chosen_and_entropy(params: Params, x_CD: jax.Array, target_C: jax.Array, temperature: float):
    """Return (log p(target) [C], entropy in nats [C]) of softmax(logits / temperature)."""
    logits_CV = unembed(params, x_CD) / temperature
    log_z_C = jax.nn.logsumexp(logits_CV, axis=-1)
    chosen_C = jnp.take_along_axis(logits_CV, target_C[:, None], axis=-1)[:, 0]
    mean_CV = jax.nn.softmax(logits_CV, axis=-1) * logits_CV
    return chosen_C - log_z_C, log_z_C - mean_CV.sum(-1)


def logprobs_and_entropy(
    params: Params,
    cfg: ModelConfig,
    tokens_BT: jax.Array,
    start_B: jax.Array | None = None,
    lora=None,
    temperature: float = 1.0,
    *,
    first_column: int = 1,
    remat: bool = False,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """Return float32 (logp_BT, entropy_BT); columns before `first_column` (>= 1) are 0.

    first_column: the prompt's width, when only completion tokens matter: the unembedding, two
    thirds of Gemma 3 1B's smallest batches, then runs at completion positions only.
    chunk: positions per unembedding; each chunk is recomputed in the backward pass.
    """
    B, T = tokens_BT.shape
    x_BTD, _ = hidden_states(params, cfg, tokens_BT, start_B, lora, remat)
    x_ID = x_BTD[:, first_column - 1 : T - 1].reshape(-1, cfg.embed_dim)
    target_I = tokens_BT[:, first_column:].reshape(-1)
    rows = target_I.shape[0]
    chunk = max(1, min(chunk, rows))
    padding = round_up(rows, chunk) - rows
    x_ICD = jnp.pad(x_ID, ((0, padding), (0, 0))).reshape(-1, chunk, cfg.embed_dim)
    target_IC = jnp.pad(target_I, (0, padding)).reshape(-1, chunk)

    @jax.checkpoint
    def one_chunk(_, xs):
        return None, chosen_and_entropy(params, *xs, temperature)

    _, (logp, entropy) = jax.lax.scan(one_chunk, None, (x_ICD, target_IC))

    def to_BT(values):
        values = values.reshape(-1)[:rows].reshape(B, T - first_column)
        return jnp.pad(values, ((0, 0), (first_column, 0)))

    return to_BT(logp), to_BT(entropy)


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
