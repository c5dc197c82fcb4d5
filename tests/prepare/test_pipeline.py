"""The whole command on small files: what is kept, what is dropped and why, all or nothing."""

import dataclasses
import json
import re
import resource
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from gemma_cot.data import MAX_LINE, read_jsonl
from gemma_cot.prepare import filters
from gemma_cot.prepare.card import Report, lengths_svg, markdown, quantiles
from gemma_cot.prepare.convert import read_rows
from gemma_cot.prepare.filters import grams, in_eval, near_duplicates
from gemma_cot.prepare.pipeline import prepare
from gemma_cot.prepare.spool import GramFile, Seen
from gemma_cot.tokenizer import encode_prompt, encode_target

LONG = "a farmer walks from his house to the market with"


def row(prompt: str, answer: int = 4) -> dict:
    return {
        "domain": "math",
        "prompt": prompt,
        "chosen": f"<reasoning>2 + 2 = {answer}</reasoning><answer>{answer}</answer>",
        "metadata": {"checkpoints": [f"2 + 2 = {answer}"], "final_answer": str(answer)},
    }


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
        json.dumps(row("half a character")).replace("half", "\\ud83d"),
        row("step") | {"metadata": {"checkpoints": ["3 + 3 = 6"], "final_answer": "4"}},
    ])  # fmt: skip
    report = prepare(dataclasses.replace(cfg, against=(str(test_set),)), tokenizer)
    assert sorted(rejects(cfg)) == [
        (2, "bad_json"), (3, "duplicate"), (4, "in_test_set"), (5, "overlaps_test_set"),
        (7, "near_duplicate"), (8, "prompt_too_long"), (9, "bad_format"), (10, "wrong_answer"),
        (11, "bad_json"), (12, "checkpoint_missing"),
    ]  # fmt: skip
    listed = (Path(cfg.output) / "rejects.jsonl").read_text()
    for reason, line in (("duplicate", 1), ("near_duplicate", 6)):  # the rows they repeat
        assert f'"reason": "{reason}", "detail": "of {cfg.input[0]}:{line}"' in listed
    kept, _ = read_jsonl(Path(cfg.output) / "train.jsonl")
    assert [example.prompt for example in kept] == ["two and two", f"count {numbers}"]
    assert report.rows_in == 12 and report.kept == 2 and sum(report.reasons.values()) == 10
    card = (Path(cfg.output) / "card.md").read_text()
    assert "| dropped: near_duplicate | 1 |" in card and "| kept | 2 |" in card
    assert "Reasoning `none`" not in card
    report.groups["train", "science", "none"] += 1
    assert "Reasoning `none`: the file has no worked solution" in markdown(report)
    assert (Path(cfg.output) / "lengths.svg").read_text().startswith("<svg")


def test_only_code_keeps_its_case(cfg, tokenizer):
    calls = [row(f"What does f({name}) return?") | {"domain": "code"} for name in "Aa"]
    write(cfg.input[0], [*calls, row("What is f(A)?"), row("what is  F(a)?")])
    assert prepare(cfg, tokenizer).kept == 3
    assert rejects(cfg) == [(4, "duplicate")]


def test_a_test_set_may_have_another_layout_than_the_rows(cfg, tokenizer, tmp_path):
    published = {"question": "What is twice 2?", "answer": "It is 2 * 2 = <<2*2=4>>4.\n#### 4"}
    write(tmp_path / "test.jsonl", [published])
    write(cfg.input[0], [row("what is twice 2?"), row("What is half of 8?")])
    against = (f"gsm8k:{tmp_path / 'test.jsonl'}",)
    report = prepare(dataclasses.replace(cfg, against=against), tokenizer)
    assert (report.test_questions, report.kept) == (1, 1)
    assert rejects(cfg) == [(1, "in_test_set")]


def test_the_card_counts_rows():
    limits = {"max_prompt_tokens": 400, "max_completion_tokens": 400, "pass_rates": ()}
    report = Report(limits)
    kind = {"split": "train", "domain": "math", "reasoning": "published"}
    for tokens, checkpoints in ((10, 0), (10, 1), (10, 1), (399, 2)):
        report.add(kind | {"prompt_tokens": tokens, "completion_tokens": 5,
                           "checkpoints": checkpoints})  # fmt: skip
    assert report.unmeasured == 0  # no --pass_rates: nothing was to be measured
    assert "- rows without a checkpoint: 1\n" in markdown(report)
    svg = lengths_svg(report)
    assert "prompt_tokens, 0 to 400; highest bar 3 rows" in svg
    heights = re.findall(r'height="([\d.]+)" fill="#0072b2"', svg)[:40]  # bars of 10 tokens
    assert (heights[1], heights[39], heights[20]) == ("170.0", "56.7", "0.0")


def test_limits_count_the_stop_token_and_are_inclusive(cfg, tokenizer):
    write(cfg.input[0], [row("two and two")])
    prompt = len(encode_prompt(tokenizer, "two and two"))
    target = len(encode_target(tokenizer, row("")["chosen"]))
    exact = dataclasses.replace(cfg, max_prompt_tokens=prompt, max_completion_tokens=target)
    assert prepare(exact, tokenizer).kept == 1
    less = dataclasses.replace(exact, output=cfg.output + "2", max_completion_tokens=target - 1)
    with pytest.raises(ValueError, match="at least one row must pass, got {'completion_too_long'"):
        prepare(less, tokenizer)
    assert not Path(less.output).exists()


def test_a_bad_row_stops_the_command_and_leaves_nothing(cfg, tokenizer, tmp_path):
    write(cfg.input[0], [row("two and two"), "[]"])
    with pytest.raises(ValueError, match=r"in.jsonl:2: must be an object, got list; correct"):
        prepare(dataclasses.replace(cfg, on_bad_row="fail"), tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_lines_in_every_encoding_are_kept_or_listed(cfg, tokenizer):
    """Byte order marks, also of files put together, and CRLF are fine, and so is any character that
    JSON spells out; what is no UTF-8 is a reject."""
    text = [json.dumps(row(f"question {i}")) for i in range(9)]
    lines = [
        b"\xef\xbb\xbf" + text[0].encode(),
        b"\xef\xbb\xbf" + text[1].encode(),
        text[2].replace("question", "Größe \u2028 größer").encode(),
        text[3].replace("question", "Größe").encode("latin-1"),
        text[4].encode("utf-16"),
        text[5].replace("question", "ques\0tion").encode(),
        text[6].replace("question", "half \\udc00").encode(),
        text[7].replace("question", "\ud83d").encode("utf-8", "surrogatepass"),
        text[8].replace("question", "nul \\u0000, whole \\ud83d\\ude00").encode(),
        b"\0" * 1000,
        b"",
    ]
    Path(cfg.input[0]).write_bytes(b"\r\n".join(lines))
    prepare(cfg, tokenizer)
    assert rejects(cfg) == [(n, "bad_json") for n in (4, 5, 6, 7, 8, 10)]
    kept, _ = read_jsonl(Path(cfg.output) / "train.jsonl")
    assert [example.prompt for example in kept] == [
        "question 0", "question 1", "Größe \u2028 größer 2", "nul \0, whole \U0001f600 8",
    ]  # fmt: skip


def test_a_line_of_100_mb_is_a_reject_and_is_never_held(cfg, tokenizer):
    good = json.dumps(row("two and two"))
    with open(cfg.input[0], "wb") as file:
        file.seek(100_000_000)  # the bytes before are 0
        file.write(f"\n{good}\n".encode())
    assert [len(text) for _, text in read_rows(cfg.input[0])] == [MAX_LINE + 1, len(good) + 1]
    assert prepare(cfg, tokenizer).kept == 1
    (reject,) = map(json.loads, (Path(cfg.output) / "rejects.jsonl").read_text().splitlines())
    assert (reject["line"], reject["reason"]) == (1, "line_too_long")
    assert reject["detail"] == "must be at most 1048576 bytes long, got a longer line"
    with pytest.raises(ValueError, match="in.jsonl:1: must be at most 1048576 bytes long"):
        read_jsonl(cfg.input[0])


def test_the_longest_line_that_is_read_is_judged_by_its_tokens(cfg, tokenizer):
    rest = len(json.dumps(row("")))
    for length, reason in ((MAX_LINE, "prompt_too_long"), (MAX_LINE + 1, "line_too_long")):
        Path(cfg.input[0]).write_text(json.dumps(row("a" * (length - rest))))
        with pytest.raises(ValueError, match=f"at least one row must pass, got {{'{reason}': 1}}"):
            prepare(cfg, tokenizer)


def test_a_dataset_of_nothing_but_rejects_says_what_they_were(cfg, tokenizer, tmp_path):
    write(cfg.input[0], ["{", row("wrong") | {"chosen": "4"}, "7"])
    with pytest.raises(ValueError, match=(
            "--input: at least one row must pass, got {'bad_json': 2, 'bad_format': 1} of 3 rows"
    )):  # fmt: skip
        prepare(cfg, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_a_full_disk_leaves_nothing_behind_wherever_it_stops(cfg, tokenizer, tmp_path):
    """No file may grow beyond a limit: the rejects, the spool, its database, the rows fill up."""
    write(cfg.input[0], [row(f"question {i}") for i in range(40)] + ["{"] * 200)
    sizes = {path.name: path.stat().st_size for path in _files_of(cfg, tokenizer)}
    before, limits = sorted(tmp_path.iterdir()), resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (0, 200, 5000, sizes["train.jsonl"] - 1, sizes["rejects.jsonl"] - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, limits[1]))
        try:
            with pytest.raises(OSError, match="File too large|disk I/O|full"):
                prepare(cfg, tokenizer)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(tmp_path.iterdir()) == before


def _files_of(cfg, tokenizer) -> list[Path]:
    """Return what a run with room writes."""
    other = dataclasses.replace(cfg, output=cfg.output.replace("new", "room"))
    prepare(other, tokenizer)
    return list(Path(other.output).iterdir())


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


def test_grams_in_several_rows_are_found_in_any_number_of_passes(monkeypatch):
    ends = np.array([0, 1, 2**63, 2**64 - 1], np.uint64)
    rows = [ends, ends[1:], ends[2:], np.array([7], np.uint64)]
    for part in (1, 4, 100):
        monkeypatch.setattr(filters, "PART", part)
        names, counts = filters.repeated_grams(rows)
        assert names.tolist() == [1, 2**63, 2**64 - 1] and counts.tolist() == [2, 3, 3]
    assert len(filters.repeated_grams([])[0]) == 0 and near_duplicates([], 0.8) == {}


def test_the_first_place_of_a_digest_is_remembered(tmp_path):
    seen = Seen(tmp_path / "seen")
    assert seen.first(b"a", ("in.jsonl", 1)) is None and seen.first(b"b", ("in.jsonl", 2)) is None
    assert seen.first(b"a", ("in.jsonl", 3)) == ("in.jsonl", 1) == seen.first(b"a", ("x", 4))
    seen.close()


def test_quantiles_of_counts_are_those_of_the_values():
    values = np.random.default_rng(0).integers(0, 50, 333).tolist()
    wanted = np.quantile(values, [0, 0.5, 0.9, 0.99, 1], method="higher")
    assert quantiles(Counter(values)) == " / ".join(str(int(x)) for x in wanted)
    assert quantiles(Counter([1, 2])) == "1 / 2 / 2 / 2 / 2"
    assert quantiles(Counter([3])) == "3 / 3 / 3 / 3 / 3"


def test_near_duplicates_equal_the_quadratic_search(monkeypatch, tmp_path):
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
    monkeypatch.setattr(filters, "PART", 100)  # 828 grams: several passes
    spooled = GramFile(tmp_path / "grams")
    for own in rows:
        spooled.append("math", own)
    assert [len(spooled[i]) for i in (0, 5)] == [len(rows[0]), len(rows[5])]
    assert near_duplicates(spooled, 0.6) == found
    for own in rows:
        spooled.append("code", own)  # the same words of another domain are no repeats of these
    assert near_duplicates(spooled, 0.6) == found | {i + 36: j + 36 for i, j in found.items()}
    spooled.close()
    kept, wanted = [], set()
    for i, own in enumerate(rows):
        near = [j for j in kept if len(np.intersect1d(own, rows[j])) > 0.6 * len(
            np.union1d(own, rows[j]))]  # fmt: skip
        if near:
            wanted.add(i)
        else:
            kept.append(i)
    assert set(found) == wanted and 0 < len(wanted) < len(rows)
