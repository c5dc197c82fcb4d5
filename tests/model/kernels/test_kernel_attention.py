"""The attention kernels equal the model's own attention: prefill with its gradient, and decode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.model.kernels.decode import decode_attention
from gemma_cot.model.kernels.prefill import prefill_attention
from gemma_cot.testing import check_kernel, report

SMALL = {"block": 16}  # several tiles a case, the last one over the edge


def draw(*shapes):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def test_prefill_equals_the_reference_in_value_and_gradient():
    outcomes = check_kernel("prefill_attention", partial(prefill_attention, **SMALL))
    assert len(outcomes) == 6 * 2 * 4, "6 cases, 2 dtypes, a value and 3 gradients"
    assert all(o.passed for o in outcomes), report(outcomes)


def test_decode_equals_the_reference():
    outcomes = check_kernel("decode_attention", partial(decode_attention, **SMALL))
    assert len(outcomes) == 7 * 2, "7 cases, 2 dtypes, a value"
    assert all(o.passed for o in outcomes), report(outcomes)


def test_prefill_returns_zero_for_padding_and_passes_no_gradient_through_it():
    q, k, v = draw((2, 20, 2, 8), (2, 20, 1, 8), (2, 20, 1, 8))
    start_B = jnp.asarray([3, 20], jnp.int32)
    mix, pull_back = jax.vjp(lambda *a: prefill_attention(*a, start_B, None, **SMALL), q, k, v)
    mix_BTNH = np.asarray(mix)
    assert np.abs(mix_BTNH[0, 3:]).min() > 0
    assert not mix_BTNH[0, :3].any() and not mix_BTNH[1].any()
    for gradient in pull_back(jnp.ones_like(mix)):
        assert not np.asarray(gradient)[0, :3].any() and not np.asarray(gradient)[1].any()
        assert np.isfinite(gradient).all()


def test_prefill_ignores_what_it_may_not_see():
    q, k, v = draw((1, 40, 2, 8), (1, 40, 1, 8), (1, 40, 1, 8))
    start_B = jnp.asarray([4], jnp.int32)
    run = jax.jit(lambda k, v: prefill_attention(q, k, v, start_B, 6, **SMALL)[0, 30])
    # Query 30 with window 6 sees 25..30: everything else may be anything finite.
    hidden_S = (np.arange(40) < 25) | (np.arange(40) > 30)
    wild = jnp.asarray(np.where(hidden_S, 1e4, 1.0), jnp.float32)[None, :, None, None]
    np.testing.assert_array_equal(run(k, v), run(k * wild, v * wild))
    edge = jnp.asarray(np.where(np.arange(40) == 25, 2.0, 1.0), jnp.float32)[None, :, None, None]
    assert np.abs(run(k, v) - run(k, v * edge)).max() > 1e-3


def test_prefill_refuses_queries_and_keys_of_different_number():
    q, k = draw((1, 4, 2, 8), (1, 5, 1, 8))
    with pytest.raises(ValueError, match="got 4 and 5"):
        prefill_attention(q, k, k, jnp.zeros((1,), jnp.int32))


def test_decode_reads_nothing_of_the_tail_that_is_not_written():
    q, prompt, tail = draw((4, 2, 8), (2, 9, 1, 8), (4, 20, 1, 8))
    start_P = jnp.asarray([0, 2], jnp.int32)
    unwritten = jnp.asarray(np.where(np.arange(20) > 7, np.nan, 1.0), jnp.float32)
    dirty = tail * unwritten[None, :, None, None]
    run = jax.jit(lambda tail, step: decode_attention(
        q, prompt, prompt, tail, tail, start_P, step, 12, **SMALL))  # fmt: skip
    np.testing.assert_array_equal(run(tail, jnp.int32(7)), run(dirty, jnp.int32(7)))
    assert not np.isfinite(run(dirty, jnp.int32(8))).all(), "step 8 sees column 8"
