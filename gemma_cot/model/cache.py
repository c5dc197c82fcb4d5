"""The KV cache of sampling: one prompt cache per prompt, shared by its G completions without a
copy, and one private tail per completion.

Prefill fills the prompt part; `decode_step` runs one token of every row against both parts. Prompts
are left-padded, so every row's tail begins behind the same column. Tails are rings with one clock:
at clock c every row writes column c mod S, whenever it began, so that a row can begin while others
are running. Knows no sampling.
"""

import flax.struct
import jax
import jax.numpy as jnp

from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import embed, hidden_states, lora_parts, unembed
from gemma_cot.model.kernels.decode import decode_attention
from gemma_cot.model.kernels.gradients import MASKED, softmax
from gemma_cot.model.layers import block, rms_norm, rope_angles
from gemma_cot.model.params import Params


@flax.struct.dataclass
class Cache:
    """Keys (after norm and rotation) and values of every layer."""

    prompt_k_LPSKH: jax.Array  # S = prompt width
    prompt_v_LPSKH: jax.Array
    tail_k_LBSKH: jax.Array  # S = max_new_tokens, a ring; B = P * G
    tail_v_LBSKH: jax.Array
    start_P: jax.Array  # first real column of each prompt, int32
    began_P: jax.Array  # clock at which the completions of each prompt began, int32


@jax.named_scope("prefill")
def prefill(
    params: Params, cfg: ModelConfig, tokens_PT: jax.Array, start_P: jax.Array, lora
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Run the prompts once. Returns (logits of the next token [P, V] float32, (k, v) LPSKH)."""
    x_PTD, kv_LPSKH = hidden_states(params, cfg, tokens_PT, start_P, lora, keep_kv=True)
    return unembed(params, x_PTD[:, -1]), kv_LPSKH


def new_cache(kv_LPSKH: tuple, start_P: jax.Array, num_rows: int, max_new_tokens: int) -> Cache:
    """Return the cache of rows about to begin at clock 0, num_rows / P to a prompt."""
    k_LPSKH, v_LPSKH = kv_LPSKH
    L, P, _, K, H = k_LPSKH.shape
    tail = jnp.zeros((L, num_rows, max_new_tokens, K, H), k_LPSKH.dtype)
    return Cache(k_LPSKH, v_LPSKH, tail, tail, start_P, jnp.zeros((P,), jnp.int32))


def widen(cache: Cache, ring: int) -> Cache:
    """Return the cache with tails of `ring` columns; no tail may have run over its end before."""
    more = [(0, 0), (0, 0), (0, ring - cache.tail_k_LBSKH.shape[2]), (0, 0), (0, 0)]
    return cache.replace(
        tail_k_LBSKH=jnp.pad(cache.tail_k_LBSKH, more),
        tail_v_LBSKH=jnp.pad(cache.tail_v_LBSKH, more),
    )


def decode_masks(cache: Cache, clock: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """Return (prompt_2PS, tail_2PS), True = visible to the token of `clock`; [0] local, [1] global.

    One prompt of 4 columns, start 1, tail of 3, begun at clock 0, clock 1, window 3 (q: the query):
        global  . 1 1 1 | 1 q .
        local   . . . 1 | 1 q .
    The same begun at clock 4, clock 6: token 2, in columns 1, 2, 0 the tokens 0, 1, 2:
        global  . 1 1 1 | q 1 1
        local   . . . . | q 1 1
    """
    width, ring = cache.prompt_k_LPSKH.shape[2], cache.tail_k_LBSKH.shape[2]
    token_P1 = (clock - cache.began_P)[:, None]  # number of the token in its completion
    column_S = jnp.arange(width)[None, :]
    real_PS = column_S >= cache.start_P[:, None]
    near_PS = width + token_P1 - column_S < window
    age_S = ((clock - jnp.arange(ring)) % ring)[None, :]
    past_PS = age_S <= token_P1
    return (
        jnp.stack([real_PS & near_PS, real_PS]),
        jnp.stack([past_PS & (age_S < window), past_PS]),
    )


def shared_attention(q_BNH, prompt_k_PSKH, prompt_v_PSKH, tail_k_BSKH, tail_v_BSKH, masks):
    """Return attention of one query per row over its prompt's cache and its own tail, `mix_BNH`.

    One softmax over both parts; the prompt's keys are read once for all G rows of the prompt.
    """
    prompt_PS, tail_PS = masks
    B, N, H = q_BNH.shape
    P, S, K, _ = prompt_k_PSKH.shape
    f32 = jnp.float32
    q_BKQH = q_BNH.reshape(B, K, N // K, H)
    q_PGKQH = q_BKQH.reshape(P, B // P, K, N // K, H)
    on_prompt = jnp.einsum("PGKQH,PSKH->PGKQS", q_PGKQH, prompt_k_PSKH, preferred_element_type=f32)
    on_tail = jnp.einsum("BKQH,BSKH->BKQS", q_BKQH, tail_k_BSKH, preferred_element_type=f32)
    on_prompt = jnp.where(prompt_PS[:, None, None, None], on_prompt, MASKED)
    tail_BS = jnp.repeat(tail_PS, B // P, axis=0)
    on_tail = jnp.where(tail_BS[:, None, None], on_tail, MASKED)
    scores = jnp.concatenate([on_prompt.reshape(B, K, N // K, S), on_tail], axis=-1)
    weight = softmax(scores).astype(q_BNH.dtype)
    w_PGKQS = weight[..., :S].reshape(P, B // P, K, N // K, S)
    mix_BKQH = jnp.einsum("PGKQS,PSKH->PGKQH", w_PGKQS, prompt_v_PSKH).reshape(B, K, N // K, H)
    mix_BKQH = mix_BKQH + jnp.einsum("BKQS,BSKH->BKQH", weight[..., S:], tail_v_BSKH)
    return mix_BKQH.reshape(B, N, H)


@jax.named_scope("decode_step")
def decode_step(
    params: Params, cfg: ModelConfig, token_B: jax.Array, clock: jax.Array, cache: Cache, lora
) -> tuple[jax.Array, Cache]:
    """Run one token of every row, that of `clock`. Returns (logits_BV of the next token, cache).

    The tail caches are the layer scan's carry, so that XLA updates them in place.
    """
    B = token_B.shape[0]
    L, P, width = cache.prompt_k_LPSKH.shape[:3]
    ring = cache.tail_k_LBSKH.shape[2]
    position_B = jnp.repeat(width + clock - cache.began_P - cache.start_P, B // P)
    angle_2BTh = rope_angles(cfg, position_B[:, None])
    prompt_2PS, tail_2PS = decode_masks(cache, clock, cfg.window)
    adapters, scale = lora_parts(lora, params["embed"].dtype)

    def layer_step(carry, xs):
        x_BTD, tail_k, tail_v = carry
        layer, adapter, is_global, index = xs

        def attend(q_BTNH, k_BTKH, v_BTKH):
            at = (index, 0, clock % ring, 0, 0)
            new_k = jax.lax.dynamic_update_slice(tail_k, k_BTKH[None], at)
            new_v = jax.lax.dynamic_update_slice(tail_v, v_BTKH[None], at)
            caches = cache.prompt_k_LPSKH, cache.prompt_v_LPSKH, new_k, new_v
            if cfg.attention == "pallas":
                window = jnp.where(is_global, width + ring, cfg.window)
                mix_BNH = decode_attention(
                    q_BTNH[:, 0], *caches, cache.start_P, clock, window, cache.began_P, layer=index
                )
            else:
                masks = prompt_2PS[is_global], tail_2PS[is_global]
                mix_BNH = shared_attention(q_BTNH[:, 0], *(x[index] for x in caches), masks)
            return mix_BNH[:, None], (new_k, new_v)

        x_BTD, tails = block(cfg, x_BTD, layer, adapter, scale, angle_2BTh[is_global], attend)
        return (x_BTD, *tails), None

    xs = (
        params["layers"],
        adapters,
        jnp.asarray(cfg.global_layers, jnp.int32),
        jnp.arange(L),
    )
    carry = (embed(params, cfg, token_B[:, None]), cache.tail_k_LBSKH, cache.tail_v_LBSKH)
    (x_BTD, tail_k, tail_v), _ = jax.lax.scan(layer_step, carry, xs)
    x_BD = rms_norm(x_BTD[:, 0], params["final_norm"], cfg.norm_eps)
    return unembed(params, x_BD), cache.replace(tail_k_LBSKH=tail_k, tail_v_LBSKH=tail_v)
