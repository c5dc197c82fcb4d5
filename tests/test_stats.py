"""Intervals and tests against hand-derived literals and brute-force sums in exact fractions."""

import math
from fractions import Fraction

import pytest

from gemma_cot import stats


def test_wilson_of_a_published_sized_rate():
    # 773/849 = 0.910483; z²/n = 0.00452476; centre 0.912746, half
    # 1.959964 * sqrt(0.910483*0.089517/849 + 0.00452476/(4*849)) = 0.019337;
    # (0.912746 -+ 0.019337) / 1.00452476 = 0.88938, 0.92788.
    low, high = stats.wilson(773, 849)
    assert low == pytest.approx(0.88938, abs=1e-5)
    assert high == pytest.approx(0.92788, abs=1e-5)


@pytest.mark.parametrize(("successes", "n"), [(1, 3), (5, 10), (60, 61), (773, 849)])
def test_wilson_ends_solve_the_score_equation(successes, n):
    # Definition: the ends are the rates p0 with (p - p0)² = z² p0 (1 - p0) / n.
    for p0 in stats.wilson(successes, n):
        assert (successes / n - p0) ** 2 == pytest.approx(
            stats.Z95**2 * p0 * (1 - p0) / n, rel=1e-9
        )


def test_wilson_at_the_edges():
    # At p = 0: low = 0, high = (z²/n) / (1 + z²/n) = z² / (n + z²) = 3.841459 / 13.841459.
    assert stats.wilson(0, 10) == (0.0, pytest.approx(0.277533, abs=1e-6))
    assert stats.wilson(10, 10) == (pytest.approx(1 - 0.277533, abs=1e-6), 1.0)
    assert stats.wilson(0, 0) == (0.0, 1.0)
    for n in range(1, 300):  # no float dust below 0 or above 1
        assert stats.wilson(0, n)[0] == 0.0 and stats.wilson(n, n)[1] == 1.0
    low, high = stats.wilson(5, 10)
    assert low + high == pytest.approx(1.0)  # symmetric about one half
    wide = stats.wilson(5, 10, z=3.0)
    assert wide[0] < low and high < wide[1]


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3), (0, -1)])
def test_wilson_refuses_what_are_not_counts(successes, n):
    with pytest.raises(ValueError, match="between 0 and n"):
        stats.wilson(successes, n)


def brute_force_p(b: int, c: int) -> Fraction:
    """Sum the probability of every outcome at most as likely as the observed one."""
    n = b + c
    chance = [Fraction(math.comb(n, i), 2**n) for i in range(n + 1)]
    return sum(p for p in chance if p <= chance[b])


@pytest.mark.parametrize(
    ("b", "c"), [(0, 0), (1, 0), (0, 5), (2, 9), (9, 2), (7, 7), (7, 8), (30, 41), (0, 40)]
)
def test_mcnemar_equals_the_brute_force_sum(b, c):
    # Binomial(n, 1/2) is symmetric and unimodal: "at most as likely" is both tails.
    assert stats.mcnemar_exact(b, c) == pytest.approx(float(brute_force_p(b, c)), rel=1e-12)


def test_mcnemar_literals():
    assert stats.mcnemar_exact(0, 5) == 2 / 32  # both ends of 2^5 coin sequences
    assert stats.mcnemar_exact(3, 3) == 1.0  # twice the lower half exceeds 1
    assert stats.mcnemar_exact(2, 9) == 2 * (1 + 11 + 55) / 2**11


def test_mcnemar_stands_thousands():
    # Normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c).
    z = (2100 - 1900 - 1) / math.sqrt(4000)
    assert stats.mcnemar_exact(1900, 2100) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=5e-3)
    assert stats.mcnemar_exact(0, 5000) == 0.0  # 2^-4999 is below the smallest float
    assert stats.mcnemar_exact(5000, 5000) == 1.0


def test_mcnemar_refuses_negative_counts():
    with pytest.raises(ValueError, match="0 or more"):
        stats.mcnemar_exact(-1, 2)


def test_mean_interval_by_hand():
    # mean 0.5, deviations -0.25, 0, 0.25: s² = 0.125 / 2, half = z * 0.25 / sqrt(3).
    mean, low, high = stats.mean_interval([0.25, 0.5, 0.75])
    half = 1.959964 * 0.25 / math.sqrt(3)
    assert (mean, low, high) == pytest.approx((0.5, 0.5 - half, 0.5 + half))


def test_mean_interval_with_little_to_go_on():
    assert stats.mean_interval([]) == (0.0, 0.0, 1.0)
    assert stats.mean_interval([0.3]) == (0.3, 0.0, 1.0)
    assert stats.mean_interval([0.0, 1.0]) == (0.5, 0.0, 1.0)  # half = z/2 > 0.5, cut
    assert stats.mean_interval([0.5] * 4) == (0.5, 0.5, 0.5)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_mean_interval_refuses_scores_out_of_range(value):
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        stats.mean_interval([0.5, value])
