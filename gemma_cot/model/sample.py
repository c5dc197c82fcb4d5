"""Sampling: prefill each prompt once, share its cache among G completions, decode in a while-loop.

Every draw is a function of (key, prompt, completion index, position) and of nothing else: not of
the batch's layout, its size, or the number of devices. Each device runs a loop of its own on its
own rows, so devices never wait for each other. With fewer slots than rows, a slot whose row has
ended takes the next row of the queue inside the compiled loop (continuous batching, Yu et al. 2022,
"Orca"). Stop tokens are looked at here and become `completion_mask_BT`; nobody after this compares
token values again.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.axes import on_any_device, per_device, round_up
from gemma_cot.config import ModelConfig
from gemma_cot.model.cache import Cache, decode_step, decode_weights, new_cache, prefill, widen
from gemma_cot.model.kernels.layout import stored
from gemma_cot.model.params import Params

REFILL_SHARE = 8  # rows that wait are let in when at least 1/8 of the slots are idle
PART = 128  # tokens of the vocabulary whose probabilities are first summed
TAIL_STEP = 128  # rows that all begin at once have tails that grow by this many columns


@flax.struct.dataclass
class Samples:
    """What sampling returns. Row p * G + g is completion g of prompt p; T = prompt + completion."""

    tokens_BT: jax.Array  # int32; left-padded prompt, then the completion, then zeros
    completion_mask_BT: jax.Array  # bool; True on completion tokens up to and including the stop
    logp_BT: jax.Array  # float32; log-prob at the sampling temperature, 0 outside the mask
    start_B: jax.Array  # int32; first real column
    stopped_B: jax.Array  # bool; False = truncated by max_new_tokens
    useful_B: jax.Array  # float32; share of its device's decoding that went into unfinished rows


@flax.struct.dataclass
class Queue:
    """The N rows a device is to sample, row p * G + g being completion g of prompt p."""

    key_N: jax.Array  # of each row's draws
    logits_PV: jax.Array  # of each prompt's next token
    kv_LPSKH: tuple[jax.Array, jax.Array]  # keys and values of each prompt
    start_P: jax.Array  # first real column of each prompt


@flax.struct.dataclass
class Loop:
    """The state of a device's loop: B slots, and N rows of output."""

    clock: jax.Array  # decode steps done, int32
    next_row: jax.Array  # rows that have begun, int32
    row_B: jax.Array  # the row that each slot works on, int32
    began_B: jax.Array  # clock at which it began, int32
    done_B: jax.Array  # bool; the slot is idle: its row has ended, or none has begun
    token_B: jax.Array  # the last token drawn, int32
    cache: Cache
    tokens_NT: jax.Array  # int32; completion tokens of every row, then zeros
    logp_NT: jax.Array  # float32
    length_N: jax.Array  # int32; completion tokens, the stop token included
    stopped_N: jax.Array  # bool


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


@jax.named_scope("draw")
def draw(logits_BV: jax.Array, key_B: jax.Array, temperature: float) -> tuple:
    """Draw one token a row by inverting the CDF with a single uniform; temperature 0 is argmax.

    The CDF of the parts of the vocabulary says in which part, its own CDF where in the part (here C
    counts the tokens of a part). Returns (token_B int32, logp_B float32 at `temperature`, or at 1
    when greedy).
    """
    B, V = logits_BV.shape
    scaled_BV = logits_BV / (temperature or 1.0)
    top_B1 = scaled_BV.max(axis=-1, keepdims=True)
    e_BV = jnp.exp(scaled_BV - top_B1)
    more = round_up(V, PART) - V
    part_cdf = jnp.cumsum(jnp.pad(e_BV, ((0, 0), (0, more))).reshape(B, -1, PART).sum(-1), axis=-1)
    total_B1 = part_cdf[:, -1:]
    if temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1)
    else:
        u_B1 = jax.vmap(jax.random.uniform)(key_B)[:, None] * total_B1
        part_B1 = count_up_to(part_cdf, u_B1)
        before_B1 = jnp.take_along_axis(jnp.pad(part_cdf, ((0, 0), (1, 0))), part_B1, axis=-1)
        column_BC = part_B1 * PART + jnp.arange(PART)[None, :]
        e_BC = jnp.take_along_axis(e_BV, column_BC, axis=-1, mode="fill", fill_value=0)
        in_part = count_up_to(jnp.cumsum(e_BC, axis=-1), u_B1 - before_B1)
        token_B = (part_B1 * PART + in_part)[:, 0]
    token_B = token_B.astype(jnp.int32)
    logp_BV = scaled_BV - top_B1 - jnp.log(total_B1)
    return token_B, jnp.take_along_axis(logp_BV, token_B[:, None], axis=-1)[:, 0]


def count_up_to(cdf_BC: jax.Array, u_B1: jax.Array) -> jax.Array:
    """Return how many entries of each row are at most u: the index of the first above u, whose
    probability is positive. u is kept below the last entry, even after rounding."""
    last_B1 = cdf_BC[:, -1:]
    u_B1 = jnp.minimum(u_B1, jnp.nextafter(last_B1, jnp.zeros_like(last_B1)))
    return jnp.sum(cdf_BC <= u_B1, axis=-1, keepdims=True, dtype=jnp.int32)


def row_keys(key: jax.Array, prompt_P: jax.Array, num_completions: int) -> jax.Array:
    """Return `key_B`: key folded with the prompt's number, then with the completion's index."""
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)  # of jax.random.PRNGKey
    key_P = jax.vmap(jax.random.fold_in, (None, 0))(key, prompt_P)
    group = jax.vmap(jax.random.fold_in, (None, 0))
    return jax.vmap(group, (0, None))(key_P, jnp.arange(num_completions)).reshape(-1)


def record(loop: Loop, drawn: tuple, live_B: jax.Array, stop_ids: tuple[int, ...]) -> Loop:
    """Write the token `drawn` = (token_B, logp_B) of every live slot into the slot's row."""
    N, T = loop.tokens_NT.shape
    token_B, logp_B = drawn
    number_B = loop.clock - loop.began_B
    row_B = jnp.where(live_B, loop.row_B, N)  # beyond the last row: dropped
    stopped_B = (token_B[:, None] == jnp.asarray(stop_ids, jnp.int32)[None, :]).any(-1)
    return loop.replace(
        token_B=jnp.where(live_B, token_B, loop.token_B),
        done_B=jnp.where(live_B, stopped_B | (number_B + 1 == T), loop.done_B),
        tokens_NT=loop.tokens_NT.at[row_B, number_B].set(token_B, mode="drop"),
        logp_NT=loop.logp_NT.at[row_B, number_B].set(logp_B, mode="drop"),
        length_N=loop.length_N.at[row_B].set(number_B + 1, mode="drop"),
        stopped_N=loop.stopped_N.at[row_B].set(stopped_B, mode="drop"),
    )


def draw_next(queue: Queue, loop: Loop, logits_BV: jax.Array, temperature: float) -> tuple:
    """Draw the next token of every slot with the key of its row and of its place in the row."""
    number_B = loop.clock - loop.began_B
    key_B = jax.vmap(jax.random.fold_in)(queue.key_N[loop.row_B], number_B)
    return draw(logits_BV, key_B, temperature)


def begin(
    cfg: ModelConfig, queue: Queue, loop: Loop, temperature: float, stop_ids: tuple[int, ...]
) -> Loop:
    """Give every idle slot the next row of the queue, and draw that row's first token."""
    N, P = len(queue.key_N), len(queue.start_P)
    row_B = loop.next_row + jnp.cumsum(loop.done_B, dtype=jnp.int32) - 1
    new_B = loop.done_B & (row_B < N)
    row_B = jnp.where(new_B, row_B, loop.row_B)
    prompt_B = row_B // (N // P)
    loop = loop.replace(
        next_row=loop.next_row + new_B.sum(dtype=jnp.int32),
        row_B=row_B,
        began_B=jnp.where(new_B, loop.clock, loop.began_B),
    )
    if len(row_B) < N:  # each slot has its prompt's cache to itself
        k, v = stored(cfg, tuple(kv_LPSKH[:, prompt_B] for kv_LPSKH in queue.kv_LPSKH))
        cache = loop.cache.replace(
            prompt_k=k,
            prompt_v=v,
            start_P=queue.start_P[prompt_B],
            began_P=loop.began_B,
        )
        loop = loop.replace(cache=cache)
    drawn = draw_next(queue, loop, queue.logits_PV[prompt_B], temperature)
    return record(loop, drawn, new_B, stop_ids)


def idle_loop(cfg: ModelConfig, queue: Queue, B: int, ring: int, T: int) -> Loop:
    """Return the loop before its first row: B idle slots with tails of `ring` columns, rows of at
    most T tokens."""
    N = len(queue.key_N)
    kv, start = queue.kv_LPSKH, queue.start_P
    if B < N:
        kv = tuple(jnp.zeros((x.shape[0], B, *x.shape[2:]), x.dtype) for x in kv)
        start = jnp.zeros((B,), jnp.int32)
    zero, zeros_B = jnp.int32(0), jnp.zeros((B,), jnp.int32)
    return Loop(
        clock=zero,
        next_row=zero,
        row_B=zeros_B,
        began_B=zeros_B,
        done_B=jnp.ones((B,), bool),
        token_B=zeros_B,
        cache=new_cache(cfg, kv, start, B, ring),
        tokens_NT=jnp.zeros((N, T), jnp.int32),
        logp_NT=jnp.zeros((N, T), jnp.float32),
        length_N=jnp.zeros((N,), jnp.int32),
        stopped_N=jnp.zeros((N,), bool),
    )


def sample_rows(
    params: Params,
    lora,
    key: jax.Array,
    tokens_PT: jax.Array,
    start_P: jax.Array,
    prompt_id_P: jax.Array,
    *,
    cfg: ModelConfig,
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
    slots: int | None,
) -> tuple:
    """Sample the rows of one device, `slots` at a time (None: all). Returns (tokens_NT, logp_NT,
    length_N, stopped_N, useful_N), T = max_new_tokens."""
    key_N = row_keys(key, prompt_id_P, num_completions)
    N = len(key_N)
    B = min(slots or N, N)
    queue = Queue(key_N, *prefill(params, cfg, tokens_PT, start_P, lora), start_P)

    weights = decode_weights(params, cfg, lora)

    def decode(loop: Loop) -> Loop:
        logits_BV, cache = decode_step(weights, cfg, loop.token_B, loop.clock, loop.cache)
        loop = loop.replace(clock=loop.clock + 1, cache=cache)
        drawn = draw_next(queue, loop, logits_BV, temperature)
        return record(loop, drawn, ~loop.done_B, stop_ids)

    def fill(loop: Loop) -> Loop:
        return begin(cfg, queue, loop, temperature, stop_ids)

    if B == N:  # one loop per width of the tails: short completions read short tails
        widths = [*range(TAIL_STEP, max_new_tokens - TAIL_STEP // 2, TAIL_STEP), max_new_tokens]
        loop = fill(idle_loop(cfg, queue, B, widths[0], max_new_tokens))
        for width in widths:
            loop = loop.replace(cache=widen(loop.cache, width))
            loop = jax.lax.while_loop(
                lambda loop, width=width: (loop.clock < width) & on_any_device(~loop.done_B.all()),
                decode,
                loop,
            )
    else:  # one loop, in which waiting rows are let in

        def goes_on(loop: Loop) -> jax.Array:
            idle = loop.done_B.sum()
            let_in = (loop.next_row < N) & (idle >= max(1, B // REFILL_SHARE))
            return on_any_device(idle < B) & ~on_any_device(let_in)

        loop = jax.lax.while_loop(
            lambda loop: on_any_device((loop.next_row < N) | ~loop.done_B.all()),
            lambda loop: jax.lax.while_loop(goes_on, decode, fill(loop)),
            idle_loop(cfg, queue, B, max_new_tokens, max_new_tokens),
        )
    decoded = (loop.length_N - 1).sum().astype(jnp.float32)
    useful = decoded / jnp.maximum(loop.clock * B, 1).astype(jnp.float32)
    outputs = (loop.tokens_NT, loop.logp_NT, loop.length_N, loop.stopped_N)
    return *outputs, jnp.broadcast_to(useful, (N,))


@partial(
    jax.jit,
    static_argnames=(
        "cfg", "num_completions", "max_new_tokens", "temperature", "stop_ids", "slots"
    ),
)  # fmt: skip
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
    slots: int | None = None,
) -> Samples:
    """Sample `num_completions` completions of every left-padded prompt, stopping at any stop id.

    prompt_id_P: the number each prompt's draws are keyed by; by default a hash of its tokens (so
    that equal prompts in one batch get equal completions).
    slots: completions that a device decodes at a time; None: all of its rows. The samples are the
    same.
    """
    P, width = tokens_PT.shape
    prompt_id_P = prompt_hash(tokens_PT, start_P) if prompt_id_P is None else prompt_id_P
    run = partial(
        sample_rows, cfg=cfg, num_completions=num_completions, max_new_tokens=max_new_tokens,
        temperature=temperature, stop_ids=stop_ids, slots=slots,
    )  # fmt: skip
    tokens_BT, logp_BT, length_B, stopped_B, useful_B = per_device(run, ",,,PT,P,P->BT,BT,B,B,B")(
        params, lora, key, tokens_PT, start_P.astype(jnp.int32), prompt_id_P
    )
    mask_BT = jnp.arange(max_new_tokens)[None, :] < length_B[:, None]
    before = ((0, 0), (width, 0))
    prompt_BT = jnp.repeat(tokens_PT.astype(jnp.int32), num_completions, axis=0)
    return Samples(
        tokens_BT=jnp.concatenate([prompt_BT, tokens_BT], axis=1),
        completion_mask_BT=jnp.pad(mask_BT, before),
        logp_BT=jnp.pad(logp_BT, before),
        start_B=jnp.repeat(start_P, num_completions).astype(jnp.int32),
        stopped_B=stopped_B,
        useful_B=useful_B,
    )
