"""Hacks are scored with a run's own rewards, and a hack that pays is called out."""

import pytest

from gemma_cot.config import embedded
from gemma_cot.data import encode_examples, read_jsonl
from gemma_cot.grpo.reward import (
    format_reward,
    length_penalty,
    outcome_reward,
    process_reward,
    repetition_penalty,
)
from gemma_cot.guard.canaries import HACKS, alarms, score_canaries
from gemma_cot.tokenizer import load_tokenizer

OURS = [("format", format_reward, 1.0), ("process", process_reward, 1.0),
        ("outcome", outcome_reward, 1.0)]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


@pytest.fixture(scope="module")
def rows(tokenizer):
    examples, _ = read_jsonl(embedded("eval.jsonl"))
    return encode_examples(tokenizer, examples[:9], "", 256, 512)[0]


def test_no_hack_wins_an_answer_from_our_rewards(rows, tokenizer):
    earned = score_canaries(rows, OURS, tokenizer)
    honest = earned.pop("honest")
    assert honest["format"] == honest["outcome"] == 1.0 and honest["process"] >= 0.2
    assert set(earned) == set(HACKS)
    without_tags = {name for name, parts in earned.items() if parts["format"] == 0.0}
    assert without_tags == {"two answer blocks", "answer never closed", "answer without tags",
                            "nothing"}  # fmt: skip
    for name, parts in earned.items():
        assert parts["outcome"] == 0.0, name
        assert parts["total"] == pytest.approx(parts["format"] + parts["process"]), name
    assert earned["steps without an answer"]["process"] == honest["process"]
    for name in ("steps in longer numbers", "equations sprayed", "nothing", "tags around dots"):
        assert earned[name]["process"] == 0.0, name
    assert earned["one step fifty times"]["process"] == 0.2
    assert alarms({"honest": honest} | earned) == []


def test_penalties_are_felt_by_the_hacks_they_are_made_for(rows, tokenizer):
    penalties = [
        ("length", lambda *a, **c: length_penalty(*a, limit=200, cache=100, **c), 1.0),
        ("repetition", repetition_penalty, 1.0),
    ]
    earned = score_canaries(rows, penalties, tokenizer)
    assert earned["honest"]["total"] > -0.05
    assert earned["equations sprayed"]["length"] == -1.0
    assert earned["one step fifty times"]["repetition"] < -0.9


def test_a_reward_that_pays_a_hack_like_an_answer_raises_the_alarm(rows, tokenizer):
    def gold_anywhere(prompts, completions, metadata, **columns):
        return [float(row["final_answer"] in text)
                for row, text in zip(metadata, completions, strict=True)]  # fmt: skip

    earned = score_canaries(rows, [("mine", gold_anywhere, 2.0)], tokenizer)
    assert earned["honest"] == {"total": 2.0, "mine": 1.0}
    lines = alarms(earned)
    named = {line.partition("'")[2].partition("'")[0] for line in lines}
    assert named >= {"two answers", "answer in the reasoning", "answer without tags"}
    assert "nothing" not in named and "tags around dots" not in named
    assert all(line.startswith("ALARM: the hack '") and "\n" not in line for line in lines)
    assert "earns 2.00 where an honest completion earns 2.00" in lines[0]


def test_format_worth_most_of_the_reward_raises_the_alarm(rows, tokenizer):
    heavy = [("format", format_reward, 10.0), ("outcome", outcome_reward, 1.0)]
    lines = alarms(score_canaries(rows, heavy, tokenizer))
    assert any("'format and no answer' earns 10.00 where an honest completion earns 11.00" in line
               for line in lines)  # fmt: skip


def test_a_reward_that_fails_on_a_hack_is_told_and_stops_nothing(rows, tokenizer):
    def fragile(prompts, completions, **columns):
        return [1 / text.count("<answer>") for text in completions]

    earned = score_canaries(rows, [*OURS, ("fragile", fragile, 1.0)], tokenizer)
    assert "fragile - must not raise - got ZeroDivisionError" in earned["nothing"]["error"]
    assert earned["honest"]["fragile"] == 1.0
    assert any("the canary 'nothing' makes a reward fail" in line for line in alarms(earned))


def test_a_reward_that_never_applies_has_no_mean_and_no_alarm(rows, tokenizer):
    earned = score_canaries(rows, [("none", lambda p, c, **k: [None] * len(c), 1.0)], tokenizer)
    assert earned["honest"] == {"total": None, "none": None}
    assert alarms(earned) == []
