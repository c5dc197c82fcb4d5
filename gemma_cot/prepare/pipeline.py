"""From input files to an output folder: convert, check, filter, split, write; all or nothing.

Rows stream through a temporary folder beside the output, which is renamed at the end; memory holds
8 bytes a row, counts, and what repeats. Called by the command; prints nothing but the progress bar.
"""

import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from operator import itemgetter
from os import getpid
from pathlib import Path
from typing import TextIO

from gemma_cot.data import check_row
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
from gemma_cot.prepare.rates import Measured, add_rate, order_by_rate, read_rates
from gemma_cot.prepare.spool import GramFile, Seen
from gemma_cot.progress import Progress
from gemma_cot.tokenizer import Tokenizer, encode_prompt, encode_target

# Each check goes over so many lines before the next one begins: the processor's caches hold one
# check and not all of them, which takes a third less time.
CHUNK = 64


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
    pass_rates: tuple[str, ...] = ()
    pass_rate_min: float = 0.01
    pass_rate_max: float = 0.99
    pass_rate_by: str = "answer"
    unmeasured: str = "keep"
    order: str = "input"


def check_settings(cfg: Settings) -> None:
    """Raise ValueError naming the first setting that is missing or out of range."""
    for name in ("dataset", "input", "output"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}: must be given, got nothing; set --{name}")
    shares = ("max_overlap", "max_similarity", "eval_share", "pass_rate_min", "pass_rate_max")
    for name in shares:
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name}: must be 0 to 1, got {getattr(cfg, name)}; change it")
    for name in ("max_prompt_tokens", "max_completion_tokens"):
        if getattr(cfg, name) < 1:
            raise ValueError(f"--{name}: must be at least 1, got {getattr(cfg, name)}; raise it")
    if cfg.order == "pass_rate" and not cfg.pass_rates:
        raise ValueError("--order: pass_rate must have rates, got none; set --pass_rates=FILE")
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
    rates = read_rates(cfg.pass_rates)
    output = Path(cfg.output).absolute()
    new = [p for p in output.parents if not p.exists()]  # innermost first
    folder = output.parent / f".{output.name}.part{getpid()}"
    folder.mkdir(parents=True)
    try:
        _fill(folder, cfg, tokenizer, tests, rates, report)
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
    folder: Path, cfg: Settings, tokenizer: Tokenizer, tests: TestQuestions,
    rates: dict[bytes, Measured], report: Report,
) -> None:
    """Write everything into `folder`: first what passes alone, then without near duplicates."""
    spool = folder / "spool"
    spool.mkdir()
    survivors, rows = spool / "survivors", GramFile(spool / "grams")
    with open(folder / "rejects.jsonl", "w", encoding="utf-8") as rejects, closing(rows):
        with open(survivors, "wb") as out:
            encode = json.JSONEncoder(ensure_ascii=False).encode
            for chunk in _passing(cfg, tokenizer, tests, rates, report, rejects, spool):
                for row, measured in chunk:
                    pickle.dump((measured, encode(row)), out)
                for row, _ in chunk:
                    rows.append(row["domain"], grams(row["domain"], row["prompt"]))
        if not len(rows):
            raise ValueError(
                f"--input: at least one row must pass, got {dict(report.reasons)} of "
                f"{report.rows_in} rows; change the limits or the files"
            )
        repeats = near_duplicates(rows, cfg.max_similarity)
        _split(survivors, len(rows), folder, repeats, report, rejects)
    shutil.rmtree(spool)
    if cfg.order == "pass_rate":
        for path in (folder / "train.jsonl", folder / "eval.jsonl"):
            if path.exists():
                order_by_rate(path)
    (folder / "card.md").write_text(markdown(report), encoding="utf-8")
    (folder / "lengths.svg").write_text(lengths_svg(report), encoding="utf-8")


def _split(
    survivors: Path, count: int, folder: Path, repeats: dict[int, int], report: Report,
    rejects: TextIO,
) -> None:
    """Write train.jsonl and eval.jsonl without the `repeats`, which go to the rejects."""
    originals = {other: ("", 0) for other in repeats.values()}
    files: dict[str, TextIO] = {}
    with open(survivors, "rb") as spooled, ExitStack() as stack:
        for i in range(count):
            measured, text = pickle.load(spooled)
            place = measured["place"]
            if i in originals:
                originals[i] = place
            if i in repeats:
                first = originals[repeats[i]]
                error = Rejected("near_duplicate", f"of {first[0]}:{first[1]}")
                _reject(rejects, report, place, error)
                continue
            split = measured["split"]
            if split not in files:
                path = folder / f"{split}.jsonl"
                files[split] = stack.enter_context(open(path, "w", encoding="utf-8"))
            files[split].write(text + "\n")
            report.add(measured)


def _reject(rejects: TextIO, report: Report, place: tuple[str, int], error: Rejected) -> None:
    report.reasons[error.code] += 1
    entry = {"file": place[0], "line": place[1], "reason": error.code, "detail": error.detail}
    rejects.write(json.dumps(entry) + "\n")


def _passing(
    cfg: Settings, tokenizer: Tokenizer, tests: TestQuestions, rates: dict[bytes, Measured],
    report: Report, rejects: TextIO, spool: Path,
) -> Iterator[list[tuple[dict, dict]]]:
    """Yield, CHUNK lines at a time, the rows that pass every check alone, each with what the card
    needs of it and its place."""
    total = sum(1 for path in cfg.input for _ in read_rows(path))
    lines = ((path, line, text) for path in cfg.input for line, text in read_rows(path))
    with Progress("prepare", total) as progress, closing(Seen(spool / "seen")) as seen:
        checks = [
            _check_schema,
            partial(_measure, cfg, tokenizer),
            lambda row, measured: check_content(row),
            lambda row, measured: tests.check(row, cfg.max_overlap),
            partial(_check_rate, cfg, rates),
            partial(_check_first, seen),
        ]
        while chunk := list(islice(lines, CHUNK)):
            failed: list[tuple[int, Rejected]] = []  # place in the chunk, reason
            rows = list(_converted(cfg, chunk, failed))
            report.rows_in += len(chunk)
            report.converted += len(rows)
            for check in checks:
                rows = list(_surviving(rows, check, failed))
            for at, error in sorted(failed, key=itemgetter(0)):
                _drop(cfg, error, chunk[at][:2], report, rejects)
            yield [(row, measured) for _, row, measured in rows]
            progress.update(len(chunk))


def _converted(cfg: Settings, chunk: list, failed: list) -> Iterator[tuple[int, dict, dict]]:
    """Yield (place in the chunk, row of ours, {"place": (file, line)}) of published objects."""
    tasks = task_range(cfg)
    names = {path: f"{cfg.dataset}:{Path(path).name}" for path in cfg.input}
    for at, (path, line, text) in enumerate(chunk):
        try:
            raw = parse_object(text)
            if tasks:
                number = str(raw.get("task_id")).rpartition("/")[2]
                if not (number.isdecimal() and tasks[0] <= int(number) <= tasks[1]):
                    raise Rejected("task_not_selected", f"task {number} is outside {cfg.tasks}")
            for row in DATASETS[cfg.dataset](raw, f"{names[path]}:{line}"):
                yield at, row, {"place": (path, line)}
        except Rejected as error:
            failed.append((at, error))


def _surviving(rows: list, check: Callable, failed: list) -> Iterator[tuple[int, dict, dict]]:
    """Yield the rows that pass a check; the reasons of the others go to `failed`."""
    for item in rows:
        at, row, measured = item
        try:
            check(row, measured)
            yield item
        except Rejected as error:
            failed.append((at, error))


def _drop(cfg: Settings, error: Rejected, place, report: Report, rejects: TextIO) -> None:
    """Count and list a rejected row; raise ValueError for a bad one under --on_bad_row=fail."""
    if error.is_bad and cfg.on_bad_row == "fail":
        raise ValueError(
            f"{place[0]}:{place[1]}: {error}; correct the line, or set --on_bad_row=skip"
        ) from None
    _reject(rejects, report, place, error)


# The checks of a row, in their order; each may add to what is measured of it, and raises Rejected


def _check_schema(row: dict, measured: dict) -> None:
    try:
        check_row(row, 0)
    except ValueError as error:
        raise Rejected("bad_schema", str(error), is_bad=True) from None


def _measure(cfg: Settings, tokenizer: Tokenizer, row: dict, measured: dict) -> None:
    measured |= {
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


def _check_rate(cfg: Settings, rates: dict[bytes, Measured], row: dict, measured: dict) -> None:
    if rates:
        how = (cfg.pass_rate_min, cfg.pass_rate_max, cfg.unmeasured, cfg.pass_rate_by)
        measured["has_rate"] = add_rate(row, rates, *how)


def _check_first(seen: Seen, row: dict, measured: dict) -> None:
    first = seen.first(text_key(row["domain"], row["prompt"]), measured["place"])
    if first:
        raise Rejected("duplicate", f"of {first[0]}:{first[1]}")
