"""Advantages equal their NumPy twin, and what must hold of a group."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_reference import reference_advantages

from gemma_cot.grpo.loss import group_advantages, has_signal

CLOSE = dict(rtol=1e-5, atol=1e-6)  # float32: sums of a few rewards


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_equal_the_loop(scale, baseline):
    rng = np.random.default_rng(1)
    reward_PG = rng.choice([0.0, 0.2, 1.0, 2.4], (40, 5)).astype(np.float32)
    valid_PG = rng.random((40, 5)) < 0.7
    valid_PG[0], valid_PG[1], reward_PG[2] = False, [1, 0, 0, 0, 0], 1.0
    ours = group_advantages(
        jnp.asarray(reward_PG), jnp.asarray(valid_PG), scale=scale, baseline=baseline
    )
    assert ours.dtype == jnp.float32
    twin = reference_advantages(reward_PG, valid_PG, scale, epsilon=1e-4, baseline=baseline)
    np.testing.assert_allclose(ours, twin, **CLOSE)
    assert (np.asarray(ours)[~valid_PG] == 0).all()
    np.testing.assert_allclose(ours.sum(axis=1), 0.0, atol=5e-6)  # 5 values of size 2, rounded


def test_advantages_without_a_mask_are_those_of_all_valid():
    reward_PG = jnp.asarray([[0.0, 1.0, 3.0], [2.0, 2.5, 0.0]])
    everything = jnp.ones((2, 3), bool)
    assert (group_advantages(reward_PG) == group_advantages(reward_PG, everything)).all()


def test_one_right_of_four():
    # Mean 1/4; deviations 3/4 and -1/4; variance (9 + 1 + 1 + 1)/16 / 3 = 1/4, std 1/2:
    # +1.5 and -0.5 with G - 1 in the denominator (G would give +1.732 and -0.577).
    # epsilon 1e-4 beside 0.5 makes them 2e-4 smaller.
    advantage_PG = group_advantages(jnp.asarray([[0.0, 1.0, 0.0, 0.0]]))
    np.testing.assert_allclose(advantage_PG, [[-0.5, 1.5, -0.5, -0.5]], rtol=2.1e-4)
    exact_PG = group_advantages(jnp.asarray([[0.0, 1.0, 0.0, 0.0]]), epsilon=0.0)
    np.testing.assert_allclose(exact_PG, [[-0.5, 1.5, -0.5, -0.5]], rtol=1e-6)


def test_leave_one_out_of_four():
    # 1 less the mean of 0, 0, 0; 0 less the mean of 1, 0, 0: 4/3 of 3/4 and -1/4.
    reward_PG = jnp.asarray([[0.0, 1.0, 0.0, 0.0]])
    advantage_PG = group_advantages(reward_PG, scale="none", baseline="leave_one_out")
    np.testing.assert_allclose(advantage_PG, [[-1 / 3, 1.0, -1 / 3, -1 / 3]], rtol=1e-6)


def test_a_reward_that_does_not_apply_is_left_out_of_the_mean():
    # Valid 1, 0: mean 1/2, std sqrt(1/2) -> +-0.7071. As a third reward 0 it would shift both.
    reward_PG = jnp.asarray([[1.0, 0.0, jnp.nan]])
    advantage_PG = group_advantages(reward_PG, jnp.asarray([[True, True, False]]), epsilon=0.0)
    np.testing.assert_allclose(advantage_PG, [[0.5**0.5, -(0.5**0.5), 0.0]], rtol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_without_signal_is_exactly_zero(scale):
    noise = np.nextafter(np.float32(0.3), np.float32(1))  # the next float32 number, 3e-8 above
    assert noise != np.float32(0.3)
    reward_PG = np.array(
        [[1, 1, 1], [0, 0, 0], [0.3, noise, 0.3], [5, 1, 2], [7, 3, 3], [0, 1, 0]], np.float32
    )
    valid_PG = np.ones((6, 3), bool)
    valid_PG[3], valid_PG[4] = False, [False, True, True]
    with jax.debug_nans(True):
        advantage_PG = group_advantages(
            jnp.asarray(reward_PG), jnp.asarray(valid_PG), scale=scale, epsilon=1e-12
        )
    assert (np.asarray(advantage_PG)[:5] == 0).all()
    assert (np.asarray(advantage_PG)[5] != 0).all()
    signal_P = has_signal(jnp.asarray(reward_PG), jnp.asarray(valid_PG))
    assert signal_P.tolist() == [False] * 5 + [True]


def test_a_batch_without_any_valid_reward_is_zero():
    none_PG = jnp.zeros((2, 3), bool)
    with jax.debug_nans(True):
        for scale in ("group", "batch", "none"):
            advantage_PG = group_advantages(jnp.full((2, 3), jnp.inf), none_PG, scale=scale)
            assert (advantage_PG == 0).all()
