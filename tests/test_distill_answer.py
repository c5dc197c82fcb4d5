"""What a teacher writes becomes a row only where it is exact, right and in form."""

import json
import time
from dataclasses import replace
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from teacher_server import problems, solution

from gemma_cot.config import embedded
from gemma_cot.distill.answer import exact_equation, make_row, parse_solution
from gemma_cot.distill.collect import worst_usd
from gemma_cot.distill.settings import Price, Settings, is_peak, usd
from gemma_cot.distill.teacher import read_answer
from gemma_cot.distill.template import Question, request_body, request_key, system_prompt
from gemma_cot.grpo.reward import format_reward, outcome_reward, process_reward
from gemma_cot.prepare.convert import Rejected
from gemma_cot.tokenizer import load_tokenizer

STEPS = [
    {"text": "All stamps", "equation": "44*9=396"},
    {"text": "Rest.", "equation": "396-59=337"},
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


def record(content: object, reason: str = "stop") -> dict:
    text = content if isinstance(content, str) else json.dumps(content)
    usage = {"prompt_tokens": 1, "cached_tokens": 0, "completion_tokens": 1}
    return {"content": text, "finish_reason": reason, "model": "m", "date": "d", "key": "k",
            "prompt_hash": "p", "usage": usage}  # fmt: skip


def one(equation: str) -> dict:
    return {"text": "So", "equation": equation}


def question(gold: str = "", domain: str = "math", **extra) -> Question:
    return Question(domain, "How many?", gold, {"note": 1}, extra)


def test_tags_checkpoints_and_everything_else_of_a_row(tokenizer):
    made = make_row(record({"steps": STEPS, "answer": 337}), question("337", id=7), tokenizer, 512)
    assert made["chosen"] == (
        "<reasoning>All stamps: 44 * 9 = 396.\nRest: 396 - 59 = 337.</reasoning>"
        "<answer>337</answer>"
    )
    assert made["metadata"] == {
        "note": 1, "checkpoints": ["44 * 9 = 396", "396 - 59 = 337"], "final_answer": "337",
    }  # fmt: skip
    assert made["id"] == 7 and made["reasoning"] == "teacher"
    assert made["teacher"]["usage"]["prompt_tokens"] == 1


@given(st.integers(0, 10**6))
def test_rows_of_right_answers_score_full(tokenizer, seed):
    problem = next(iter(problems(seed, 1).values()))
    asked = Question(problem.domain, problem.question, problem.answer, {}, {})
    made = make_row(record(solution(problem)), asked, tokenizer, 512)
    columns = {"metadata": [made["metadata"]], "domain": [problem.domain]}
    for matcher in ("literal", "normalised"):
        score = process_reward([""], [made["chosen"]], matcher=matcher, **columns)
        assert score == [pytest.approx(0.2 * len({step.equation for step in problem.steps}))]
    assert format_reward([""], [made["chosen"]]) == [1.0]
    assert outcome_reward([""], [made["chosen"]], **columns) == [1.0]


@pytest.mark.parametrize(
    ("content", "gold", "code"),
    [
        ({"steps": STEPS, "answer": "338"}, "337", "wrong_answer"),
        ({"steps": [one("44 * 9 = 397")], "answer": "1"}, "", "step_not_exact"),
        ({"steps": [one("10/3 = 3.33")], "answer": "1"}, "", "step_not_exact"),
        ({"steps": [one("F = 3 * 4")], "answer": "1"}, "", "not_arithmetic"),
        ({"steps": [{"text": "</reasoning>"}], "answer": "1"}, "", "tags_in_text"),
        ({"steps": STEPS, "answer": "<answer>3"}, "", "tags_in_text"),
        ({"steps": [{"text": "<end_of_turn>"}], "answer": "1"}, "", "tags_in_text"),
        ({"steps": [{"text": "so " * 600}], "answer": "1"}, "", "completion_too_long"),
        ({"steps": [], "answer": "1"}, "", "bad_schema"),
        ({"steps": STEPS}, "", "bad_schema"),
        ({"steps": STEPS, "answer": "  "}, "", "bad_schema"),
        ({"steps": STEPS, "answer": ["337"]}, "", "bad_schema"),
        ({"steps": ["44 * 9"], "answer": "1"}, "", "bad_schema"),
        ({"steps": [{"text": ["5"]}], "answer": "1"}, "", "bad_schema"),
        ({"steps": [{"text": "\ud800"}], "answer": "1"}, "", "bad_schema"),
        ("[1, 2]", "", "bad_schema"),
        ("The answer is 337.", "", "bad_schema"),
        ("[" * 100_000, "", "bad_schema"),
    ],
)
def test_reasons_for_rejects(tokenizer, content, gold, code):
    with pytest.raises(Rejected) as refused:
        make_row(record(content), question(gold), tokenizer, 512)
    assert refused.value.code == code


@pytest.mark.parametrize("reason", ["length", "content_filter"])
def test_a_stopped_teacher(tokenizer, reason):
    with pytest.raises(Rejected) as refused:
        make_row(record({"steps": STEPS, "answer": "337"}, reason), question(), tokenizer, 512)
    assert refused.value.code == reason


def test_numbers_keep_their_spelling_and_fences_go():
    assert parse_solution('{"steps": [{"text": "x"}], "answer": 0.10}')[1] == "0.10"
    assert parse_solution('{"steps": [{"text": "x"}], "answer": true}')[1] == "True"
    fenced = '```json\n{"steps": [{"text": "x", "equation": null}], "answer": "1"}\n```'
    assert parse_solution(fenced) == ([("x", "")], "1")


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("44*9=396", "44 * 9 = 396"),
        ("12 × 30 = 360.", "12 * 30 = 360"),
        ("1,200 ÷ 4 = $300", "1200 / 4 = 300"),
        ("(5+.5)*-2 = -11", "(5 + 0.5) * -2 = -11"),
        ("1/3 + 1/6 = 1/2", "1 / 3 + 1 / 6 = 1 / 2"),
        ("0.1 + 0.2 = 0.3", "0.1 + 0.2 = 0.3"),  # as rationals; not so in floats
        ("2 * 3 = 6 = 12 / 2", "2 * 3 = 6 = 12 / 2"),
        ("2**10 = 1024", "2 ** 10 = 1024"),
        ("7 // 2 = 3", "7 // 2 = 3"),
    ],
)
def test_exact_equations(text, spelled):
    assert exact_equation(text) == spelled


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("0.1 + 0.2 = 0.30000000000000004", "step_not_exact"),
        ("123456789.123456789 * 10 = 1234567891.23456788", "step_not_exact"),
        ("2 * 3 = 6 = 7", "step_not_exact"),
        ("1 / 0 = 0", "not_arithmetic"),
        ("5 = 5", "not_arithmetic"),
        ("44 * 9", "not_arithmetic"),
        ("x = 5 * 2", "not_arithmetic"),
        ("5 km * 2 = 10 km", "not_arithmetic"),
        ("__import__('os') = 1", "not_arithmetic"),
        ("((9**99)**99)**99 = 1 + 1", "not_arithmetic"),
        ("9**9**9**9 = 1 + 1", "not_arithmetic"),
        ("2**0.5 = 1.4", "not_arithmetic"),
        ("1+" * 200 + "1 = 201", "not_arithmetic"),
        ("(" * 99 + "1" + ")" * 99 + " = 1 + 0", "not_arithmetic"),
    ],
)
def test_equations_that_are_none(text, code):
    began = time.monotonic()
    with pytest.raises(Rejected) as refused:
        exact_equation(text)
    assert refused.value.code == code and time.monotonic() - began < 1


def test_every_part_of_a_request_is_in_its_key():
    cfg = Settings(input=("i",), output="o", teacher="t", base_url="http://localhost/v1")
    asked = Question("math", "What is 2 + 2?", "4", {}, {})
    keys = [
        request_key(cfg, asked, 0),
        request_key(cfg, asked, 1),
        request_key(cfg, replace(asked, prompt="What is 2 + 3?"), 0),
        request_key(cfg, replace(asked, domain="science"), 0),
        *(request_key(replace(cfg, **{name: value}), asked, 0) for name, value in [
            ("teacher", "u"), ("temperature", 0.9), ("max_tokens", 9), ("seed", 7),
            ("extra_body", '{"top_p": 0.5}'),
        ]),
        request_key(replace(cfg, teacher="deepseek-flash", base_url=""), asked, 0),
        request_key(replace(cfg, teacher="deepseek-flash", base_url=""), asked, 1),
    ]  # fmt: skip
    assert len(set(keys)) == len(keys)
    assert request_key(replace(cfg, base_url="http://localhost:1/v1"), asked, 0) == keys[0]


def test_deepseek_is_asked_without_thinking_and_for_json():
    body = request_body(Settings(input=("i",), output="o"), question(), 0)
    assert body["thinking"] == {"type": "disabled"} and "seed" not in body
    assert body["response_format"] == {"type": "json_object"}
    for domain in ("math", "code", "science"):
        text = system_prompt(domain)
        assert "JSON" in text and '"steps": [{' in text  # JSON mode needs both
    other = Settings(input=("i",), output="o", teacher="t", base_url="http://localhost/v1",
                     extra_body='{"response_format": null, "top_k": 5}')  # fmt: skip
    body = request_body(other, question(), 2)
    assert "response_format" not in body and "thinking" not in body
    assert body["top_k"] == 5 and body["seed"] == 2


def test_prices_by_hand():
    night = datetime(2026, 11, 25, 13, 0, tzinfo=UTC)
    peak = datetime(2026, 11, 25, 9, 59, tzinfo=UTC)
    weekend = datetime(2026, 11, 28, 9, 59, tzinfo=UTC)  # a Saturday
    assert [is_peak(when) for when in (night, peak, weekend)] == [False, True, False]
    usage = {"prompt_tokens": 1_000_000, "cached_tokens": 400_000, "completion_tokens": 200_000}
    price = Price(0.01, 1.0, 5.0, 2.0)
    # 0.4 * 0.01 + 0.6 * 1 + 0.2 * 5 = 1.604
    assert usd(price, usage, night) == pytest.approx(1.604)
    assert usd(price, usage, peak) == pytest.approx(3.208)
    assert usd(None, usage, peak) == 0


def test_the_worst_that_a_request_costs_is_at_peak_prices():
    body = {"messages": [{"content": "abc"}, {"content": "d"}], "max_tokens": 10}
    # 4 characters at 2 dollars a million, 10 tokens at 3
    assert worst_usd(Price(0.1, 2.0, 3.0), body) == pytest.approx(38e-6)
    assert worst_usd(Price(0.1, 2.0, 3.0, 2.0), body) == pytest.approx(76e-6)
    assert worst_usd(None, body) == 0


@pytest.mark.parametrize(
    "cached", [{"prompt_cache_hit_tokens": 5}, {"prompt_tokens_details": {"cached_tokens": 5}}]
)
def test_cached_tokens_are_read_under_either_name(cached):
    usage = {"prompt_tokens": 9, "completion_tokens": 2} | cached
    choice = {"message": {"content": "{}"}, "finish_reason": "stop"}
    answer = read_answer(None, json.dumps({"choices": [choice], "usage": usage}))
    assert answer["usage"] == {"prompt_tokens": 9, "cached_tokens": 5, "completion_tokens": 2}
