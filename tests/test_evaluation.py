"""Summaries of hand-made results, the paired test, the printed table, and files that come back."""

import pytest

from gemma_cot.data import Encoded, Example
from gemma_cot.evaluation import (
    RATES,
    compare,
    read_results,
    score_rows,
    summarise,
    table,
    write_results,
)
from gemma_cot.stats import mcnemar_exact, mean_interval, wilson


def result(number: int, **changes) -> dict:
    """Return the result of a perfect row with some values replaced."""
    return {
        "id": number,
        "domain": "math",
        "prompt": "p",
        "completion": "c",
        "format": 1.0,
        "process": 0.4,
        "outcome": 1.0,
        "num_tokens": 10,
        "stop_reason": "stop",
        "checkpoints": 2,
        "checkpoints_literal": 1,
        "checkpoints_normalised": 2,
    } | changes


RESULTS = [
    result(1),
    result(2, format=0.0, outcome=0.0, num_tokens=30, stop_reason="length"),
    result(3, domain="code", outcome=None, process=None, checkpoints=0, checkpoints_literal=0,
           checkpoints_normalised=0),
    result(4, domain="code", process=0.0, outcome=0.0, checkpoints_literal=0,
           checkpoints_normalised=0, num_tokens=14),
]  # fmt: skip


# ---- scoring ------------------------------------------------------------------------------------


def test_rows_are_scored_on_their_own_gold():
    metadata = {"checkpoints": ["3 + 4 = 7", "7 * 2 = 14"], "final_answer": "14"}
    examples = [
        Example(5, "math", "How many?", "", metadata, {"level": 1}),
        Example(6, "code", "What?", "", {"checkpoints": [], "final_answer": " "}, {}),
    ]
    rows = [Encoded(example, [2], [1]) for example in examples]
    texts = ["<reasoning>3+4=7, 7 * 2 = 14.</reasoning><answer>14</answer>", "no tags"]
    first, second = score_rows(rows, texts, [9, 3], [True, False], "normalised")
    assert first == {
        "id": 5, "domain": "math", "prompt": "How many?", "completion": texts[0], "format": 1.0,
        "process": 0.4, "outcome": 1.0, "num_tokens": 9, "stop_reason": "stop", "checkpoints": 2,
        "checkpoints_literal": 1, "checkpoints_normalised": 2,
    }  # fmt: skip
    # no checkpoints and a blank gold: these rewards do not apply; that is None and never 0
    assert (second["format"], second["process"], second["outcome"]) == (0.0, None, None)
    assert second["stop_reason"] == "length" and second["checkpoints"] == 0


def test_the_literal_matcher_is_honoured():
    metadata = {"checkpoints": ["3 + 4 = 7"], "final_answer": "7"}
    rows = [Encoded(Example(1, "math", "p", "", metadata, {}), [2], [1])]
    text = ["<reasoning>3+4=7</reasoning><answer>7</answer>"]
    scores = [score_rows(rows, text, [9], [True], m)[0] for m in ("literal", "normalised")]
    assert [score["process"] for score in scores] == [0.0, 0.2]


# ---- summary ------------------------------------------------------------------------------------


def test_summary_of_hand_made_results():
    summary = summarise(RESULTS)
    assert summary["n"] == 4
    # 3 of 4 have the format; 1 of the 3 with a gold is right; 1 of 4 was cut off
    assert summary["full_format_accuracy"] == 0.75
    assert summary["full_format_accuracy_interval"] == list(wilson(3, 4))
    assert summary["answer_accuracy"] == pytest.approx(1 / 3)
    assert summary["answer_accuracy_interval"] == list(wilson(1, 3))
    assert summary["truncated_rate"] == 0.25
    assert summary["truncated_rate_interval"] == list(wilson(1, 4))
    mean, low, high = mean_interval([0.4, 0.4, 0.0])  # None is left out
    assert summary["process_score"] == pytest.approx(0.8 / 3) == pytest.approx(mean)
    assert summary["process_score_interval"] == [low, high]
    assert summary["mean_completion_tokens"] == 16.0  # (10 + 30 + 10 + 14) / 4
    assert summary["checkpoint_rate_literal"] == pytest.approx(2 / 6)
    assert summary["checkpoint_rate_normalised"] == pytest.approx(4 / 6)


def test_every_rate_has_an_interval_around_it():
    for summary in (summarise(RESULTS), *summarise(RESULTS)["domains"].values()):
        for name in RATES:
            low, high = summary[f"{name}_interval"]
            assert 0 <= low <= summary[name] <= high <= 1


def test_domains_are_summed_up_by_themselves():
    domains = summarise(RESULTS)["domains"]
    assert list(domains) == ["code", "math"]
    assert domains["math"]["n"] == domains["code"]["n"] == 2
    assert domains["math"]["answer_accuracy"] == 0.5
    assert domains["code"]["answer_accuracy"] == 0.0  # one row has no gold, the other is wrong
    assert domains["code"]["answer_accuracy_interval"] == list(wilson(0, 1))
    assert domains["code"]["process_score_interval"] == [0.0, 1.0]  # one value has no spread


def test_rewards_that_apply_nowhere_give_zero_and_know_nothing():
    summary = summarise([result(1, outcome=None, process=None, checkpoints=0)])
    assert summary["answer_accuracy"] == 0.0 and summary["answer_accuracy_interval"] == [0.0, 1.0]
    assert summary["process_score"] == 0.0 and summary["process_score_interval"] == [0.0, 1.0]


# ---- paired test --------------------------------------------------------------------------------


def test_compare_pairs_rows_by_id():
    scores_before = {1: 0.0, 2: 0.0, 3: 0.0, 4: 1.0, 5: 1.0, 6: None, 7: 0.0}
    scores_after = {7: None, 6: 1.0, 5: 1.0, 4: 0.0, 3: 0.0, 2: 1.0, 1: 1.0, 8: 1.0}
    before = [result(number, outcome=score) for number, score in scores_before.items()]
    after = [result(number, outcome=score) for number, score in scores_after.items()]
    # gained 1, 2; lost 4; 6 and 7 lack a score, 8 was not asked before
    assert compare(before, after, "outcome") == {
        "gained": 2,
        "lost": 1,
        "p_value": mcnemar_exact(1, 2),
    }
    nothing = compare(before, before, "format")
    assert nothing == {"gained": 0, "lost": 0, "p_value": 1.0}


def test_compare_has_the_p_value_of_the_sign_test():
    # 6 gained, 0 lost: two tails of (1/2)^6 each
    before = [result(number, format=0.0) for number in range(6)]
    after = [result(number) for number in range(6)]
    assert compare(before, after, "format")["p_value"] == pytest.approx(2 / 64)


# ---- table --------------------------------------------------------------------------------------


def test_table_as_text():
    """Wilson of 3/4: 30.1-95.4 %; of 1/3: 6.1-79.2 %; mean interval of 0.4, 0.4, 0.0: mean 26.7,
    s = 0.2309, 1.96 s/sqrt(3) = 0.2613, so 0.5-52.8 %."""
    text = table(
        {"base": summarise(RESULTS)},
        {"base -> sft, answer": {"gained": 12, "lost": 3, "p_value": 0.035156}},
    )
    assert text.splitlines() == [
        "stage             full format           answer right          process score"
        "  tokens  cut off  rows",
        "base      75.0 % (30.1- 95.4)    33.3 % ( 6.1- 79.2)    26.7 % ( 0.5- 52.8)"
        "    16.0   25.0 %     4",
        "base -> sft, answer: 12 rows gained, 3 lost, McNemar exact p = 0.035",
    ]


# ---- files --------------------------------------------------------------------------------------


def test_results_come_back_as_they_were(tmp_path):
    """Whatever a model writes: line separators of Unicode and of ASCII, quotes, None scores."""
    odd = ["a\nb\r\nc", "\u2028 and \u2029 and \u0085", "\x0b\x0c\x1c\x1d\x1e", '"\\', ""]
    rows = [result(i, completion=text, outcome=None) for i, text in enumerate(odd)]
    path = tmp_path / "eval" / "base.jsonl"
    write_results(path, rows)
    assert read_results(path) == rows
    assert [item.name for item in path.parent.iterdir()] == ["base.jsonl"]  # nothing half-written
    write_results(path, rows[:1])
    assert read_results(path) == rows[:1]


def test_no_results_come_back_as_none(tmp_path):
    write_results(tmp_path / "none.jsonl", [])
    assert read_results(tmp_path / "none.jsonl") == []
