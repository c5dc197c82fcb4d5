"""The whole command on small files: what is kept, what is dropped and why, all or nothing."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from gemma_cot.config import embedded
from gemma_cot.data import read_jsonl
from gemma_cot.prepare.filters import grams, in_eval, near_duplicates
from gemma_cot.prepare.pipeline import Settings, prepare
from gemma_cot.tokenizer import encode_prompt, encode_target, load_tokenizer

LONG = "a farmer walks from his house to the market with"


def row(prompt: str, answer: int = 4) -> dict:
    return {
        "domain": "math",
        "prompt": prompt,
        "chosen": f"<reasoning>2 + 2 = {answer}</reasoning><answer>{answer}</answer>",
        "metadata": {"checkpoints": [f"2 + 2 = {answer}"], "final_answer": str(answer)},
    }


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


@pytest.fixture
def cfg(tmp_path) -> Settings:
    """Settings for rows in our schema; `write` makes the input."""
    return Settings(
        dataset="ours", input=(str(tmp_path / "in.jsonl"),), output=str(tmp_path / "new" / "out"),
        model="", instruction="", max_prompt_tokens=256, max_completion_tokens=512, against=(),
        max_overlap=0.0, max_similarity=0.8, eval_share=0.0, tasks="", on_bad_row="skip",
    )  # fmt: skip


def write(path, rows) -> None:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in rows)
    Path(path).write_text("\n".join(lines) + "\n")


def rejects(cfg) -> list[tuple[int, str]]:
    lines = (Path(cfg.output) / "rejects.jsonl").read_text().splitlines()
    return [(one["line"], one["reason"]) for one in map(json.loads, lines)]


def test_every_dropped_row_is_listed_with_its_reason(cfg, tokenizer, tmp_path):
    test_set = tmp_path / "test.jsonl"
    shared = row(f"{LONG} seven eggs, how many are left?")
    write(test_set, [row("What is in the test set?"), shared])
    numbers = " ".join(map(str, range(30)))
    write(cfg.input[0], [
        row("two and two"),
        "{broken",
        row("Two  and TWO"),
        row("what is in the test SET?"),
        row(f"{LONG} nine hens, what does he pay?"),
        row(f"count {numbers}"),
        row(f"count {numbers} 31"),
        row("7 " * 300),
        row("other") | {"chosen": "4"},
        row("wrong") | {"metadata": {"checkpoints": [], "final_answer": "5"}},
        row("step") | {"metadata": {"checkpoints": ["3 + 3 = 6"], "final_answer": "4"}},
    ])  # fmt: skip
    report = prepare(dataclasses.replace(cfg, against=(str(test_set),)), tokenizer)
    assert sorted(rejects(cfg)) == [
        (2, "bad_json"), (3, "duplicate"), (4, "in_test_set"), (5, "overlaps_test_set"),
        (7, "near_duplicate"), (8, "prompt_too_long"), (9, "bad_format"), (10, "wrong_answer"),
        (11, "checkpoint_missing"),
    ]  # fmt: skip
    kept, _ = read_jsonl(Path(cfg.output) / "train.jsonl")
    assert [example.prompt for example in kept] == ["two and two", f"count {numbers}"]
    assert report.rows_in == 11 and len(report.kept) == 2 and sum(report.reasons.values()) == 9
    card = (Path(cfg.output) / "card.md").read_text()
    assert "| dropped: near_duplicate | 1 |" in card and "| kept | 2 |" in card
    assert (Path(cfg.output) / "lengths.svg").read_text().startswith("<svg")


def test_limits_count_the_stop_token_and_are_inclusive(cfg, tokenizer):
    write(cfg.input[0], [row("two and two")])
    prompt = len(encode_prompt(tokenizer, "two and two"))
    target = len(encode_target(tokenizer, row("")["chosen"]))
    exact = dataclasses.replace(cfg, max_prompt_tokens=prompt, max_completion_tokens=target)
    assert len(prepare(exact, tokenizer).kept) == 1
    less = dataclasses.replace(exact, output=cfg.output + "2", max_completion_tokens=target - 1)
    with pytest.raises(ValueError, match="at least one row must pass, got {'completion_too_long'"):
        prepare(less, tokenizer)
    assert not Path(less.output).exists()


def test_a_bad_row_stops_the_command_and_leaves_nothing(cfg, tokenizer, tmp_path):
    write(cfg.input[0], [row("two and two"), "[]"])
    with pytest.raises(ValueError, match=r"in.jsonl:2: must be an object, got list; correct"):
        prepare(dataclasses.replace(cfg, on_bad_row="fail"), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": ()}, "--input: must be given"),
        ({"input": ("nowhere.jsonl",)}, "nowhere.jsonl: must be a readable file"),
        ({"eval_share": 1.5}, "--eval_share: must be 0 to 1, got 1.5"),
        ({"tasks": "1-5"}, "--tasks: must be FIRST-LAST with --dataset=mbpp"),
        ({"max_prompt_tokens": 0}, "--max_prompt_tokens: must be at least 1, got 0"),
    ],
)
def test_settings_that_cannot_be_used(cfg, tokenizer, change, message):
    with pytest.raises(ValueError, match=message):
        prepare(dataclasses.replace(cfg, **change), tokenizer)
    assert not Path(cfg.output).parent.exists()


def test_files_in_the_output_folder_are_never_touched(cfg, tokenizer):
    write(cfg.input[0], [row("two and two")])
    Path(cfg.output).mkdir(parents=True)
    (Path(cfg.output) / "mine").write_text("mine")
    with pytest.raises(ValueError, match="--output: must be a new or empty folder"):
        prepare(cfg, tokenizer)
    assert (Path(cfg.output) / "mine").read_text() == "mine"


def test_adding_rows_moves_none_between_the_splits():
    prompts = [f"question {i}" for i in range(2000)]
    share = sum(in_eval(prompt, 0.25) for prompt in prompts) / 2000
    assert abs(share - 0.25) < 0.04  # four standard deviations of a fair hash
    # a larger share only adds to the eval split
    assert all(in_eval(p, 0.5) for p in prompts if in_eval(p, 0.25))


def test_near_duplicates_equal_the_quadratic_search():
    rng = np.random.default_rng(0)
    base = [list(rng.integers(0, 300, 30)) for _ in range(12)]
    texts = []
    for words in base:
        for changes in (0, 1, 4):
            changed = list(words)
            for at in rng.integers(0, 30, changes):
                changed[at] = int(rng.integers(0, 300))
            texts.append(" ".join(map(str, changed)))
    rows = [grams("math", text) for text in texts]
    found = near_duplicates(rows, 0.6)
    kept, wanted = [], set()
    for i, own in enumerate(rows):
        near = [j for j in kept if len(np.intersect1d(own, rows[j])) > 0.6 * len(
            np.union1d(own, rows[j]))]  # fmt: skip
        if near:
            wanted.add(i)
        else:
            kept.append(i)
    assert set(found) == wanted and 0 < len(wanted) < len(rows)
