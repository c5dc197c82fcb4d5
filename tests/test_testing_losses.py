"""The bench for losses passes every loss of ours and catches planted bugs, each by its own row."""

import doctest
from functools import partial

import jax.numpy as jnp
import pytest

from gemma_cot.grpo.loss import OBJECTIVES, grpo_loss, token_weights
from gemma_cot.testing import check_loss, losses, report

ALL = {
    "the whole batch at once", "micro-batches of 1 row", "micro-batches of 2 rows",
    "micro-batches of 4 rows", "rows in another order", "3 more columns on the left",
    "2 more columns on the right", "rubbish outside the mask", "2 devices", "4 devices",
}  # fmt: skip


def failed(loss, **options) -> set[str]:
    outcomes = check_loss(loss, **options)
    assert {o.case for o in outcomes} == ALL
    return {o.case for o in outcomes if not o.passed}


@pytest.mark.parametrize("kl", ["k1", "k2", "k3", "ratio_k3"])
def test_grpo_depends_on_nothing_it_should_not(kl):
    assert not failed(partial(grpo_loss, beta=0.2, kl=kl))


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "grpo"])
def test_no_objective_does(objective):
    assert not failed(partial(grpo_loss, objective=objective, beta=0.1))


@pytest.mark.parametrize("aggregation", ["grpo", "dapo", "dr_grpo"])
def test_no_aggregation_does(aggregation):
    def on_policy(logp_BT, _, logp_ref_BT, *rest):
        return grpo_loss(logp_BT, None, logp_ref_BT, *rest, beta=0.1)

    weights = partial(token_weights, aggregation=aggregation, max_completion_tokens=7)
    assert not failed(on_policy, weights=weights)


def test_sft_does_not():
    def loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
        return -(weight_BT * logp_BT).sum()

    assert not failed(loss)


def test_the_mean_of_means_is_caught_by_micro_batches():
    def loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
        mask_BT = (weight_BT > 0).astype(jnp.float32)
        mean = (mask_BT * logp_BT * advantage_B[:, None]).sum() / jnp.maximum(mask_BT.sum(), 1)
        return -mean, {"tokens": mask_BT.sum()}

    assert failed(loss) == {case for case in ALL if "micro" in case}


def test_a_mean_over_padding_is_caught_by_columns():
    def loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
        return -(weight_BT * logp_BT).sum() / logp_BT.shape[1]

    assert failed(loss) == {case for case in ALL if "columns" in case}


def test_the_place_of_a_row_is_caught_by_order():
    def loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
        first_half_B = (jnp.arange(len(advantage_B)) < len(advantage_B) // 2).astype(jnp.float32)
        return -(weight_BT * logp_BT * first_half_B[:, None]).sum()

    assert "rows in another order" in failed(loss)


def test_an_unmasked_exponential_is_caught_by_rubbish():
    def loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
        return -(weight_BT * jnp.exp(logp_BT - logp_old_BT) * advantage_B[:, None]).sum()

    assert failed(loss) == {"rubbish outside the mask"}


def test_a_loss_without_gradient_and_one_that_raises_are_named():
    outcomes = check_loss(lambda logp_BT, *rest: rest[-1].sum())
    assert "is 0 everywhere" in report(outcomes)

    def raises(*_):
        raise RuntimeError("no such luck")

    outcomes = check_loss(raises)
    assert {o.message for o in outcomes} == {"RuntimeError: no such luck"}


def test_the_example_in_the_docstring_runs():
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    (example,) = doctest.DocTestFinder(recurse=False).find(losses, "losses", globs={})
    assert runner.run(example) == (0, 3)
