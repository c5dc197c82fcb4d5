"""The KL table, proven: expected gradients of every estimator, summed over all actions exactly.

A categorical policy of five logits theta; a batch of five rows, one for each action, weighted by
its probability under the policy that samples. With A = 0 and beta = 1, `grpo_loss` is then the
expectation of the KL term alone, and its gradient by theta is what a huge batch would give.
d log pi(a) / d theta_j = [a = j] - pi_j gives the closed forms below.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.grpo.loss import grpo_loss

THETA = np.array([0.3, -1.0, 0.8, 0.0, -0.4], np.float32)
THETA_OLD = np.array([0.1, -0.6, 0.5, 0.2, -0.9], np.float32)
THETA_REF = np.array([-0.5, 0.4, 0.2, 0.9, -0.7], np.float32)
CLOSE = dict(atol=1e-6)  # five float32 terms below 1, each with an error of 6e-8


def softmax(theta):
    """Return the probabilities in float64."""
    e = np.exp(theta.astype(np.float64))
    return e / e.sum()


def reverse_kl_gradient() -> np.ndarray:
    """Return d KL(pi || ref) / d theta_j = pi_j (log pi_j/ref_j - KL)."""
    pi, ref = softmax(THETA), softmax(THETA_REF)
    kl = (pi * np.log(pi / ref)).sum()
    return pi * (np.log(pi / ref) - kl)


def forward_kl_gradient() -> np.ndarray:
    """Return d KL(ref || pi) / d theta_j = pi_j - ref_j."""
    return softmax(THETA) - softmax(THETA_REF)


def expected_gradient(kind: str, theta_old=None, theta=THETA) -> np.ndarray:
    """Return the gradient of the expected KL term on samples of pi_old (None: of pi itself)."""
    sampler_A = softmax(theta if theta_old is None else theta_old).astype(np.float32)
    zeros_A = jnp.zeros(len(sampler_A))

    def expected_loss(theta_A):
        logp_BT = jax.nn.log_softmax(theta_A)[:, None]
        old_BT = None if theta_old is None else jax.nn.log_softmax(jnp.asarray(theta_old))[:, None]
        ref_BT = jax.nn.log_softmax(jnp.asarray(THETA_REF))[:, None]
        return grpo_loss(
            logp_BT, old_BT, ref_BT, zeros_A, jnp.asarray(sampler_A)[:, None], beta=1.0, kl=kind
        )[0]

    return np.asarray(jax.grad(expected_loss)(jnp.asarray(theta)))


def test_the_closed_forms_are_gradients():
    """Central differences of both divergences, in float64: the table below stands on these."""

    def divergences(theta):
        pi, ref = softmax(theta), softmax(THETA_REF)
        return np.array([(pi * np.log(pi / ref)).sum(), (ref * np.log(ref / pi)).sum()])

    h = 1e-5
    moves = h * np.eye(len(THETA))
    slope = [(divergences(THETA + m) - divergences(THETA - m)) / (2 * h) for m in moves]
    expected = np.stack([reverse_kl_gradient(), forward_kl_gradient()], axis=1)
    np.testing.assert_allclose(slope, expected, atol=1e-8)  # h^2 = 1e-10 and 1e-16 / h
    assert np.abs(expected).max() > 0.1 and np.abs(expected[:, 0] - expected[:, 1]).max() > 0.05


def test_k1_on_policy_has_no_gradient():
    # E[d/dtheta log pi] = 0: it does not regularise at all.
    np.testing.assert_allclose(expected_gradient("k1"), 0.0, **CLOSE)


def test_k2_on_policy_is_the_reverse_kl():
    np.testing.assert_allclose(expected_gradient("k2"), reverse_kl_gradient(), **CLOSE)


def test_k3_on_policy_is_the_forward_kl():
    np.testing.assert_allclose(expected_gradient("k3"), forward_kl_gradient(), **CLOSE)


@pytest.mark.parametrize("theta_old", [None, THETA_OLD], ids=["on-policy", "off-policy"])
def test_ratio_k3_is_the_reverse_kl_on_and_off_policy(theta_old):
    gradient = expected_gradient("ratio_k3", theta_old)
    np.testing.assert_allclose(gradient, reverse_kl_gradient(), **CLOSE)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_others_are_biased_off_policy(kind):
    gradient = expected_gradient(kind, THETA_OLD)
    assert np.abs(gradient - reverse_kl_gradient()).max() > 0.01


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "ratio_k3"])
def test_at_the_reference_every_expected_gradient_is_zero(kind):
    np.testing.assert_allclose(expected_gradient(kind, theta=THETA_REF), 0.0, **CLOSE)
