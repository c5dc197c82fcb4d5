"""Summaries of hand-made results, the paired test, the printed table, several completions."""

import sys
from functools import partial
from types import SimpleNamespace

import jax
import pytest

from gemma_cot import evaluation
from gemma_cot.data import Encoded, Example
from gemma_cot.evaluation import (
    RATES,
    alarms,
    compare,
    score_rows,
    summarise,
    table,
)
from gemma_cot.guard.sandbox import code_reward
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
        "repetition": 0.25,
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


def asked(monkeypatch, **settings) -> dict:
    """Return what an evaluation of one row on two devices asks of the sampler."""

    class Asked(Exception):
        pass

    def sample(params, cfg, lora, prompts, width, key, mesh, **rest):
        raise Asked(rest | {"key": jax.random.key_data(key).tolist()})

    monkeypatch.setattr(evaluation, "sample_prompts", sample)
    row = Encoded(Example(1, "math", "p", "c", {}, {}), [2], [1])
    batches = evaluation.evaluate_batches(
        None, None, None, SimpleNamespace(stop_ids=(1, 5, 106), end_of_turn=106), [row],
        SimpleNamespace(shape={"data": 2}), width=1, max_new_tokens=8, batch=6,
        matcher="normalised", **settings,
    )  # fmt: skip
    with pytest.raises(Asked) as caught:
        next(batches)
    return caught.value.args[0]


def test_an_evaluation_draws_by_its_seed_and_ends_at_every_stop_token(monkeypatch):
    first, other, again = (asked(monkeypatch, seed=seed, temperature=1.0) for seed in (0, 1, 0))
    assert first["key"] == again["key"] != other["key"]
    assert first["temperature"] == 1.0 and asked(monkeypatch)["temperature"] == 0.0
    assert first["stop_ids"] == (1, 5, 106) and first["slots"] == 3


# ---- scoring ------------------------------------------------------------------------------------


def test_rows_are_scored_on_their_own_gold():
    metadata = {"checkpoints": ["3 + 4 = 7", "7 * 2 = 14"], "final_answer": "14"}
    examples = [
        Example(5, "math", "How many?", "", metadata, {"level": 1}),
        Example(6, "code", "What?", "", {"checkpoints": [], "final_answer": " "}, {}),
    ]
    rows = [Encoded(example, [2], [1]) for example in examples]
    texts = ["<reasoning>3+4=7, 7 * 2 = 14.</reasoning><answer>14</answer>", "no tags"]
    first, second = score_rows(
        rows, texts, [[7] * 10, [1, 2, 3]], [True, False], "normalised"
    )
    assert first == {
        "id": 5, "domain": "math", "prompt": "How many?", "completion": texts[0], "format": 1.0,
        "process": 0.4, "outcome": 1.0, "num_tokens": 10, "stop_reason": "stop", "checkpoints": 2,
        "checkpoints_literal": 1, "checkpoints_normalised": 2, "repetition": pytest.approx(2 / 3),
    }  # fmt: skip
    # no checkpoints and a blank gold: these rewards do not apply; that is None and never 0
    assert (second["format"], second["process"], second["outcome"]) == (0.0, None, None)
    assert second["stop_reason"] == "length" and second["checkpoints"] == 0


def test_the_literal_matcher_is_honoured():
    metadata = {"checkpoints": ["3 + 4 = 7"], "final_answer": "7"}
    rows = [Encoded(Example(1, "math", "p", "", metadata, {}), [2], [1])]
    text = ["<reasoning>3+4=7</reasoning><answer>7</answer>"]
    scores = [score_rows(rows, text, [[9]], [True], m)[0] for m in ("literal", "normalised")]
    assert [score["process"] for score in scores] == [0.0, 0.2]


def test_blank_checkpoints_are_none():
    """The schema allows them, and no reasoning can lack them."""
    metadata = {"checkpoints": ["", " ", "4*2=8"], "final_answer": "8"}
    rows = [Encoded(Example(1, "math", "p", "", metadata, {}), [2], [1])]
    texts = ["<reasoning>4*2=8</reasoning><answer>8</answer>"]
    (score,) = score_rows(rows, texts, [[9]], [True], "literal")
    assert score["checkpoints"] == score["checkpoints_literal"] == 1
    (score,) = score_rows(rows, ["no reasoning"], [[9]], [True], "literal")
    assert score["checkpoints"] == 1 and score["checkpoints_literal"] == 0


def test_several_completions_of_a_row_are_scored_one_by_one_and_together():
    metadata = {"checkpoints": ["3 + 4 = 7"], "final_answer": "7"}
    rows = [Encoded(Example(i, "math", f"p{i}", "", metadata, {}), [2], [1]) for i in (5, 6)]
    right, wrong = (f"<reasoning>3 + 4 = 7</reasoning><answer>{a}</answer>" for a in (7, 8))
    texts = [right, wrong, "no tags", right, wrong, wrong]
    stopped = [True, True, False, True, True, True]
    results = score_rows(rows, texts, [[9]] * 6, stopped, "literal")
    assert [r["id"] for r in results] == [5, 6]
    assert [r["outcome"] for r in results] == pytest.approx([1 / 3, 1 / 3])
    assert [r["majority"] for r in results] == [1.0, 0.0]
    assert [s["completion"] for r in results for s in r["samples"]] == texts
    summary = summarise(results)
    assert (summary["n"], summary["num_completions"]) == (2, 3)
    assert summary["truncated_rate"] == pytest.approx(1 / 6)
    assert summary["full_format_accuracy"] == pytest.approx(5 / 6)
    assert summary["majority_accuracy"] == 0.5
    # one of three right: 1/3 with one draw, 2/3 with two, 1 with three
    assert [summary[f"pass_at_{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    # 5 of 6 completions hold the only checkpoint of their row
    assert summary["checkpoint_rate_literal"] == pytest.approx(5 / 6)
    assert summary["domains"]["math"]["pass_at_2"] == pytest.approx(2 / 3)


@pytest.mark.skipif(sys.platform != "linux", reason="the sandbox takes Linux")
def test_code_is_scored_row_by_row_where_the_row_has_tests():
    metadata = {"checkpoints": [], "final_answer": "f"}
    tested = metadata | {"tests": ["assert f(1) == 2"]}
    rows = [Encoded(Example(i, "code", "p", "", m, {}), [2], [1])
            for i, m in enumerate((tested, tested, metadata), 1)]  # fmt: skip
    codes = ("def f(x):\n    return x + 1", "def f(x):\n    return x", "def f(x):\n    return 2")
    texts = [f"<reasoning>So:</reasoning><answer>{code}</answer>" for code in codes]
    run_code = partial(code_reward, allow_code_execution=True)
    results = score_rows(rows, texts, [[9]] * 3, [True] * 3, "literal", code=run_code)
    assert [result["code"] for result in results] == [1.0, 0.0, None]
    summary = summarise(results)
    assert summary["code_accuracy"] == 0.5
    assert summary["code_accuracy_interval"] == list(wilson(1, 2))
    assert "code_accuracy" not in summarise(RESULTS)


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
    # s = sqrt((36 + 196 + 36 + 4) / 3) = 9.522, 1.96 s / 2 = 9.331
    assert summary["mean_completion_tokens_interval"] == pytest.approx([6.669, 25.331], abs=1e-3)
    assert summary["repetition_rate"] == 0.25
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


def test_rows_to_which_a_reward_does_not_apply_are_counted():
    assert summarise(RESULTS)["rows_without"] == {"checkpoints": 1, "gold answer": 1}


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


# ---- the alarm ----------------------------------------------------------------------------------


def stage(form: int, answer: int) -> list[dict]:
    """Return 300 results of which the first `form` keep the format and `answer` are right."""
    return [result(i, format=float(i < form), outcome=float(i < answer)) for i in range(300)]


def compared(before: list[dict], after: list[dict]) -> dict:
    columns = (("full format", "format"), ("answer", "outcome"))
    return {f"sft -> grpo, {name}": compare(before, after, column) for name, column in columns}


def test_an_alarm_when_the_format_rises_while_answers_fall():
    (line,) = alarms(compared(stage(195, 159), stage(273, 147)))  # 65 -> 91 %, 53 -> 49 %
    assert line.startswith("ALARM: sft -> grpo: format rises while answers fall: ")
    assert "--format_weight" in line and "\n" not in line
    text = table({"sft": summarise(stage(195, 159))}, compared(stage(195, 159), stage(273, 147)))
    assert text.splitlines()[-1] == line


def test_the_alarm_says_when_it_may_be_chance():
    (line,) = alarms(compared(stage(299, 160), stage(300, 159)))  # one row each
    assert line.startswith("ALARM: sft -> grpo: format rises while answers fall (perhaps by chance")
    assert "p = 1)" in line


@pytest.mark.parametrize("after", [
    (273, 159), (273, 170), (195, 147), (150, 100), (195, 159), (150, 170),
])  # fmt: skip
def test_no_alarm_where_only_one_of_them_moves_or_both_move_together(after):
    assert alarms(compared(stage(195, 159), stage(*after))) == []
