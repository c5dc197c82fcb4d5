"""From input files to an output folder: read the questions, ask, write rows, rejects and a summary.

    journal.jsonl   every answer received, append-only; what is paid for
    rows.jsonl      rows in our schema          } made anew from the journal at the end of every
    rejects.jsonl   questions without a row     } run, so a change of the checks costs nothing
    summary.json    the counts that the command prints

Called by the command; prints nothing but the progress bar and a word when it has to wait.
"""

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from gemma_cot.data import DOMAINS
from gemma_cot.distill.collect import Collector, collect, settle, worst_usd
from gemma_cot.distill.journal import Journal, read_records
from gemma_cot.distill.settings import Settings, teacher_of, usd
from gemma_cot.distill.template import Question, request_body
from gemma_cot.prepare.convert import DATASETS, Rejected, parse_object, read_rows
from gemma_cot.prepare.filters import TestQuestions, grams, near_duplicates, text_key
from gemma_cot.progress import Progress
from gemma_cot.tokenizer import Tokenizer, encode_prompt

TOKENS_A_CHARACTER = 0.3  # DeepSeek's figure for English


@dataclass
class Input:
    """The questions to ask, and the rows that are not asked, by reason."""

    questions: list[Question] = field(default_factory=list)
    rejects: list[dict] = field(default_factory=list)  # file, line, reason, detail


def read_input(cfg: Settings, tokenizer: Tokenizer) -> Input:
    """Read the questions and drop, before anything is paid, what `prepare` would drop after.

    A row needs `domain` and `prompt`; `metadata.final_answer` is its gold answer where it has one.
    Raises ValueError for an unreadable file, a bad row under --on_bad_row=fail, or no question.
    """
    found, tests = Input(), TestQuestions(list(_test_rows(cfg)))
    seen: dict[bytes, tuple[str, int]] = {}
    kept: list[tuple[Question, tuple[str, int]]] = []
    for path in cfg.input:
        for line, text in read_rows(path):
            try:
                question = read_question(parse_object(text))
                _check_question(cfg, question, tests, tokenizer)
                key = text_key(question.domain, question.prompt)
                if key in seen:
                    raise Rejected("duplicate", f"of {seen[key][0]}:{seen[key][1]}")
                seen[key] = (path, line)
                kept.append((question, (path, line)))
            except Rejected as error:
                if error.is_bad and cfg.on_bad_row == "fail":
                    raise ValueError(
                        f"{path}:{line}: {error}; correct the line, or set --on_bad_row=skip"
                    ) from None
                _reject(found, (path, line), error)
    for domain in DOMAINS:
        own = [i for i, (question, _) in enumerate(kept) if question.domain == domain]
        repeats = near_duplicates(
            [grams(domain, kept[i][0].prompt) for i in own], cfg.max_similarity
        )
        for i, j in repeats.items():
            path, line = kept[own[j]][1]
            _reject(found, kept[own[i]][1], Rejected("near_duplicate", f"of {path}:{line}"))
    dropped = {(one["file"], one["line"]) for one in found.rejects}
    found.questions = [question for question, place in kept if place not in dropped]
    if not found.questions:
        reasons = dict(Counter(one["reason"] for one in found.rejects))
        raise ValueError(
            f"--input: at least one question must be left to ask, got {reasons}; change the limits "
            "or the files"
        )
    found.questions = found.questions[: cfg.limit or None]
    return found


def read_question(row: dict) -> Question:
    """Return the question of an input row. Raises Rejected."""
    domain, prompt = row.get("domain"), row.get("prompt")
    metadata = row.get("metadata", {})
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except ValueError:
        raise Rejected("bad_fields", "must be text in UTF-8, got half a surrogate pair", True) \
            from None  # fmt: skip
    if domain not in DOMAINS:
        raise Rejected("bad_fields", f"domain must be one of {DOMAINS}, got {domain!r:.60}", True)
    if not isinstance(prompt, str) or not prompt.strip():
        raise Rejected("bad_fields", f"prompt must be a non-blank string, got {prompt!r:.60}", True)
    if not isinstance(metadata, dict):
        raise Rejected("bad_fields", f"metadata must be an object, got {metadata!r:.60}", True)
    gold = metadata.get("final_answer", "")
    if not isinstance(gold, str):
        raise Rejected("bad_fields", f"final_answer must be a string, got {gold!r:.60}", True)
    known = ("domain", "prompt", "chosen", "metadata", "reasoning")
    extra = {key: value for key, value in row.items() if key not in known}
    return Question(domain, prompt, gold.strip(), metadata, extra)


def _check_question(cfg, question: Question, tests: TestQuestions, tokenizer: Tokenizer) -> None:
    length = len(encode_prompt(tokenizer, question.prompt, cfg.instruction))
    if length > cfg.max_prompt_tokens:
        raise Rejected("prompt_too_long", f"{length} tokens, at most {cfg.max_prompt_tokens}")
    tests.check({"domain": question.domain, "prompt": question.prompt}, cfg.max_overlap)


def _test_rows(cfg: Settings) -> Iterator[dict]:
    """Yield the rows of --against: FILE in our schema, or DATASET:FILE as published."""
    for name in cfg.against:
        dataset, colon, path = name.partition(":")
        if not colon or dataset not in DATASETS:
            dataset, path = "ours", name
        for line, text in read_rows(path):
            try:
                yield from DATASETS[dataset](parse_object(text), "test")
            except Rejected as error:
                if error.is_bad:
                    raise ValueError(f"{path}:{line}: {error}; correct --against") from None


def _reject(found: Input, place: tuple[str, int], error: Rejected) -> None:
    entry = {"file": place[0], "line": place[1], "reason": error.code, "detail": error.detail}
    found.rejects.append(entry)


def distill(
    cfg: Settings, key: str, tokenizer: Tokenizer,
    watch: Callable[[asyncio.Event], None] = lambda stop: None,
    say: Callable[[str], None] = lambda text: None,
) -> dict:
    """Ask what is not answered yet and write the folder; return the summary.

    watch: called with the event that stops the asking. say: takes a line for the user.
    summary["stopped"] says why a run ended early, summary["failed"] whether that is an error.
    """
    found = read_input(cfg, tokenizer)
    with Journal(Path(cfg.output) / "journal.jsonl") as journal:
        if not journal.lock(wait=False):
            say("waiting for another run on this folder, or for the last answers of a killed one")
            journal.lock(wait=True)
        journal.load()
        answers = journal.answers
        waiting = [q for q in found.questions if type(settle(cfg, q, answers, tokenizer)) is int]
        before = len(found.questions) - len(waiting)
        with Progress("distill", len(found.questions), before) as progress:
            run = asyncio.run(collect(cfg, key, waiting, journal, tokenizer, progress, watch))
        return write_outputs(cfg, found, journal, tokenizer, run)


def estimate(cfg: Settings, tokenizer: Tokenizer) -> dict:
    """Return what a run would do: its first request, the questions it asks, tokens and dollars.

    Nothing is sent and nothing is written. Dollars: `worst`, if every answer used every token it
    may; `likely`, where the journal has answers, at their mean length.
    """
    found = read_input(cfg, tokenizer)
    records, _ = read_records(Path(cfg.output) / "journal.jsonl")
    answers = {record["key"]: record for record in records if record["fault"] is None}
    numbers = [(q, settle(cfg, q, answers, tokenizer)) for q in found.questions]
    bodies = [request_body(cfg, q, number) for q, number in numbers if type(number) is int]
    price = teacher_of(cfg).price
    texts = [sum(len(message["content"]) for message in body["messages"]) for body in bodies]
    lengths = [record["usage"]["completion_tokens"] for record in answers.values()]
    usage = {"prompt_tokens": round(sum(texts) * TOKENS_A_CHARACTER), "cached_tokens": 0}
    usage["completion_tokens"] = round(len(bodies) * sum(lengths) / max(len(lengths), 1))
    return {
        "request": bodies[0] if bodies else None,
        "questions": len(found.questions),
        "not_asked": Counter(entry["reason"] for entry in found.rejects),
        "to_ask": len(bodies),
        "prompt_tokens": usage["prompt_tokens"],
        "worst_usd": sum(worst_usd(price, body) for body in bodies) if price else None,
        "likely_usd": usd(price, usage, datetime.now(UTC)) if price and lengths else None,
    }


def write_outputs(
    cfg: Settings, found: Input, journal: Journal, tokenizer: Tokenizer, run: Collector
) -> dict:
    """Write rows.jsonl, rejects.jsonl and summary.json from the journal; return the summary."""
    rows, rejects, domains = [], list(found.rejects), {}
    for question in found.questions:
        outcome = settle(cfg, question, journal.answers, tokenizer)
        counts = domains.setdefault(question.domain, Counter())
        if isinstance(outcome, dict):
            rows.append(outcome)
            counts["rows"] += 1
        elif isinstance(outcome, Rejected):
            counts["rejected"] += 1
            rejects.append({"prompt": question.prompt, "domain": question.domain,
                            "reason": outcome.code, "detail": outcome.detail})  # fmt: skip
        else:
            counts["open"] += 1
    for record in journal.records:
        counts = domains.setdefault(record["domain"], Counter())
        counts["requests"] += 1
        counts["usd"] += record["usd"]
        counts.update(record["usage"])
    not_asked = Counter(one["reason"] for one in found.rejects)
    summary = {
        "teacher": cfg.teacher,
        "questions": len(found.questions),
        "not_asked": dict(not_asked),
        "answered_now": run.answered,
        "rows": len(rows),
        "rejected": dict(Counter(one["reason"] for one in rejects) - not_asked),
        "open": sum(counts["open"] for counts in domains.values()),
        "gave_up": dict(run.gave_up),
        "failed_requests": dict(run.failures),
        "usd": journal.usd,
        "stopped": run.reason,
        "failed": run.failed,
        "domains": {name: dict(counts) for name, counts in sorted(domains.items())},
    }
    folder = Path(cfg.output)
    _replace(folder / "rows.jsonl", _lines(rows))
    _replace(folder / "rejects.jsonl", _lines(rejects))
    _replace(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _lines(rows: Iterable[dict]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _replace(path: Path, text: str) -> None:
    """Write a file by one rename: the old one stands until the new one is whole."""
    fresh = path.with_suffix(".tmp")
    try:
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, path)
    except OSError as error:
        raise ValueError(
            f"{path}: must be written, got {error.strerror}; the answers are safe in "
            "journal.jsonl: make room and run the same command again"
        ) from None


def table(summary: dict) -> str:
    """Return the final table: what became of the questions, then tokens and dollars by domain."""
    def by_reason(counts: dict) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(counts.items())) or "-"

    lines = [
        f"questions        {summary['questions']:8d}",
        f"not asked        {sum(summary['not_asked'].values()):8d}  "
        f"{by_reason(summary['not_asked'])}",
        f"answered now     {summary['answered_now']:8d}",
        f"rows             {summary['rows']:8d}",
        f"rejected         {sum(summary['rejected'].values()):8d}  "
        f"{by_reason(summary['rejected'])}",
        f"left open        {summary['open']:8d}  {by_reason(summary['gave_up'])}",
        f"failed requests  {sum(summary['failed_requests'].values()):8d}  "
        f"{by_reason(summary['failed_requests'])}",
        "",
        "domain        rows  rejected  requests  tokens in   (cached)  tokens out      dollars",
    ]
    total = Counter()
    for name, counts in summary["domains"].items():
        total.update(counts)
        lines.append(_domain_line(name, Counter(counts)))
    lines.append(_domain_line("all", total))
    return "\n".join(lines)


def _domain_line(name: str, counts: Counter) -> str:
    return (
        f"{name:9s} {counts['rows']:8d} {counts['rejected']:9d} {counts['requests']:9d} "
        f"{counts['prompt_tokens']:10d} {counts['cached_tokens']:10d} "
        f"{counts['completion_tokens']:11d} {counts['usd']:12.4f}"
    )
