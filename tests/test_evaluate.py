"""The command, as a user runs it: several completions, canaries, code in the sandbox, a torn file
resumed, two files compared."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from commands import refused_line, run_here

from gemma_cot import evaluation
from gemma_cot.config import embedded
from gemma_cot.evaluate import comparison, protocol_of
from gemma_cot.guard.canaries import HACKS
from gemma_cot.results import (
    beside,
    differing,
    read_protocol,
    read_results,
    template_hash,
    write_results,
)

ASKED = ("--num_completions=2", "--temperature=1", "--max_completion_tokens=96", "--limit=6",
         "--allow_code_execution")  # fmt: skip
TESTED = [2, 3]  # rows with tests for their code


def evaluate(*arguments: str) -> subprocess.CompletedProcess:
    """Run the command on one CPU device."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "gemma_cot.evaluate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The first rows of the embedded ones, some with tests."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    with open(embedded("eval.jsonl"), encoding="utf-8") as file:
        rows = [json.loads(next(file)) for _ in range(8)]
    for number in TESTED:
        rows[number - 1]["metadata"]["tests"] = ["assert f(1) == 2"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """(output file, what was printed) of an evaluation that nothing disturbed."""
    path = tmp_path_factory.mktemp("evaluate") / "whole.jsonl"
    done = evaluate(f"--output={path}", f"--data={data}", *ASKED)
    assert done.returncode == 0, done.stderr
    return path, done.stdout


def test_rows_and_summary_hold_every_completion_and_the_protocol(whole):
    path, printed = whole
    rows = read_results(path)
    assert [row["id"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all(len(row["samples"]) == 2 for row in rows)
    assert any(a["completion"] != b["completion"] for a, b in (row["samples"] for row in rows))
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    protocol = read_protocol(path)
    assert summary["protocol"] == protocol
    assert protocol["prompt_template_sha256"] == template_hash("")
    for name, value in {"n": 6, "num_completions": 2, "max_completion_tokens": 96, "seed": 0,
                        "model": embedded("tiny_model"), "matcher": "answers_match"}.items():
        assert protocol[name] == value  # fmt: skip
    for rates in (summary, *summary["domains"].values()):
        for name in ("full_format_accuracy", "answer_accuracy", "truncated_rate", "process_score",
                     "repetition_rate", "mean_completion_tokens", "pass_at_1", "pass_at_2",
                     "majority_accuracy"):  # fmt: skip
            low, high = rates[f"{name}_interval"]
            assert low <= rates[name] <= high
    tokens = sum(2 * row["num_tokens"] for row in rows)  # of two completions, their mean
    assert summary["tokens_per_second"] * summary["seconds"] == pytest.approx(tokens)
    assert summary["rows_per_second"] * summary["seconds"] == pytest.approx(6)
    for words in ("protocol: template ", "n 6, k 2, temperature 1, seed 0", "pass@2", "rows/s"):
        assert words in printed


def test_hacks_are_scored_with_the_rewards_of_the_evaluation(whole):
    path, printed = whole
    canaries = json.loads(path.with_suffix(".summary.json").read_text())["canaries"]
    honest = canaries.pop("honest")
    assert honest["format"] == honest["outcome"] == 1.0 and honest["code"] == 0.0
    assert set(canaries) == set(HACKS)
    assert all(hack["outcome"] == 0.0 for hack in canaries.values())
    assert f"canaries: an honest completion earns {honest['total']:.2f}, of 16 hacks" in printed


def test_the_code_of_a_row_with_tests_is_scored_and_other_rows_have_no_such_score(whole):
    path, printed = whole
    rows = read_results(path)
    for row in rows:
        score = 0.0 if row["id"] in TESTED else None  # the base model writes no tags
        assert row["code"] == score and [one["code"] for one in row["samples"]] == [score] * 2
    summary = json.loads(path.with_suffix(".summary.json").read_text())
    assert summary["code_accuracy"] == 0.0 and "code passes 0.0 %" in printed
    assert read_protocol(path)["code"] == "metadata.tests in the sandbox"


def test_a_torn_evaluation_goes_on_and_ends_the_same(whole, data, tmp_path):
    path, _ = whole
    torn = tmp_path / "torn.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    torn.write_bytes(b"".join(lines[:2]) + lines[2][:40])
    protocol = path.with_suffix(".protocol.json").read_text()
    torn.with_suffix(".protocol.json").write_text(protocol)
    other = evaluate(f"--output={torn}", f"--data={data}", *ASKED, "--seed=1", "--resume")
    assert other.returncode == 2 and "first seed: 0 then, 1 now" in other.stderr
    done = evaluate(f"--output={torn}", f"--data={data}", *ASKED, "--resume", f"--compare={path}")
    assert done.returncode == 0, done.stderr
    assert "\n4 rows in " in done.stdout  # two were done
    assert read_results(torn) == read_results(path)
    assert "answer right: 0.0 -> 0.0 %, difference +0.0" in done.stdout
    assert done.stdout.count("no difference shown") == 5 and "improved" not in done.stdout
    assert "\n0 rows changed" in done.stdout


def test_ctrl_c_says_what_is_kept(whole, data, tmp_path, monkeypatch, capsys):
    rows, out = read_results(whole[0]), tmp_path / "torn.jsonl"

    def batches(*_, **__):
        yield rows[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "evaluate_batches", batches)
    arguments = (f"--output={out}", f"--data={data}", *ASKED)
    monkeypatch.setattr(os, "_exit", sys.exit)
    code, _, err = run_here("gemma_cot.evaluate", *arguments, capsys=capsys)
    assert code == 130
    assert err.endswith(f"stopped by SIGINT - {out} has 2 of 6 rows; --resume goes on\n")
    assert read_results(out) == rows[:2]


def test_two_files_are_compared_without_a_model(whole, tmp_path):
    rows = read_results(whole[0])
    changed = [row | {"outcome": 1.0, "format": 1.0, "process": 1.0} for row in rows]
    before, after = tmp_path / "before.jsonl", tmp_path / "after.jsonl"
    write_results(before, [row | {"outcome": 0.0, "format": 1.0} for row in rows])
    write_results(after, changed)
    done = evaluate(f"--compare={before},{after}")
    assert done.returncode == 0, done.stderr
    # 6 rows gained of 6: (1/2)^6 in each tail
    line = next(x for x in done.stdout.splitlines() if x.startswith("answer right"))
    assert ": improved; 6 rows gained, 0 lost, McNemar exact p = 0.031" in line
    listed = after.with_suffix(".changed.jsonl").read_text().splitlines()
    assert [json.loads(x)["id"] for x in listed] == [1, 2, 3, 4, 5, 6]
    assert f"protocol: none beside {before}" in done.stdout


def test_a_comparison_names_what_differs_in_how_the_files_were_made(tmp_path):
    row = {"id": 1, "domain": "math", "prompt": "p", "completion": "c", "format": 1.0,
           "process": None, "outcome": 1.0}  # fmt: skip
    paths = (str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl"))
    for path, hashed, longest in zip(paths, "ab", (96, 512), strict=True):
        protocol = {"seed": 0, "weights_sha256": hashed, "max_completion_tokens": longest}
        beside(path, "protocol.json").write_text(json.dumps(protocol))
    lines = comparison(paths, ([row], [row]))[1].splitlines()
    told = [line for line in lines if line.startswith("protocol")]
    # other weights are what is compared
    assert told == ["protocol: max_completion_tokens 96 -> 512"]


def test_other_weights_of_an_adapter_are_another_protocol(tmp_path, monkeypatch):
    monkeypatch.setattr("gemma_cot.evaluate.resolve_dtype", lambda dtype: dtype)
    (tmp_path / "rows.jsonl").write_text("")
    policy = SimpleNamespace(instruction="", max_prompt_tokens=8, max_completion_tokens=8)
    protocols = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").write_text(name)
        given = dict.fromkeys(("math_verify", "process_matcher", "num_completions", "temperature",
                               "seed", "dtype", "attention", "allow_code_execution"))  # fmt: skip
        given |= {"model": "", "adapter": str(tmp_path / name)}
        monkeypatch.setattr("gemma_cot.evaluate.FLAGS", SimpleNamespace(**given))
        protocols.append(protocol_of(policy, 1, str(tmp_path / "rows.jsonl")))
    assert differing(*protocols) == ["weights_sha256"]


def test_a_comparison_says_when_the_format_rises_while_answers_fall(tmp_path):
    scores = {"process": None, "domain": "math", "prompt": "p", "completion": "c"}
    before, after = ([scores | {"id": i, "format": form, "outcome": right} for i in range(20)]
                     for form, right in ((0.0, 1.0), (1.0, 0.0)))  # fmt: skip
    paths = (str(tmp_path / "before.jsonl"), str(tmp_path / "after.jsonl"))
    alarm = f"ALARM: {paths[0]} -> {paths[1]}: format rises while answers fall: "
    assert alarm in comparison(paths, (before, after))[1]
    assert "ALARM" not in comparison(paths, (after, before))[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--output=x.jsonl", "--num_completions=2"), "--temperature: must be above 0 for 2 compl"),
        (("--output=x.jsonl", "--temperature=nan"), "--temperature: must be 0 (greedy) or a num"),
        (("--output=x.jsonl", "--temperature=1e-9"), "--temperature: must be 0 (greedy) or a num"),
        (("--output=x.jsonl", "--temperature=inf"), "--temperature: must be 0 (greedy) or a num"),
        (("--output=new/",), "--output: must name a file, got the folder new/; set --output=new/r"),
        (("--output=/tmp",), "--output: must name a file, got the folder /tmp; set"),
        (("--output=x.jsonl", "--compare=a,b"), "--compare: must be one file beside --output"),
        (("--output=x.jsonl", "--compare=nowhere"), "nowhere: must be a result file of evaluate"),
        (("--output=x.jsonl", "--resume", "--overwrite"), "--overwrite: must not stand beside"),
    ],
)
def test_flags_that_cannot_be_used(arguments, words, capsys):
    assert words in refused_line("gemma_cot.evaluate", *arguments, capsys=capsys)
