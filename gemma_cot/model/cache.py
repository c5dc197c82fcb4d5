"""The KV cache of sampling: one prompt cache per prompt, shared by its G completions without a
copy, and one private tail per completion.

Prefill fills the prompt part; `decode_step` runs one token of every row against both parts. Prompts
are left-padded, so every row's tail begins behind the same column. Tails are rings with one clock:
at clock c every row writes column c mod S, whenever it began, so that a row can begin while others
are running. Knows no sampling.
"""

from functools import partial

import flax.struct
import jax
import jax.numpy as jnp

from gemma_cot.config import ModelConfig
from gemma_cot.model.gemma import embed, hidden_states, lora_parts, unembed
from gemma_cot.model.kernels import layout
from gemma_cot.model.kernels.decode import decode_attention
from gemma_cot.model.layers import block, each_by_itself, rms_norm, rotations
from gemma_cot.model.params import Params, merged_layers


@flax.struct.dataclass
class Cache:
    """Keys (after norm and rotation) and values of every layer: one LPSKH or LBSKH array of all.

    Where every layer lies by itself (`layout.by_layer`) one array a layer, keys [P * K, H, S],
    values [P * K, S, H] (B for tails): what XLA's products on a CPU read as it lies.
    """

    prompt_k: tuple[jax.Array, ...]  # S = prompt width
    prompt_v: tuple[jax.Array, ...]
    tail_k: tuple[jax.Array, ...]  # S = max_new_tokens, a ring; B = P * G
    tail_v: tuple[jax.Array, ...]
    start_P: jax.Array  # first real column of each prompt, int32
    began_P: jax.Array  # clock at which the completions of each prompt began, int32

    @property
    def width(self) -> int:
        """The columns of a prompt."""
        return self.prompt_v[0].shape[self.prompt_v[0].ndim // 2]

    @property
    def ring(self) -> int:
        """The columns of a tail."""
        return self.tail_v[0].shape[self.tail_v[0].ndim // 2]


@flax.struct.dataclass
class DecodeWeights:
    """What `decode_step` reads: the parameters, and (layer, adapters or None) of all layers in one
    stack, or of each layer as `layout.joined` gives it."""

    params: Params
    layers: tuple
    scale: float = flax.struct.field(pytree_node=False)  # of the adapters


def decode_weights(params: Params, cfg: ModelConfig, lora) -> DecodeWeights:
    """Return the weights for `decode_step`, by layer a copy: to be called before a loop.

    The adapter is merged into float32 weights, which makes decoding faster; bfloat16 ones would
    round it away, and the sampler would no longer be the policy that is trained.
    """
    adapters, scale = lora_parts(lora, params["embed"].dtype)
    if adapters and params["embed"].dtype == jnp.float32:
        params = params | {"layers": merged_layers(params["layers"], adapters, scale)}
        adapters = None
    if not layout.by_layer(cfg):
        return DecodeWeights(params, ((params["layers"], adapters),), scale)
    layers = layout.joined(params["layers"], adapters)
    each = (jax.tree.map(lambda x, i=i: x[i], layers) for i in range(cfg.num_layers))
    return DecodeWeights(params, tuple(each), scale)


@jax.named_scope("prefill")
def prefill(
    params: Params, cfg: ModelConfig, tokens_PT: jax.Array, start_P: jax.Array, lora
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Run the prompts once. Returns (logits of the next token [P, V] float32, (k, v) LPSKH)."""
    x_PTD, kv_LPSKH = hidden_states(params, cfg, tokens_PT, start_P, lora, keep_kv=True)
    return unembed(params, x_PTD[:, -1]), kv_LPSKH


def new_cache(
    cfg: ModelConfig, kv_LPSKH: tuple, start_P: jax.Array, num_rows: int, max_new_tokens: int
) -> Cache:
    """Return the cache of rows about to begin at clock 0, num_rows / P to a prompt."""
    L, P, _, K, H = kv_LPSKH[0].shape
    tail = jnp.zeros((L, num_rows, max_new_tokens, K, H), kv_LPSKH[0].dtype)
    prompts, tails = layout.stored(cfg, kv_LPSKH), layout.stored(cfg, (tail, tail))
    return Cache(*prompts, *tails, start_P, jnp.zeros((P,), jnp.int32))


def widen(cache: Cache, ring: int) -> Cache:
    """Return the cache with tails of `ring` columns; no tail may have run over its end before."""
    tails = zip(cache.tail_k, cache.tail_v, strict=True)
    wider = [layout.lengthen(*tail, ring - cache.ring) for tail in tails]
    tail_k, tail_v = zip(*wider, strict=True)
    return cache.replace(tail_k=tail_k, tail_v=tail_v)


def decode_masks(cache: Cache, clock: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """Return (prompt_2PS, tail_2PS), True = visible to the token of `clock`; [0] local, [1] global.

    One prompt of 4 columns, start 1, tail of 3, begun at clock 0, clock 1, window 3 (q: the query):
        global  . 1 1 1 | 1 q .
        local   . . . 1 | 1 q .
    The same begun at clock 4, clock 6: token 2, in columns 1, 2, 0 the tokens 0, 1, 2:
        global  . 1 1 1 | q 1 1
        local   . . . . | q 1 1
    """
    width, ring = cache.width, cache.ring
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


def over_layers(run, cfg: ModelConfig, weights: DecodeWeights, cache: Cache, x_BTD) -> tuple:
    """Return (x_BTD, (tail_k, tail_v)) after `run(x_BTD, (layer, adapter), is_global, index,
    prompts, tails) -> (x_BTD, tails)` of every layer.

    Layers are scanned, the tails being the scan's carry, so that XLA updates them in place; where
    it would copy each layer's weights out of their stack, the loop is written out.
    """
    caches = zip(cache.prompt_k, cache.prompt_v, cache.tail_k, cache.tail_v, strict=True)
    if layout.by_layer(cfg):
        tails = []
        for index, (here, parts) in enumerate(zip(weights.layers, caches, strict=True)):
            is_global = int(cfg.global_layers[index])
            x_BTD, grown = run(x_BTD, here, is_global, index, parts[:2], parts[2:])
            tails.append(grown)
        return x_BTD, tuple(zip(*tails, strict=True))
    (parts,) = caches

    def layer_step(carry, xs):
        return run(carry[0], *xs, parts[:2], carry[1]), None

    is_global_L = jnp.asarray(cfg.global_layers, jnp.int32)
    xs = (*weights.layers, is_global_L, jnp.arange(cfg.num_layers))
    (x_BTD, (tail_k, tail_v)), _ = jax.lax.scan(layer_step, (x_BTD, parts[2:]), xs)
    return x_BTD, ((tail_k,), (tail_v,))


@jax.named_scope("decode_step")
def decode_step(
    weights: DecodeWeights, cfg: ModelConfig, token_B: jax.Array, clock: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Run one token of every row, that of `clock`. Returns (logits_BV of the next token, cache)."""
    B, P, width, ring = len(token_B), len(cache.start_P), cache.width, cache.ring
    position_B = jnp.repeat(width + clock - cache.began_P - cache.start_P, B // P)
    turn_2BT2h = rotations(cfg, position_B[:, None])
    prompt_2PS, tail_2PS = decode_masks(cache, clock, cfg.window)
    project = partial(layout.all_at_once, cfg) if layout.by_layer(cfg) else each_by_itself

    def run(x_BTD, layer_and_adapter, is_global, index, prompts, tails):
        def attend(q_BTNH, k_BTKH, v_BTKH):
            grown = layout.write(*tails, k_BTKH, v_BTKH, clock % ring, index)
            caches = (*prompts, *grown)
            if cfg.attention == "pallas":
                window = jnp.where(is_global, width + ring, cfg.window)
                mix_BNH = decode_attention(
                    q_BTNH[:, 0], *caches, cache.start_P, clock, window, cache.began_P, layer=index
                )
            else:
                masks = prompt_2PS[is_global], tail_2PS[is_global]
                caches = caches if layout.by_layer(cfg) else (x[index] for x in caches)
                mix_BNH = layout.shared_attention(q_BTNH[:, 0], *caches, masks)
            return mix_BNH[:, None], grown

        turn_BT2h = turn_2BT2h[is_global]
        return block(cfg, x_BTD, *layer_and_adapter, weights.scale, turn_BT2h, attend, project)

    x_BTD = embed(weights.params, cfg, token_B[:, None])
    x_BTD, (tail_k, tail_v) = over_layers(run, cfg, weights, cache, x_BTD)
    x_BD = rms_norm(x_BTD[:, 0], weights.params["final_norm"], cfg.norm_eps)
    logits_BV = unembed(weights.params, x_BD, layout.few_rows())
    return logits_BV, cache.replace(tail_k=tail_k, tail_v=tail_v)
