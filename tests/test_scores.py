"""Several completions of a row: pass@k, votes, intervals over rows; two evaluations row by row."""

import itertools
import math

import numpy as np
import pytest

from gemma_cot.scores import (
    budgets,
    changed_rows,
    fold_samples,
    majority,
    pair_rows,
    paired,
    pass_at_k,
    rate_interval,
    verdict,
)
from gemma_cot.stats import mcnemar_exact, wilson


@pytest.mark.parametrize(("n", "right", "k"), [*itertools.product([4, 5], [0, 1, 3, 4], [1, 2, 4])])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, right, k):
    draws = list(itertools.combinations([True] * right + [False] * (n - right), k))
    assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize("counts", [(4, 5, 1), (4, 1, 5), (4, 1, 0), (4, -1, 1)])
def test_pass_at_k_refuses_impossible_counts(counts):
    with pytest.raises(ValueError, match="pass_at_k: k and the right completions"):
        pass_at_k(*counts)


def test_budgets_are_the_powers_of_two_below_k_and_k():
    assert [budgets(k) for k in (1, 2, 4, 6, 8)] == [
        [1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["3", "4", "4"], 1),
        (["3", "4", "4.0", "3", "5"], 0),  # a tie: the group that was begun first
        (["1,000", "7", "1000"], 0),  # spelt otherwise, the same answer
        ([None, " ", "\u3164", "9"], 3),  # who gives no answer does not vote
        ([None, ""], None),
        (["4 or 5", "3", "4 or 5"], 0),  # no answer matches two values, but these are one text
    ],
)
def test_majority(answers, winner):
    assert majority(answers, "math") == winner


def test_votes_count_the_same_answer_once_for_its_domain():
    assert majority(["[1, 2]", "[1,2]", "(1, 2)"], "code") == 0
    assert majority(["(1, 2)", "[1, 2]", "[1,2]"], "code") == 1  # a tuple is no list


def sample(answer: str, outcome: float | None, tokens: int = 10) -> dict:
    return {
        "completion": f"<reasoning>r</reasoning><answer>{answer}</answer>", "format": 1.0,
        "process": None, "outcome": outcome, "num_tokens": tokens, "stop_reason": "stop",
        "repetition": 0.5, "checkpoints_literal": 0, "checkpoints_normalised": 1,
    }  # fmt: skip


def test_folding_gives_means_and_the_score_of_the_majority():
    samples = [sample("3", 0.0), sample("3", 0.0, 20), sample("4", 1.0, 30), sample("8", 0.0)]
    row = fold_samples(samples, "math")
    assert row["samples"] == samples
    assert (row["outcome"], row["majority"], row["num_tokens"]) == (0.25, 0.0, 17.5)
    assert (row["process"], row["repetition"], row["checkpoints_normalised"]) == (None, 0.5, 1)
    assert fold_samples([sample("4", 1.0), *samples], "math")["majority"] == 1.0  # a tie, 4 first
    assert fold_samples([sample("3", None)] * 2, "math")["majority"] is None  # there is no gold
    assert fold_samples([sample(" ", 0.0)] * 2, "math")["majority"] == 0.0  # nobody answers


# Intervals


def test_interval_of_zeros_and_ones_is_wilsons():
    for right in (0, 3, 7):
        assert rate_interval([1.0] * right + [0.0] * (7 - right), k=4) == wilson(right, 7)


def test_interval_over_rows_covers_and_is_no_wider_than_need_be():
    """60 rows of 4 completions with a rate each, uniform in 0..1: the mean is 1/2. A Wilson
    interval over 240 independent completions would cover less than 95 %: rows are clusters."""
    rng = np.random.default_rng(0)
    covered = naive = 0
    for _ in range(2000):
        right_P = rng.binomial(4, rng.uniform(size=60))
        low, high = rate_interval((right_P / 4).tolist(), 4)
        covered += low <= 0.5 <= high
        low, high = wilson(int(right_P.sum()), 240)
        naive += low <= 0.5 <= high
    # four standard deviations of a share of 0.95 in 2000 draws: 1.9 points
    assert abs(covered / 2000 - 0.95) < 0.019 and naive / 2000 < 0.9


def test_interval_is_never_that_of_more_than_all_completions():
    low, high = rate_interval([0.5] * 99 + [0.75], 4)  # hardly any variance
    assert (low, high) == pytest.approx(wilson(0.5025 * 400, 400))
    assert rate_interval([0.5] * 9, 4) == wilson(4.5, 9)  # none at all: as if rows were 0 or 1
    assert rate_interval([], 4) == (0.0, 1.0)


# Two evaluations


def row(number: int, **scores) -> dict:
    return {"id": number, "domain": "math", "prompt": f"p{number}", "completion": "c"} | {
        "format": 1.0, "process": 0.2, "outcome": 1.0} | scores  # fmt: skip


def test_binary_scores_by_mcnemar_and_agresti_min():
    before = [row(i, outcome=float(i < 30)) for i in range(100)]
    after = [row(i, outcome=float(10 <= i < 60)) for i in range(100)]
    test = paired(pair_rows(before, after), "outcome")
    assert (test["gained"], test["lost"], test["n"]) == (30, 10, 100)
    assert test["p_value"] == mcnemar_exact(10, 30) and test["method"] == "McNemar exact"
    # cells 30.5 and 10.5 of 102: 20/102 +- 1.96 sqrt(41 - 400/102)/102
    half = 1.959964 * math.sqrt(41 - 400 / 102) / 102
    assert test["interval"] == pytest.approx([20 / 102 - half, 20 / 102 + half])
    assert test["difference"] == pytest.approx(0.2) and test["verdict"] == "improved"
    assert paired(pair_rows(after, before), "outcome")["verdict"] == "got worse"


def test_scores_that_do_not_differ_have_an_interval_of_some_width():
    pairs = pair_rows([row(i) for i in range(50)], [row(i) for i in range(50)])
    test = paired(pairs, "outcome")
    assert test["interval"] == pytest.approx([-1.959964 / 52, 1.959964 / 52])
    assert test["verdict"] == "no difference shown" and test["p_value"] == 1.0


def test_means_by_the_sign_test_and_the_normal_interval():
    moves = [0.25] * 12 + [-0.25] * 2 + [0.0] * 6
    before = [row(i, outcome=0.5) for i in range(20)]
    after = [row(i, outcome=0.5 + move) for i, move in enumerate(moves)]
    test = paired(pair_rows(before, after), "outcome")
    half = 1.959964 * np.std(moves, ddof=1) / math.sqrt(20)
    assert test["interval"] == pytest.approx([0.125 - half, 0.125 + half])
    assert test["p_value"] == mcnemar_exact(2, 12) and test["method"].startswith("sign test")


def test_rows_without_a_score_are_left_out():
    before = [row(1, outcome=None), row(2, outcome=0.0), row(3)]
    after = [row(2), row(1), row(9)]
    assert paired(pair_rows(before, after), "outcome")["n"] == 1
    assert paired(pair_rows(before, after), "majority") is None


def test_other_rows_are_refused():
    with pytest.raises(ValueError, match="1 of 2 common ids with another prompt"):
        pair_rows([row(1), row(2)], [row(1), row(2, prompt="other")])
    with pytest.raises(ValueError, match="0 of 0 common ids"):
        pair_rows([row(1)], [row(2)])


@pytest.mark.parametrize(
    ("interval", "p_value", "words"),
    [
        ((0.001, 0.2), 0.04, "improved"),
        ((-0.2, -0.001), 0.04, "got worse"),
        ((-0.001, 0.2), 0.04, "no difference shown"),
        ((0.0, 0.2), 0.04, "no difference shown"),
        ((0.001, 0.2), 0.06, "no difference shown"),
    ],
)
def test_nothing_improved_while_the_interval_covers_zero(interval, p_value, words):
    assert verdict(interval, p_value) == words


def test_a_score_that_one_side_has_not_is_no_change():
    """A majority where one file has several completions a row; code scored on one side only."""
    assert changed_rows(pair_rows([row(1)], [row(1, majority=0.0, code=1.0)])) == []


def test_changed_rows_are_listed_with_both_completions():
    before = [row(1), row(2, outcome=0.0, completion="old"), row(3, process=None)]
    after = [row(1, completion="other words, same scores"), row(2), row(3, process=None)]
    assert changed_rows(pair_rows(before, after)) == [
        {
            "id": 2, "domain": "math", "prompt": "p2",
            "before": {"format": 1.0, "process": 0.2, "outcome": 0.0, "completions": ["old"]},
            "after": {"format": 1.0, "process": 0.2, "outcome": 1.0, "completions": ["c"]},
        }
    ]  # fmt: skip
