"""The linter passes our own rewards and finds what is wrong with planted ones."""

import re
import time
from itertools import count
from types import SimpleNamespace

import pytest

from gemma_cot.grpo.reward import format_reward, outcome_reward, process_reward
from gemma_cot.guard import lint
from gemma_cot.guard.corpus import corpus
from gemma_cot.guard.lint import lines, lint_reward


def last_number(prompts, completions, metadata, **columns):
    """Planted: the last number anywhere is the answer."""
    numbers = [re.findall(r"-?\d[\d.,]*", text) for text in completions]
    return [float(bool(found) and found[-1].rstrip(".,") == row["final_answer"])
            for found, row in zip(numbers, metadata, strict=True)]  # fmt: skip


def tags_anywhere(prompts, completions, **columns):
    """Planted: the tags may stand anywhere, blank, and twice."""
    pattern = re.compile(r"<reasoning>.*?</reasoning>\s*<answer>.*?</answer>", re.DOTALL)
    return [0.5 * bool(pattern.search(text)) for text in completions]


def gold_within(prompts, completions, metadata, **columns):
    """Planted: credit wherever the gold answer is part of the answer block."""
    answers = [text.partition("<answer>")[2] for text in completions]
    return [float(row["final_answer"] in answer)
            for answer, row in zip(answers, metadata, strict=True)]  # fmt: skip


def tries(found) -> set[str]:
    return {case.tries.partition(":")[0] for case, _, _ in found}


@pytest.mark.parametrize(("reward", "part"), [
    (format_reward, "format"), (process_reward, "steps"), (outcome_reward, "answer"),
])  # fmt: skip
def test_our_own_rewards_pass(reward, part):
    report = lint_reward(reward)
    assert report.passed
    assert report.judged == len(corpus())
    assert {name for name, effect in report.pays_for.items() if effect} == {part}
    assert report.pays_for[part] == 1.0


def test_speed_is_cases_a_second(monkeypatch):
    clock = count(0.0, 0.25)  # a quarter of a second from each look at it to the next
    monkeypatch.setattr(lint, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    report = lint_reward(format_reward)
    assert report.per_second == 4.0 and report.slow == []
    assert "speed      4 completions a second, one at a time" in lines(report)


def test_a_mixture_of_parts_is_judged_by_what_it_pays_for_each():
    def mixture(prompts, completions, **columns):
        """2 for the answer, but only in the format; steps beside it."""
        parts = [f(prompts, completions, **columns)
                 for f in (format_reward, process_reward, outcome_reward)]  # fmt: skip
        return [3 + (p or 0) + 2 * f * (o or 0) for f, p, o in zip(*parts, strict=True)]

    report = lint_reward(mixture)
    assert report.passed and report.judged == len(corpus())
    assert report.pays_for == {"format": 2.0, "steps": 1.0, "answer": 2.0}


def test_the_last_number_as_answer_is_found_out():
    report = lint_reward(last_number)
    assert not report.passed and report.pays_for["answer"] == 1.0
    assert {"two answer blocks", "answer never closed", "bare answer", "more than one value",
            "prose around the value", "an expression still to be evaluated"} <= tries(report.paid)
    assert {"thousands groups", "the same ratio", "a percentage"} <= tries(report.refused)


def test_a_search_for_tags_is_found_out(monkeypatch):
    monkeypatch.setattr(lint, "SECONDS_A_CALL", 0.3)
    report = lint_reward(tags_anywhere)
    assert [line.partition(":")[0] for line in report.slow] == ["ten thousand opening tags"]
    assert {"text before the tags", "text after the tags", "the whole completion twice",
            "empty reasoning", "invisible answer"} <= tries(report.paid)
    assert all((got, wanted) == (0.5, 0.0) for _, got, wanted in report.paid)
    assert report.refused == []


def test_the_gold_anywhere_in_the_answer_is_found_out():
    paid = tries(lint_reward(gold_within).paid)
    assert {"more than one value", "prose around the value", "all numbers up to 100",
            "not one option", "an expression still to be evaluated"} <= paid


def test_what_raises_is_named_with_its_first_case():
    def mine(prompts, completions, **columns):
        return [1 / text.count("<answer>") for text in completions]

    report = lint_reward(mine)
    assert not report.passed
    text = "\n".join(lines(report))
    assert "FAIL  raises: 1" in text
    assert "ZeroDivisionError: division by zero - first on: plain completion" in text


def test_a_missing_column_and_a_wrong_return_are_named():
    for mine, words in ((lambda prompts, completions, level, **c: [1.0], "'level'"),
                        (lambda prompts, completions, **c: 1.0, "must return a list")):
        assert words in "\n".join(lines(lint_reward(mine)))


def test_what_hangs_is_stopped_and_named(monkeypatch):
    monkeypatch.setattr(lint, "SECONDS_A_CALL", 0.2)

    def mine(prompts, completions, **columns):
        while "LXXII" in completions[0]:
            try:
                time.sleep(0.01)
            except Exception:  # swallows what it can
                continue
        return format_reward(prompts, completions)

    report = lint_reward(mine)
    assert any("LXXII" in line and "over 0.2 s, stopped" in line for line in report.slow)
    assert not report.passed and report.paid == report.refused == []


def test_a_function_that_mixes_up_rows_is_found_out():
    report = lint_reward(lambda p, completions, **c: sorted(format_reward(p, completions)))
    assert report.mixed_up and not report.passed
    assert "FAIL  depends on the batch" in "\n".join(lines(report))


def test_what_follows_something_else_is_not_judged_by_cases():
    report = lint_reward(lambda prompts, completions, **c: [1 / (1 + len(t)) for t in completions])
    assert report.judged == 0 and report.passed
    assert "its score follows something else" in "\n".join(lines(report))
    report = lint_reward(lambda prompts, completions, **c: [None] * len(completions))
    assert report.judged == 0 and report.passed


def test_the_table_is_short_lines_and_counts_what_it_leaves_out():
    report = lint_reward(gold_within)
    table = lines(report, most=3)
    assert table[0].startswith("pays for   answer 1")
    assert f"      ... and {len(report.paid) - 3} more" in table
    assert max(map(len, table)) < 200 and all("\n" not in line for line in table)
