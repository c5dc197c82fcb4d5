"""From input files to an output folder: convert, check, filter, split, write; all or nothing.

Rows stream through a temporary folder beside the output, which is renamed at the end; memory holds
hashes and lengths only. Called by the command; prints nothing but the progress bar.
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import getpid
from pathlib import Path
from typing import TextIO

from gemma_cot.data import parse_row
from gemma_cot.prepare.card import Report, lengths_svg, markdown
from gemma_cot.prepare.convert import DATASETS, Rejected, parse_object, read_rows
from gemma_cot.prepare.filters import (
    TestQuestions,
    check_content,
    grams,
    in_eval,
    near_duplicates,
    text_key,
)
from gemma_cot.progress import Progress
from gemma_cot.tokenizer import Tokenizer, encode_prompt, encode_target


@dataclass(frozen=True)
class Settings:
    """The flags."""

    dataset: str
    input: tuple[str, ...]
    output: str
    model: str
    instruction: str
    max_prompt_tokens: int
    max_completion_tokens: int
    against: tuple[str, ...]
    max_overlap: float
    max_similarity: float
    eval_share: float
    tasks: str
    on_bad_row: str


def check_settings(cfg: Settings) -> None:
    """Raise ValueError naming the first setting that is missing or out of range."""
    for name in ("dataset", "input", "output"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}: must be given, got nothing; set --{name}")
    for name in ("max_overlap", "max_similarity", "eval_share"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name}: must be 0 to 1, got {getattr(cfg, name)}; change it")
    for name in ("max_prompt_tokens", "max_completion_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name}: must be at least 1, got {getattr(cfg, name)}; raise it")
    task_range(cfg)
    output = Path(cfg.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(
            f"--output: must be a new or empty folder, got {output}; name another one"
        )


def task_range(cfg: Settings) -> tuple[int, int] | None:
    """Return first and last task of --tasks, None where all are taken. Raises ValueError."""
    if not cfg.tasks:
        return None
    first, dash, last = cfg.tasks.partition("-")
    if cfg.dataset != "mbpp" or not (dash and first.isdecimal() and last.isdecimal()):
        raise ValueError(
            f"--tasks: must be FIRST-LAST with --dataset=mbpp, got {cfg.tasks!r} with "
            f"{cfg.dataset}; set --tasks=601-974 or leave it out"
        )
    return int(first), int(last)


def prepare(cfg: Settings, tokenizer: Tokenizer) -> Report:
    """Write train.jsonl, eval.jsonl, rejects.jsonl, card.md and lengths.svg, or nothing.

    Raises ValueError for bad input, and where no row is left.
    """
    check_settings(cfg)
    report = Report(asdict(cfg))
    tests = TestQuestions(list(_test_rows(cfg, report)))
    output = Path(cfg.output).absolute()
    new = [p for p in output.parents if not p.exists()]  # innermost first
    folder = output.parent / f".{output.name}.part{getpid()}"
    folder.mkdir(parents=True)
    try:
        _fill(folder, cfg, tokenizer, tests, report)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    except BaseException:
        shutil.rmtree(folder)
        for parent in new:
            parent.rmdir()
        raise
    return report


def _test_rows(cfg: Settings, report: Report) -> Iterator[dict]:
    """Yield the rows of --against: DATASET:FILE, or a FILE in the layout of --dataset."""
    for name in cfg.against:
        dataset, colon, path = name.partition(":")
        if not colon or dataset not in DATASETS:
            dataset, path = cfg.dataset, name
        for line, text in read_rows(path):
            try:
                for row in DATASETS[dataset](parse_object(text), "test"):
                    report.test_questions += 1
                    yield row
            except Rejected as error:
                if error.is_bad:
                    raise ValueError(f"{path}:{line}: {error}; correct --against") from None


def _fill(
    folder: Path, cfg: Settings, tokenizer: Tokenizer, tests: TestQuestions, report: Report
) -> None:
    """Write everything into `folder`: first what passes alone, then without near duplicates."""
    rows, places = [], []  # of what passed: 8-grams, and file and line
    survivors = folder / "survivors"
    with open(survivors, "w", encoding="utf-8") as out, open(
        folder / "rejects.jsonl", "w", encoding="utf-8"
    ) as rejects:
        for row, measured, place in _passing(cfg, tokenizer, tests, report, rejects):
            out.write(json.dumps(row, ensure_ascii=False) + "\n")
            rows.append(grams(row["domain"], row["prompt"]))
            places.append(place)
            report.kept.append(measured)
        repeats = {}
        for domain in {k["domain"] for k in report.kept}:
            own = [i for i, k in enumerate(report.kept) if k["domain"] == domain]
            found = near_duplicates([rows[i] for i in own], cfg.max_similarity)
            repeats |= {own[i]: own[j] for i, j in found.items()}
        for i, other in sorted(repeats.items()):
            detail = f"of {places[other][0]}:{places[other][1]}"
            _reject(rejects, report, places[i], Rejected("near_duplicate", detail))
    if not report.kept:
        raise ValueError(
            f"--input: at least one row must pass, got {dict(report.reasons)} of "
            f"{report.rows_in} rows; change the limits or the files"
        )
    with open(survivors, encoding="utf-8") as lines:
        for i, line in enumerate(lines):
            if i not in repeats:
                with open(folder / f"{report.kept[i]['split']}.jsonl", "a", encoding="utf-8") as f:
                    f.write(line)
    survivors.unlink()
    report.kept = [k for i, k in enumerate(report.kept) if i not in repeats]
    (folder / "card.md").write_text(markdown(report), encoding="utf-8")
    (folder / "lengths.svg").write_text(lengths_svg(report), encoding="utf-8")


def _reject(rejects: TextIO, report: Report, place: tuple[str, int], error: Rejected) -> None:
    report.reasons[error.code] += 1
    entry = {"file": place[0], "line": place[1], "reason": error.code, "detail": error.detail}
    rejects.write(json.dumps(entry) + "\n")


def _passing(
    cfg: Settings, tokenizer: Tokenizer, tests: TestQuestions, report: Report, rejects: TextIO
) -> Iterator[tuple[dict, dict, tuple[str, int]]]:
    """Yield (row, what the card needs of it, its place) of rows that pass every filter alone."""
    seen: dict[bytes, tuple[str, int]] = {}
    tasks = task_range(cfg)
    total = sum(1 for path in cfg.input for _ in read_rows(path))
    with Progress("prepare", total) as progress:
        for path in cfg.input:
            for line, text in read_rows(path):
                report.rows_in += 1
                place = (path, line)
                for row in _converted(cfg, tasks, text, place, report, rejects):
                    report.converted += 1
                    try:
                        measured = _check(cfg, tokenizer, tests, row)
                        key = text_key(row["domain"], row["prompt"])
                        if key in seen:
                            first = seen[key]
                            raise Rejected("duplicate", f"of {first[0]}:{first[1]}")
                    except Rejected as error:
                        _drop(cfg, error, place, report, rejects)
                        continue
                    seen[key] = place
                    yield row, measured, place
                progress.update()


def _drop(cfg, error: Rejected, place, report: Report, rejects: TextIO) -> None:
    """Count and list a rejected row; raise ValueError for a bad one under --on_bad_row=fail."""
    if error.is_bad and cfg.on_bad_row == "fail":
        raise ValueError(
            f"{place[0]}:{place[1]}: {error}; correct the line, or set --on_bad_row=skip"
        ) from None
    _reject(rejects, report, place, error)


def _converted(cfg, tasks, text, place, report: Report, rejects: TextIO) -> Iterator[dict]:
    """Yield the rows of ours that one published object gives."""
    try:
        raw = parse_object(text)
        if tasks:
            number = str(raw.get("task_id")).rpartition("/")[2]
            if not (number.isdecimal() and tasks[0] <= int(number) <= tasks[1]):
                raise Rejected("task_not_selected", f"task {number} is outside {cfg.tasks}")
        source = f"{cfg.dataset}:{Path(place[0]).name}:{place[1]}"
        yield from DATASETS[cfg.dataset](raw, source)
    except Rejected as error:
        _drop(cfg, error, place, report, rejects)


def _check(cfg: Settings, tokenizer: Tokenizer, tests: TestQuestions, row: dict) -> dict:
    """Return split, domain, origin and lengths of a good row. Raises Rejected."""
    try:
        parse_row(json.dumps(row), 0)
    except ValueError as error:
        raise Rejected("bad_schema", str(error), is_bad=True) from None
    check_content(row)
    measured = {
        "split": "eval" if in_eval(row["prompt"], cfg.eval_share) else "train",
        "domain": row["domain"],
        "reasoning": str(row.get("reasoning", "published")),
        "checkpoints": len(row["metadata"]["checkpoints"]),
        "prompt_tokens": len(encode_prompt(tokenizer, row["prompt"], cfg.instruction)),
        "completion_tokens": len(encode_target(tokenizer, row["chosen"])),
    }
    for name in ("prompt_tokens", "completion_tokens"):
        if measured[name] > getattr(cfg, f"max_{name}"):
            detail = f"{measured[name]} {name}, at most {getattr(cfg, f'max_{name}')}"
            raise Rejected(f"{name.partition('_')[0]}_too_long", detail)
    tests.check(row, cfg.max_overlap)
    return measured
