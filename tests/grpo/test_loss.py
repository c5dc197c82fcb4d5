"""Weights and loss equal their NumPy twins, in value and gradient, and what must hold.

The proof of the KL table, on a categorical policy enumerated exactly, is in test_kl.py.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from grpo_reference import (
    reference_gradient,
    reference_kl_penalty,
    reference_loss,
    reference_weights,
)

from gemma_cot.grpo.loss import (
    OBJECTIVES,
    group_advantages,
    grpo_loss,
    kl_penalty,
    token_weights,
)

# float32 has 24 bits (6e-8); sums of 30 products of exponentials lose a digit or two of them.
CLOSE = dict(rtol=1e-5, atol=1e-6)
AGGREGATIONS = ("grpo", "dapo", "dr_grpo")
KINDS = ("k1", "k2", "k3", "ratio_k3")
KINDS_AND_OBJECTIVES = [(kind, "grpo") for kind in KINDS] + [("k1", name) for name in OBJECTIVES]
L_MAX = 9
# Uneven lengths: 6, 1 (a stop token alone), 4, none at all, 3 with a hole, 6, 2, 3 tokens.
MASK_BT = np.array(
    [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 1, 0],
        [0, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 0, 0, 0, 0],
        [0, 1, 1, 1, 0, 0, 0],
    ],
    bool,
)


def draw_batch(seed: int = 0, spread: float = 0.3) -> dict[str, np.ndarray]:
    """Return float32 log-probs (policy, old, reference) about `spread` apart, and advantages."""
    rng = np.random.default_rng(seed)
    logp_BT = -rng.gamma(2.0, 1.0, MASK_BT.shape)
    near = [logp_BT + rng.normal(0.0, spread, MASK_BT.shape) for _ in range(2)]
    advantage_B = rng.normal(0.0, 1.0, len(MASK_BT))
    arrays = {"logp": logp_BT, "old": near[0], "ref": near[1], "advantage": advantage_B}
    return {name: value.astype(np.float32) for name, value in arrays.items()}


def loss_and_gradient(logp_BT, *arguments, **options):
    """Return (loss, d loss / d logp_BT) of our loss as NumPy arrays."""
    arguments = [None if x is None else jnp.asarray(x) for x in arguments]
    (loss, _), grad_BT = jax.value_and_grad(grpo_loss, has_aux=True)(
        jnp.asarray(logp_BT), *arguments, **options
    )
    return np.asarray(loss), np.asarray(grad_BT)


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_weights_equal_the_loop(aggregation):
    weight_BT = token_weights(jnp.asarray(MASK_BT), aggregation, L_MAX)
    assert weight_BT.dtype == jnp.float32
    np.testing.assert_allclose(weight_BT, reference_weights(MASK_BT, aggregation, L_MAX), rtol=1e-6)
    assert (np.asarray(weight_BT)[~MASK_BT] == 0).all()


def test_weights_as_a_picture():
    # Rows of 2 and 1 tokens, B = 2: 1/(2*2) and 1/(2*1); 1/3; 1/(2*4).
    mask_BT = jnp.asarray([[False, True, True], [False, True, False]])
    picture = {
        "grpo": [[0, 0.25, 0.25], [0, 0.5, 0]],
        "dapo": [[0, 1 / 3, 1 / 3], [0, 1 / 3, 0]],
        "dr_grpo": [[0, 0.125, 0.125], [0, 0.125, 0]],
    }
    for aggregation, expected in picture.items():
        np.testing.assert_allclose(token_weights(mask_BT, aggregation, 4), expected, rtol=1e-6)


def test_weights_sum_to_one():
    full_BT = jnp.asarray(MASK_BT[MASK_BT.any(axis=1)])
    assert float(token_weights(full_BT, "grpo").sum()) == pytest.approx(1.0, rel=1e-6)
    assert float(token_weights(full_BT, "dapo").sum()) == pytest.approx(1.0, rel=1e-6)
    # Dr. GRPO's constant is the longest completion: 1 only when all rows have that length.
    long_BT = jnp.ones((3, 5), bool)
    assert float(token_weights(long_BT, "dr_grpo", 5).sum()) == pytest.approx(1.0, rel=1e-6)


def test_an_empty_batch_has_no_weight_and_no_nan():
    empty_BT = jnp.zeros((2, 3), bool)
    with jax.debug_nans(True):
        for aggregation in AGGREGATIONS:
            assert (token_weights(empty_BT, aggregation, 3) == 0).all()


# ---- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "on_policy"), list(itertools.product(KINDS, (False, True))))
def test_loss_and_gradient_equal_the_loop(kind, on_policy):
    grid = itertools.product(AGGREGATIONS, (0.0, 0.3), ((0.2, 0.2), (0.1, 0.4)))
    for seed, (aggregation, beta, (low, high)) in enumerate(grid):
        batch = draw_batch(seed)
        weight_BT = reference_weights(MASK_BT, aggregation, L_MAX).astype(np.float32)
        old_BT = batch["logp"] if on_policy else batch["old"]
        rest = (batch["ref"], batch["advantage"], weight_BT)
        loss, grad_BT = loss_and_gradient(
            batch["logp"], None if on_policy else old_BT, *rest,
            epsilon_low=low, epsilon_high=high, beta=beta, kl=kind,
        )  # fmt: skip
        settings = (low, high, beta, kind)
        twin = reference_loss(batch["logp"], old_BT, *rest, *settings)
        np.testing.assert_allclose(loss, twin, **CLOSE)
        twin_BT = reference_gradient(batch["logp"], old_BT, *rest, *settings)
        np.testing.assert_allclose(grad_BT, twin_BT, **CLOSE)
        assert (grad_BT[~MASK_BT] == 0).all() and np.abs(grad_BT).max() > 1e-3


@pytest.mark.parametrize("on_policy", (False, True))
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_and_its_gradient_equal_the_loop(objective, on_policy):
    """Ratios on both sides of both bounds, of tokens, means and whole completions."""
    grid = zip(AGGREGATIONS, ((0.2, 0.2), (0.1, 0.4), (0.9, 4.0)), strict=True)
    clipped = set()
    for seed, (aggregation, (low, high)) in enumerate(grid):
        batch = draw_batch(seed)
        weight_BT = reference_weights(MASK_BT, aggregation, L_MAX).astype(np.float32)
        old_BT = batch["logp"] if on_policy else batch["old"]
        rest = (batch["ref"], batch["advantage"], weight_BT)
        options = dict(epsilon_low=low, epsilon_high=high, beta=0.1, objective=objective)
        given = (batch["logp"], None if on_policy else old_BT, *rest)
        loss, grad_BT = loss_and_gradient(*given, **options)
        settings = (low, high, 0.1, "ratio_k3", objective)
        twin = reference_loss(batch["logp"], old_BT, *rest, *settings)
        np.testing.assert_allclose(loss, twin, **CLOSE)
        twin_BT = reference_gradient(batch["logp"], old_BT, *rest, *settings)
        np.testing.assert_allclose(grad_BT, twin_BT, **CLOSE)
        assert (grad_BT[~MASK_BT] == 0).all() and np.abs(grad_BT).max() > 1e-3
        device = [None if x is None else jnp.asarray(x) for x in given]
        clipped.add(float(grpo_loss(*device, **options)[1]["clip_share"]) > 0)
    assert clipped == ({False} if on_policy else {False, True})


def test_objectives_as_a_picture():
    """Two tokens with ratios 2 and 1/2, one completion: their geometric mean and product are 1."""
    logp_BT = np.log(np.array([[0.5, 0.25]], np.float32))
    old_BT = np.log(np.array([[0.25, 0.5]], np.float32))
    one_BT, good = np.ones((1, 2), np.float32), np.ones(1, np.float32)
    expected = {  # of each token: d objective / d logp, negated, with A = 1, bounds 0.8 and 1.2
        "grpo": [0.0, -0.5],  # 2 is clipped; 1/2 of a good token is not
        "gspo": [-1.0, -1.0],  # d sqrt(x y) / d log x = 1/2, and both tokens hold it
        "rloo": [-2.0, -2.0],  # d (x y) / d log x = 1, twice
        "cispo": [-1.2, -0.5],  # 2 weighs 1.2 and is learnt from all the same
    }
    shares = {"grpo": 1.0, "gspo": 0.0, "rloo": 0.0, "cispo": 1.0}
    for objective, gradient in expected.items():
        _, grad_BT = loss_and_gradient(logp_BT, old_BT, None, good, one_BT, objective=objective)
        np.testing.assert_allclose(grad_BT, [gradient], rtol=1e-6)
        device = [jnp.asarray(x) for x in (logp_BT, old_BT)]
        _, metrics = grpo_loss(*device, None, good, jnp.asarray(one_BT), objective=objective)
        assert float(metrics["clip_share"]) == shares[objective]


def test_on_policy_objectives_have_the_gradients_of_their_papers():
    """rho = 1: GRPO, GSPO and CISPO have A/n_i on every token, RLOO A (REINFORCE, a sum); 1/B."""
    batch = draw_batch(6)
    weight_BT = reference_weights(MASK_BT, "grpo", L_MAX).astype(np.float32)
    n_B1 = np.maximum(MASK_BT.sum(axis=1, keepdims=True), 1)
    reinforce_BT = -batch["advantage"][:, None] * MASK_BT / len(MASK_BT)
    for objective in OBJECTIVES:
        _, grad_BT = loss_and_gradient(
            batch["logp"], None, None, batch["advantage"], weight_BT, objective=objective
        )
        twin_BT = reinforce_BT if objective == "rloo" else reinforce_BT / n_B1
        np.testing.assert_allclose(grad_BT, twin_BT, **CLOSE)


def test_group_and_leave_one_out_differ_by_a_factor_of_the_learning_rate():
    """Dr. GRPO's gradient is RLOO's times (G - 1)/G / L_max: arXiv:2503.20783, appendix A."""
    reward_PG = np.array([[1.0, 0.0, 2.0, 0.5], [0.0, 0.0, 1.0, 1.0]], np.float32)
    logp_BT = draw_batch(7)["logp"]
    gradients = []
    for objective, aggregation, baseline in (
        ("rloo", "grpo", "leave_one_out"), ("grpo", "dr_grpo", "mean")
    ):  # fmt: skip
        advantage_PG = group_advantages(jnp.asarray(reward_PG), scale="none", baseline=baseline)
        weight_BT = token_weights(jnp.asarray(MASK_BT), aggregation, L_MAX)
        _, grad_BT = loss_and_gradient(
            logp_BT, None, None, advantage_PG.reshape(-1), weight_BT, objective=objective
        )
        gradients.append(grad_BT)
    np.testing.assert_allclose(gradients[1], gradients[0] * 3 / 4 / L_MAX, **CLOSE)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_penalty_of_a_completion_is_the_sum_over_its_tokens(kind):
    batch = draw_batch(8)
    old, ref = (np.where(MASK_BT, batch[name], -np.inf) for name in ("old", "ref"))
    ours = kl_penalty(jnp.asarray(old), jnp.asarray(ref), jnp.asarray(MASK_BT), kind)
    twin = reference_kl_penalty(batch["old"], batch["ref"], MASK_BT, kind)
    np.testing.assert_allclose(ours, twin, **CLOSE)
    stacked = [jnp.asarray(x)[:, None] for x in (old, ref, MASK_BT)]  # [M, rows, T], as in a step
    np.testing.assert_array_equal(kl_penalty(*stacked, kind)[:, 0], ours)
    assert ours[3] == 0.0 and np.abs(ours).max() > 0.01


@pytest.mark.parametrize(
    ("aggregation", "kind"), [("grpo", "ratio_k3"), ("dapo", "k2"), ("dr_grpo", "k3")]
)
def test_micro_batches_do_not_change_the_gradient(aggregation, kind):
    batch = draw_batch(2)
    weight_BT = np.asarray(token_weights(jnp.asarray(MASK_BT), aggregation, L_MAX))
    arrays = [batch[name] for name in ("logp", "old", "ref", "advantage")] + [weight_BT]
    whole, whole_BT = loss_and_gradient(*arrays, beta=0.2, kl=kind)
    for micro in (1, 2, 4):
        parts = [
            loss_and_gradient(*(x[at : at + micro] for x in arrays), beta=0.2, kl=kind)
            for at in range(0, len(MASK_BT), micro)
        ]
        # A row's gradient is the row's alone: not one bit may move with its neighbours.
        np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), whole_BT)
        np.testing.assert_allclose(sum(part[0] for part in parts), whole, **CLOSE)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_is_removed(aggregation):
    """Columns of padding around the completion change neither loss nor gradient."""
    batch = draw_batch(3)
    weight_BT = np.asarray(token_weights(jnp.asarray(MASK_BT), aggregation, L_MAX))
    short = [batch[name] for name in ("logp", "old", "ref")]
    loss, grad_BT = loss_and_gradient(*short, batch["advantage"], weight_BT, beta=0.2)
    rubbish = ((0, 0), (2, 3))
    wide = [np.pad(x, rubbish, constant_values=-np.inf) for x in short]
    wide_weight_BT = np.asarray(
        token_weights(jnp.asarray(np.pad(MASK_BT, rubbish)), aggregation, L_MAX)
    )
    wide_loss, wide_BT = loss_and_gradient(*wide, batch["advantage"], wide_weight_BT, beta=0.2)
    np.testing.assert_allclose(wide_loss, loss, **CLOSE)
    np.testing.assert_allclose(wide_BT, np.pad(grad_BT, rubbish), **CLOSE)


def test_on_policy_the_value_is_zero_but_the_gradient_is_not():
    # rho = 1, so a row's loss is -w A sum(mask); A of two rows cancel. d loss / d logp = -w A.
    mask_BT = jnp.asarray([[True, True], [True, True]])
    weight_BT = token_weights(mask_BT)
    logp_BT = jnp.asarray([[-1.0, -2.0], [-0.5, -3.0]])
    advantage_B = jnp.asarray([1.5, -1.5])
    loss, grad_BT = loss_and_gradient(logp_BT, None, None, advantage_B, weight_BT)
    assert loss == 0.0
    np.testing.assert_allclose(grad_BT, [[-0.375, -0.375], [0.375, 0.375]])  # 1.5 / (2 * 2)
    _, metrics = grpo_loss(logp_BT, None, None, advantage_B, weight_BT)
    assert float(metrics["ratio_max"]) == 1.0 and float(metrics["clip_share"]) == 0.0


@pytest.mark.parametrize("kind", ["k2", "k3", "ratio_k3"])
def test_kl_is_zero_with_zero_gradient_at_the_reference(kind):
    batch = draw_batch(4)
    weight_BT = np.asarray(token_weights(jnp.asarray(MASK_BT)))
    loss, grad_BT = loss_and_gradient(
        batch["logp"], None, batch["logp"], np.zeros(8, np.float32), weight_BT, beta=1.0, kl=kind
    )
    assert loss == 0.0 and (grad_BT == 0).all()


def test_a_reference_without_beta_is_measured_and_not_in_the_loss():
    batch = draw_batch(5)
    weight_BT = jnp.asarray(reference_weights(MASK_BT, "dapo", L_MAX).astype(np.float32))
    arguments = [jnp.asarray(batch[n]) for n in ("logp", "old", "ref", "advantage")] + [weight_BT]
    loss, metrics = grpo_loss(*arguments)
    without, unmeasured = grpo_loss(*arguments[:2], None, *arguments[3:])
    assert float(loss) == float(without)
    assert unmeasured.keys() == metrics.keys() - {"kl"}  # not 0: nobody measured it
    d_BT = (batch["ref"] - batch["logp"]).astype(np.float64)[MASK_BT]
    np.testing.assert_allclose(metrics["kl"], (np.exp(d_BT) - d_BT - 1).sum(), **CLOSE)


def test_extreme_logps_stay_finite():
    """No NaN and no infinity, in value or gradient, at log-ratios of +-300 or behind the mask."""
    far = np.array([[-300.0, 0.0, -300.0, 0.0, -np.inf]], np.float32)
    old = np.array([[0.0, -300.0, -300.0, 0.0, 0.0]], np.float32)
    ref = np.array([[0.0, -300.0, 0.0, -300.0, -np.inf]], np.float32)
    weight_BT = np.array([[0.25, 0.25, 0.25, 0.25, 0.0]], np.float32)
    for (kind, objective), A in itertools.product(KINDS_AND_OBJECTIVES, (1.0, -1.0)):
        for old_BT in (old, None):
            advantage_B = np.array([A], np.float32)
            loss, grad_BT = loss_and_gradient(
                far, old_BT, ref, advantage_B, weight_BT, beta=0.1, kl=kind, objective=objective
            )
            assert np.isfinite(loss) and np.isfinite(grad_BT).all()
            assert grad_BT[0, -1] == 0.0


def test_infinite_logps_behind_the_mask_leave_no_nan():
    """inf * 0: the first column is real, the others hold every infinity that padding could."""
    inf = np.inf
    rows = [[-1.0, -inf, inf, -inf, inf], [-1.1, -inf, -inf, inf, 0.0], [-0.9, inf, -inf, 0.0, inf]]
    arrays = [np.array([row], np.float32) for row in rows]
    weight_BT = np.array([[1.0, 0.0, 0.0, 0.0, 0.0]], np.float32)
    advantage_B = np.ones(1, np.float32)
    for kind, objective in KINDS_AND_OBJECTIVES:
        options = dict(beta=0.1, kl=kind, objective=objective)
        loss, grad_BT = loss_and_gradient(*arrays, advantage_B, weight_BT, **options)
        calm = [np.where(weight_BT > 0, x, np.float32(0.0)) for x in arrays]
        one, one_BT = loss_and_gradient(*calm, advantage_B, weight_BT, **options)
        assert loss == one and grad_BT[0, 0] == one_BT[0, 0]
        assert (grad_BT[0, 1:] == 0).all()


@pytest.mark.parametrize(
    ("ratio", "A", "high", "clipped"),
    [
        (1.25, 1.0, 0.2, True),  # a good token has risen enough: no more gradient
        (1.25, 1.0, 0.28, False),  # clip-higher lets it rise on
        (1.30, 1.0, 0.28, True),
        (0.75, 1.0, 0.2, False),  # a good token that fell may always come back
        (0.75, -1.0, 0.2, True),  # a bad token has fallen enough
        (0.75, -1.0, 0.28, True),  # the lower bound is its own setting
        (1.25, -1.0, 0.2, False),  # a bad token that rose is always pushed down
    ],
)
def test_clipping_and_clip_higher(ratio, A, high, clipped):
    logp_BT = np.log(np.array([[ratio]], np.float32))
    zero_BT, one_BT = np.zeros((1, 1), np.float32), np.ones((1, 1), np.float32)
    arguments = (zero_BT, None, np.array([A], np.float32), one_BT)
    _, grad_BT = loss_and_gradient(logp_BT, *arguments, epsilon_low=0.2, epsilon_high=high)
    expected = 0.0 if clipped else -ratio * A  # d(-rho A)/d logp = -rho A
    np.testing.assert_allclose(grad_BT, [[expected]], rtol=1e-6)
    device = [None if x is None else jnp.asarray(x) for x in (logp_BT, *arguments)]
    metrics = grpo_loss(*device, epsilon_low=0.2, epsilon_high=high)[1]
    assert float(metrics["clip_share"]) == float(clipped)
    assert float(metrics["ratio_max"]) == pytest.approx(ratio, rel=1e-6)


# ---- errors -------------------------------------------------------------------------------------


def test_unknown_names_are_refused():
    ones = jnp.ones((1, 2))
    with pytest.raises(ValueError, match="scale: must be group, batch or none, got 'std'"):
        group_advantages(ones, scale="std")
    with pytest.raises(ValueError, match="baseline: must be mean or leave_one_out, got 'others'"):
        group_advantages(ones, baseline="others")
    with pytest.raises(ValueError, match="objective: must be one of .* got 'ppo'"):
        grpo_loss(ones, None, None, jnp.ones(1), ones, objective="ppo")
    with pytest.raises(ValueError, match="aggregation: must be .* got 'mean'"):
        token_weights(ones, "mean")
    with pytest.raises(ValueError, match="got 'dr_grpo' with None"):
        token_weights(ones, "dr_grpo")
    with pytest.raises(ValueError, match="kl: must be .* got 'k4'"):
        grpo_loss(ones, None, ones, jnp.ones(1), ones, beta=0.1, kl="k4")
    with pytest.raises(ValueError, match="beta: 0.1 needs logp_ref_BT"):
        grpo_loss(ones, None, None, jnp.ones(1), ones, beta=0.1)
