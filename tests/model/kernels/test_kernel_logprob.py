"""The fused log-prob kernel equals the plain one: value, gradients, and what it never holds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.model.kernels import reference
from gemma_cot.model.kernels.logprob import chosen_logprob
from gemma_cot.testing import check_kernel, report

SMALL = {"block_C": 16, "block_V": 32}  # several tiles a case, the last one over the edge


def draw(C, D, V, seed=0):
    rng = np.random.default_rng(seed)
    x_CD, embed_VD = rng.normal(size=(C, D)), rng.normal(size=(V, D))
    target_C = jnp.asarray(rng.integers(0, V, C), jnp.int32)
    return jnp.asarray(x_CD, jnp.float32), jnp.asarray(embed_VD, jnp.float32), target_C


def test_equals_the_reference_in_value_and_gradient():
    outcomes = check_kernel("chosen_logprob", partial(chosen_logprob, **SMALL))
    assert len(outcomes) == 5 * 2 * 4, "5 cases, 2 dtypes, 2 values and 2 gradients"
    assert all(o.passed for o in outcomes), report(outcomes)


def test_first_and_last_token_of_a_tile_and_of_the_vocabulary_are_found():
    x_CD, embed_VD, _ = draw(6, 8, 67)
    target_C = jnp.asarray([0, 31, 32, 63, 64, 66], jnp.int32)
    got_C, _ = chosen_logprob(x_CD, embed_VD, target_C, **SMALL)
    logits_CV = np.asarray(x_CD, np.float64) @ np.asarray(embed_VD, np.float64).T
    want_C = [
        row[y] - np.log(np.exp(row).sum()) for row, y in zip(logits_CV, target_C, strict=True)
    ]
    np.testing.assert_allclose(got_C, want_C, rtol=2e-6)


def test_large_logits_neither_overflow_nor_lose_the_entropy():
    # Logits 300 + {0, 1, 2}: e^300 is infinite in float32, the entropy is that of {0, 1, 2}.
    embed_VD = jnp.asarray([[300.0], [301.0], [302.0]], jnp.float32)
    ones_CD, target_C = jnp.ones((1, 1), jnp.float32), jnp.asarray([1], jnp.int32)
    logp_C, entropy_C = chosen_logprob(ones_CD, embed_VD, target_C, block_C=16, block_V=2)
    p_V = np.exp([0.0, 1.0, 2.0]) / np.exp([0.0, 1.0, 2.0]).sum()
    np.testing.assert_allclose(logp_C, np.log(p_V[1:2]), rtol=1e-6)
    np.testing.assert_allclose(entropy_C, [-(p_V * np.log(p_V)).sum()], rtol=1e-6)


def test_gradient_of_entropy_alone_equals_the_reference():
    x_CD, embed_VD, target_C = draw(5, 6, 40)

    def entropy(function, x_CD):
        return function(x_CD, embed_VD, target_C, 0.8)[1].sum()

    got_CD = jax.grad(partial(entropy, partial(chosen_logprob, **SMALL)))(x_CD)
    want_CD = jax.grad(partial(entropy, reference.chosen_logprob))(x_CD)
    assert np.abs(want_CD).max() > 0.1
    np.testing.assert_allclose(got_CD, want_CD, atol=2e-6)


def biggest_array(jaxpr) -> int:
    """Return the size of the largest array of a program, those inside its kernels included."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            sizes += [biggest_array(inner)] if hasattr(inner, "eqns") else []
    return max(sizes)


def test_no_array_of_positions_times_vocabulary_exists():
    x_CD, embed_VD, target_C = draw(64, 4, 512)

    def loss(function, x_CD):
        return function(x_CD, embed_VD, target_C, 1.0)[0].sum()

    def biggest(function):
        return biggest_array(jax.make_jaxpr(jax.grad(partial(loss, function)))(x_CD).jaxpr)

    assert biggest(reference.chosen_logprob) == 64 * 512
    assert biggest(partial(chosen_logprob, **SMALL)) == 512 * 4, "the embedding's own gradient"
