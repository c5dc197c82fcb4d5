"""Run a reward function over the corpus and say what it wrongly pays or refuses.

A function may pay for the format, the steps, the answer, or any mixture: it is first calibrated on
plain completions of each kind (format kept or not, steps shown or not, answer right or wrong), and
then every case of the corpus must score what plain completions of its kind score. A function whose
score depends on something else (length, style) is not judged by cases, only for errors, speed and
mixing up rows. Called by `doctor --reward`; prints nothing.
"""

import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product

from gemma_cot.grpo.reward import RewardError
from gemma_cot.guard.corpus import QUESTIONS, Case, Question, corpus, tagged
from gemma_cot.guard.user import checked

SECONDS_A_CALL = 5  # a call that takes longer hangs
SLOW_SECONDS = 0.5  # one completion; a rollout has hundreds
PARTS = ("format", "steps", "answer")


class _TooLong(BaseException):
    """Raised by the alarm inside a reward function; no `except Exception` there can catch it."""


@dataclass
class Report:
    """What was found; `wrong` lines are failures."""

    pays_for: dict[str, float] = field(default_factory=dict)  # part -> most that it changes a score
    judged: int = 0  # cases whose score was compared
    paid: list[tuple[Case, float, float]] = field(default_factory=list)  # case, got, wanted
    refused: list[tuple[Case, float, float]] = field(default_factory=list)
    raised: list[tuple[str, str]] = field(default_factory=list)  # error, what the case tries
    mixed_up: list[str] = field(default_factory=list)  # cases that score differently in a batch
    slow: list[str] = field(default_factory=list)
    per_second: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong."""
        return not (self.paid or self.refused or self.raised or self.mixed_up or self.slow)


def lint_reward(function: Callable) -> Report:
    """Return the report on a reward function of the TRL/Tunix calling convention."""
    report = Report()
    tables = {domain: _calibrate(function, q, report) for domain, q in QUESTIONS.items()}
    for part in PARTS:
        report.pays_for[part] = max(table.effect(part) for table in tables.values())
    reach = max(report.pays_for.values())
    spread = max(table.spread for table in tables.values())
    tolerance = max(spread, reach / 25) + 1e-9  # a step of five among three rewards is more
    cases, alone, seconds = corpus(), [], 0.0
    for case in cases:
        began = time.perf_counter()
        alone.append(_score(function, [case], report))
        took = time.perf_counter() - began
        seconds += took
        if took > SLOW_SECONDS and alone[-1]:
            report.slow.append(f"{case.tries}: {took:.1f} s")
    report.per_second = len(cases) / seconds
    for case, scores in zip(cases, alone, strict=True):
        wanted = tables[case.question.domain].wanted(case)
        if reach <= 2 * tolerance or scores is None or None in (scores[0], wanted):
            continue  # not judged
        report.judged += 1
        if scores[0] > wanted + tolerance:
            report.paid.append((case, scores[0], wanted))
        elif scores[0] < wanted - tolerance:
            report.refused.append((case, scores[0], wanted))
    _check_batches(function, cases, alone, report)
    return report


@dataclass(frozen=True)
class Table:
    """Mean scores of plain completions by kind (format, steps, answer), None where none applies."""

    means: dict[tuple[int, int, int], float | None]
    spread: float  # largest difference within a kind

    def effect(self, part: str) -> float:
        """Return the most that a part changes the score, the two others being equal."""
        place, changes = PARTS.index(part), [0.0]
        for kind, mean in self.means.items():
            other = self.means[*kind[:place], 1 - kind[place], *kind[place + 1 :]]
            if mean is not None and other is not None:
                changes.append(abs(mean - other))
        return max(changes)

    def wanted(self, case: Case) -> float | None:
        """Return what plain completions of the case's kind score, between 0 and 5 steps linear."""
        kind = (int(case.format), int(case.outcome))
        low, high = self.means[kind[0], 0, kind[1]], self.means[kind[0], 1, kind[1]]
        if low is None or high is None:
            return None
        return low + case.process * (high - low)


def _calibrate(function: Callable, question: Question, report: Report) -> Table:
    """Score two plain completions of each of the eight kinds."""
    means, spread = {}, 0.0
    for is_format, has_steps, is_right in product((0, 1), repeat=3):
        cases = [
            Case(f"plain completion in other words {i}", False, text, question, question.gold,
                 is_format, has_steps, is_right)
            for i, text in enumerate(_plain(question, is_format, has_steps, is_right))
        ]  # fmt: skip
        scores = _score(function, cases, report) or [None]
        given = [value for value in scores if value is not None]
        means[is_format, has_steps, is_right] = sum(given) / len(given) if given else None
        spread = max(spread, max(given, default=0.0) - min(given, default=0.0))
    return Table(means, spread)


def _plain(question: Question, is_format: int, has_steps: int, is_right: int) -> list[str]:
    """Return two honest completions of a kind, of different length and wording.

    Where the format is not kept, no more tags are left than steps and answer need to be found.
    """
    answer = question.gold if is_right else question.wrong
    texts = []
    for words, space in (("Let me think.", ""), ("I read it twice, slowly, and see.", "\n")):
        reasoning = f"{words} {question.prose}" if has_steps else words
        if is_format:
            texts.append(tagged(reasoning, answer, space))
            continue
        steps = f"<reasoning>{reasoning}</reasoning>" if has_steps else reasoning
        last = f"<answer>{answer}</answer>" if is_right else answer
        texts.append(f"{steps}{space} So I say: {last}")
    return texts


def _score(function: Callable, cases: list[Case], report: Report) -> list[float | None] | None:
    """Return the scores of a batch of cases, None (and a line in the report) where it fails."""
    prompts = [case.question.prompt for case in cases]
    texts = [case.completion for case in cases]
    columns = {
        "domain": [case.question.domain for case in cases],
        "metadata": [
            {"checkpoints": list(case.question.checkpoints), "final_answer": case.gold}
            for case in cases
        ],
        "completion_ids": [list(text.encode("utf-8", "replace")) for text in texts],
    }
    try:
        with _time_limit():
            return checked("", function)(prompts, texts, **columns)
    except RewardError as error:
        message = str(error).removeprefix("reward function - ")
        report.raised.append((message.partition(" on completion")[0], cases[0].tries))
    except _TooLong:
        report.slow.append(f"{cases[0].tries}: over {SECONDS_A_CALL} s, stopped")
    return None


@contextmanager
def _time_limit():
    """Raise _TooLong in the block after SECONDS_A_CALL; a regular expression can be broken off."""

    def stop(*_):
        raise _TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS_A_CALL)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _check_batches(function: Callable, cases: list, alone: list, report: Report) -> None:
    """Score the good cases again, as one batch: the scores must be the same."""
    good = [(case, scores[0]) for case, scores in zip(cases, alone, strict=True) if scores]
    if not good:
        return
    again = _score(function, [case for case, _ in good], report) or []
    for (case, before), now in zip(good, again, strict=False):
        if before != now:
            report.mixed_up.append(f"{case.tries}: {before} alone, {now} in a batch")


def lines(report: Report, most: int = 12) -> list[str]:
    """Return the printed table, at most `most` examples of each kind of failure."""
    pays = [f"{part} {value:.2g}" for part, value in report.pays_for.items() if value]
    out = [
        f"pays for   {', '.join(pays) or 'neither format, steps nor answer'}"
        "  (the most that each changes a score)",
        f"judged on  {report.judged} cases of hostile and legitimate completions"
        + ("" if report.judged else ": its score follows something else, or nothing"),
        f"speed      {report.per_second:,.0f} completions a second, one at a time",
    ]
    for word, found in (("pays", report.paid), ("refuses", report.refused)):
        out.append(f"{'FAIL' if found else 'ok  '}  wrongly {word}: {len(found)}")
        out += [
            f"      {got:.2f} instead of {wanted:.2f}  {case.tries:.50}  "
            f"...{case.completion[-50:]!r}"
            for case, got, wanted in found[:most]
        ] + [f"      ... and {len(found) - most} more"] * (len(found) > most)
    errors = dict(reversed(report.raised))  # each error once, with the first case
    raised = [f"{error} - first on: {tries}" for error, tries in reversed(errors.items())]
    for word, found in (("raises", raised), ("too slow", report.slow),
                        ("depends on the batch", report.mixed_up)):  # fmt: skip
        out.append(f"{'FAIL' if found else 'ok  '}  {word}: {len(found)}")
        out += [f"      {line:.160}" for line in found[:most]]
    return out
