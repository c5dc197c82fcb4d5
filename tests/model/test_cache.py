"""The cache: prefill and decode steps give the logits of the full forward pass, past the window."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.model.cache import (
    Cache,
    decode_masks,
    decode_step,
    decode_weights,
    new_cache,
    prefill,
)
from gemma_cot.model.gemma import logits
from gemma_cot.model.layers import causal_mask

# The same float32 sums in another order, through three layers; a wrong key shows at 1e-2 and more.
SAME = dict(atol=2e-5, rtol=0)
WIDTH, TAIL = 7, 9  # 16 positions, three times the window of 5
START_P = np.array([0, 3, 6], np.int32)  # no padding, some, all but one column
G = 2


@pytest.fixture(params=["cpu", "gpu", "tpu"])
def layout(request, monkeypatch):
    """Decode with every layer by itself, or with the stack that a TPU has."""
    monkeypatch.setattr("gemma_cot.model.kernels.layout.platform", lambda: request.param)
    jax.clear_caches()  # the platform is asked when a function is traced
    yield request.param
    jax.clear_caches()


@pytest.fixture(scope="module")
def tokens_BT(cfg):
    """Rows p * G + g: the same prompt within a group, another completion in every row."""
    rng = np.random.default_rng(0)
    prompt_PT = rng.integers(1, cfg.vocab_size, (3, WIDTH))
    completion_BT = rng.integers(1, cfg.vocab_size, (3 * G, TAIL))
    return np.concatenate([np.repeat(prompt_PT, G, 0), completion_BT], 1).astype(np.int32)


def by_cache(params, cfg, tokens_BT, lora=None, began: int = 0) -> np.ndarray:
    """Return the logits at prompt's end and after each completion token, [B, TAIL + 1, V]."""
    first = jax.jit(prefill, static_argnames="cfg")
    step = jax.jit(decode_step, static_argnames="cfg")
    logits_PV, kv = first(params, cfg, tokens_BT[::G, :WIDTH], START_P, lora)
    weights = jax.jit(decode_weights, static_argnames="cfg")(params, cfg, lora)
    cache = new_cache(cfg, kv, START_P, len(tokens_BT), TAIL)
    cache = cache.replace(began_P=np.full(3, began, np.int32))
    out = [np.repeat(logits_PV, G, axis=0)]
    for i in range(TAIL):
        clock = np.int32(began + i)
        logits_BV, cache = step(weights, cfg, tokens_BT[:, WIDTH + i], clock, cache)
        out.append(np.asarray(logits_BV))
    return np.stack(out, axis=1)


@pytest.mark.parametrize("adapted", [False, True])
def test_cached_equals_full_forward_at_every_position(
    layout, cfg, params, lora, tokens_BT, adapted
):
    adapter = lora if adapted else None
    full = jax.jit(partial(logits, cfg=cfg))(
        params, tokens_BT=tokens_BT, start_B=np.repeat(START_P, G), lora=adapter
    )
    got = by_cache(params, cfg, tokens_BT, adapter)
    assert got.shape == (6, TAIL + 1, cfg.vocab_size) and got.dtype == np.float32
    held = decode_weights(params, cfg, adapter).layers
    assert len(held) == (1 if layout == "tpu" else cfg.num_layers)
    np.testing.assert_allclose(got, full[:, WIDTH - 1 :], **SAME)


def test_an_adapter_stays_beside_bfloat16_weights(layout, cfg, params, lora, tokens_BT):
    """Merged into them it would be rounded away; the sampler must be the policy that is trained."""
    for dtype, is_merged in (("float32", True), ("bfloat16", False)):
        cast = jax.tree.map(lambda w, dtype=dtype: w.astype(dtype), params)
        held = jax.eval_shape(partial(decode_weights, cfg=cfg), cast, lora=lora).layers
        assert {not adapter for _, adapter in held} == {is_merged}
    start_B = np.repeat(START_P, G)
    full, plain = (
        jax.jit(partial(logits, cfg=cfg))(cast, tokens_BT=tokens_BT, start_B=start_B, lora=adapter)
        for adapter in (lora, None)
    )
    error = np.abs(by_cache(cast, cfg, tokens_BT, lora) - full[:, WIDTH - 1 :]).max()
    assert error < 0.1 * np.abs(plain - full).max()


def test_a_ring_begun_at_a_later_clock_gives_the_same(layout, cfg, params, tokens_BT):
    """Begun at clock 4, the 9 tokens lie in columns 4 to 8 and 0 to 3."""
    late = by_cache(params, cfg, tokens_BT, began=4)
    np.testing.assert_allclose(late, by_cache(params, cfg, tokens_BT), **SAME)


def masks(width: int, starts, tail: int, clock: int, window: int, began=0) -> list:
    """Return the masks of `decode_masks` of each prompt as strings: [global, local]."""
    none = jnp.zeros((1, len(starts), width, 1, 1)), jnp.zeros((1, len(starts), tail, 1, 1))
    starts = jnp.asarray(starts, jnp.int32)
    parts = ((none[i],) for i in (0, 0, 1, 1))
    cache = Cache(*parts, starts, jnp.full_like(starts, began))
    parts_2PS = [np.asarray(part) for part in decode_masks(cache, jnp.int32(clock), window)]
    mask_2PS = np.concatenate(parts_2PS, axis=2)
    return [
        ["".join(".1"[int(c)] for c in mask_2PS[kind, p]) for kind in (1, 0)]
        for p in range(len(starts))
    ]


def test_decode_masks_of_the_docstring():
    """4 prompt columns, start 1, tail of 3; the query is tail token 1; window 3. Global, local.
    Then token 2 of a completion that began at clock 4: the ring has gone round."""
    assert masks(4, [1], 3, 1, 3) == [[".111" + "11.", "...1" + "11."]]
    assert masks(4, [1], 3, 6, 3, began=4) == [[".111" + "111", "...." + "111"]]


def test_decode_masks_do_not_show_what_an_earlier_row_left():
    """Begun at clock 5 in a ring of 4, clock 6: tokens 0 and 1 in columns 1 and 2."""
    assert masks(2, [0], 4, 6, 9, began=5) == [["11" + ".11.", "11" + ".11."]]


def test_decode_masks_at_the_first_tail_token():
    """The query sees itself and window - 1 = 2 prompt columns."""
    assert masks(4, [0, 3], 3, 0, 3) == [["1111" + "1..", "..11" + "1.."], ["...1" + "1.."] * 2]


def test_decode_masks_once_the_window_has_left_the_prompt():
    assert masks(4, [2], 5, 4, 3) == [["..11" + "11111", "...." + "..111"]]


def test_decode_masks_equal_the_rows_of_the_full_mask():
    """Row WIDTH + step of `causal_mask`, cut at the end of the tail."""
    full = np.asarray(causal_mask(jnp.asarray([2], jnp.int32), 9, 4))[:, 0]
    for step in range(4):
        rows = ["".join(".1"[int(c)] for c in full[kind, 5 + step]) for kind in (1, 0)]
        assert masks(5, [2], 4, step, 4) == [rows]
