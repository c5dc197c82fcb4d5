"""The curriculum: rates from a result file, what they keep, in which order."""

import dataclasses
import json
from pathlib import Path

import pytest
from test_pipeline import rejects, row, write

from gemma_cot.prepare.pipeline import prepare
from gemma_cot.prepare.rates import read_rates
from gemma_cot.results import write_results

RATES = {"never": (0, 0, 0, 0), "seldom": (0, 1, 0, 0), "mostly": (1, 1, 1, 0),
         "always": (1, 1, 1, 1)}  # fmt: skip


def result(prompt: str, right, domain: str = "math") -> dict:
    same = {"completion": "c", "format": 1.0, "process": None}
    samples = [same | {"outcome": None if x is None else float(x)} for x in right]
    return {
        "id": 1, "domain": domain, "prompt": prompt, "format": 1.0, "process": None,
        "outcome": samples[0]["outcome"], "samples": samples,
    }  # fmt: skip


@pytest.fixture
def measured(cfg, tmp_path):
    """Settings with five rows, of which four were measured, and the prompts they keep."""
    write(cfg.input[0], [row(p) | {"pass_rate": "old"} for p in ("new", *RATES)])
    path = tmp_path / "rates.jsonl"
    write_results(path, [result(prompt, right) for prompt, right in RATES.items()])
    return dataclasses.replace(cfg, pass_rates=(str(path),))


def kept(cfg, tokenizer, **changes) -> list[tuple]:
    cfg = dataclasses.replace(cfg, **changes)
    prepare(cfg, tokenizer)
    rows = map(json.loads, (Path(cfg.output) / "train.jsonl").read_text().splitlines())
    return [(r["prompt"], r.get("pass_rate")) for r in rows]


def test_always_and_never_right_are_dropped_with_their_reasons(measured, tokenizer):
    assert kept(measured, tokenizer) == [("new", None), ("seldom", 0.25), ("mostly", 0.75)]
    assert rejects(measured) == [(2, "pass_rate_too_low"), (5, "pass_rate_too_high")]
    card = (Path(measured.output) / "card.md").read_text()
    assert "- kept without a measured rate: 1" in card


def test_bounds_order_and_unmeasured_rows(measured, tokenizer):
    wide = {"pass_rate_min": 0.0, "pass_rate_max": 0.75, "order": "pass_rate"}
    assert kept(measured, tokenizer, **wide) == [
        ("mostly", 0.75), ("seldom", 0.25), ("never", 0.0), ("new", None),
    ]  # fmt: skip
    output = measured.output + "2"
    assert kept(measured, tokenizer, unmeasured="drop", output=output, pass_rate_max=1.0) == [
        ("seldom", 0.25), ("mostly", 0.75), ("always", 1.0),
    ]  # fmt: skip
    assert (1, "pass_rate_unmeasured") in rejects(dataclasses.replace(measured, output=output))


def test_rates_are_matched_by_domain_and_prompt_and_add_up(tmp_path):
    first, second = str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")
    write_results(first, [result("What  is IT", (1, 0)), result("no gold", (None, None))])
    write_results(second, [result("what is it ", (1, 1)), result("what is it", (0, 0), "code")])
    assert sorted(read_rates([first, second]).values()) == [(0.0, False), (0.75, True)]


def test_rows_whose_completions_all_earned_the_same_are_dropped_by_reward(cfg, tokenizer, tmp_path):
    results = {name: result(name, right) for name, right in RATES.items()}
    results["never, one with a step"] = result("never, one with a step", (0, 0, 0, 0))
    results["never, one with a step"]["samples"][2]["process"] = 0.2
    results["steps for answers"] = result("steps for answers", (1, 0))  # 1 + 0 + 1 = 1 + 1 + 0
    results["steps for answers"]["samples"][1]["process"] = 1.0
    write(cfg.input[0], [row(prompt) for prompt in results])
    path = tmp_path / "rates.jsonl"
    write_results(path, results.values())
    measured = dataclasses.replace(cfg, pass_rates=(str(path),), pass_rate_by="reward")
    assert kept(measured, tokenizer) == [
        ("seldom", 0.25), ("mostly", 0.75), ("never, one with a step", 0.0),
    ]  # fmt: skip
    assert rejects(measured) == [(n, "rewards_equal") for n in (1, 4, 6)]


def test_one_completion_a_row_is_no_rate(tmp_path, measured, tokenizer):
    greedy = result("p", (1,))
    del greedy["samples"]
    write_results(tmp_path / "greedy.jsonl", [greedy])
    cfg = dataclasses.replace(measured, pass_rates=(str(tmp_path / "greedy.jsonl"),))
    with pytest.raises(ValueError, match="--pass_rates: rows must have been completed at least tw"):
        prepare(cfg, tokenizer)
    with pytest.raises(ValueError, match="--order: pass_rate must have rates"):
        prepare(dataclasses.replace(cfg, pass_rates=(), order="pass_rate"), tokenizer)
    with pytest.raises(ValueError, match="at least one row must pass, got {'pass_rate_unmea"):
        prepare(dataclasses.replace(measured, pass_rate_min=0.8, pass_rate_max=0.7,
                                    unmeasured="drop"), tokenizer)  # fmt: skip
    assert not Path(cfg.output).exists()
