"""Ask until every question has its row, its reason or no hope: the loop around `teacher.ask`.

What is known of a question is a pure function of the journal (`settle`), so a new start goes on
where the last one ended. Requests in flight are always waited for: they are paid for already.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from gemma_cot.distill.answer import TRIES, make_row
from gemma_cot.distill.journal import Journal, Stop
from gemma_cot.distill.settings import Price, Settings, teacher_of
from gemma_cot.distill.teacher import Retry, TooFast, ask, open_client
from gemma_cot.distill.template import Question, digest, request_body, request_key
from gemma_cot.prepare.convert import Rejected
from gemma_cot.progress import Progress
from gemma_cot.tokenizer import Tokenizer

MAX_BACKOFF = 60  # seconds
WORST_TOKENS_A_CHARACTER = 1.0  # DeepSeek's figures: 0.3 for English, 0.6 for Chinese


def settle(
    cfg: Settings, question: Question, answers: dict[str, dict], tokenizer: Tokenizer
) -> dict | Rejected | int:
    """Return a question's row, why there is none, or the number of the request to send next."""
    number, reasons = 0, Counter()
    while record := answers.get(request_key(cfg, question, number)):
        number += 1
        try:
            return make_row(record, question, tokenizer, cfg.max_completion_tokens)
        except Rejected as error:
            reasons[error.code] += 1
            if reasons[error.code] >= TRIES.get(error.code, 1):
                return error
    return number


def worst_usd(price: Price | None, body: dict) -> float:
    """Return the most a request can cost: its text by the character, and every token allowed."""
    if price is None:
        return 0.0
    characters = sum(len(message["content"]) for message in body["messages"])
    allowed = body.get("max_tokens") or body.get("max_completion_tokens") or 0
    dollars = characters * WORST_TOKENS_A_CHARACTER * price.input + allowed * price.output
    return dollars * price.peak_factor / 1e6


class Gate:
    """How many requests are in flight: halved at a 429, one more after a quiet spell."""

    def __init__(self, most: int):
        self.limit = self._most = most
        self._flying, self._quiet, self._opens, self._halved = 0, 0, 0.0, 0.0
        self._changed = asyncio.Condition()

    async def __aenter__(self) -> float:
        """Wait for a place; return the time."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._flying < self.limit)
            self._flying += 1
        return time.monotonic()

    async def __aexit__(self, *_) -> None:
        async with self._changed:
            self._flying -= 1
            self._changed.notify_all()

    def closed_for(self) -> float:
        """Return the seconds until the server wants to be asked again."""
        return max(0.0, self._opens - time.monotonic())

    def too_fast(self, began: float, seconds: float) -> None:
        """Take a 429 to a request that `began` then: requests sent before the last one say nothing
        new about the limit."""
        self._opens = max(self._opens, time.monotonic() + seconds)
        self._quiet = 0
        if began >= self._halved:
            self.limit, self._halved = max(1, self.limit // 2), time.monotonic()

    def answered(self) -> None:
        """Take an answer: after as many in a row as fly at once, one more may fly."""
        self._quiet += 1
        if self._quiet >= self.limit and self.limit < self._most:
            self.limit, self._quiet = self.limit + 1, 0


@dataclass
class Collector:
    """What the workers of one run share."""

    cfg: Settings
    key: str
    journal: Journal
    tokenizer: Tokenizer
    progress: Progress
    stop: asyncio.Event
    gate: Gate
    reason: str = ""  # why the run stopped early
    failed: bool = False  # ... and whether that is an error
    answered: int = 0  # questions that got an answer in this run
    failures: Counter = field(default_factory=Counter)  # code -> requests without a usable answer
    gave_up: Counter = field(default_factory=Counter)  # code -> questions left for another run
    rejected: int = 0
    in_row: int = 0  # rejects since the last row
    reserved: float = 0.0  # dollars that the requests in flight may cost
    heard: float = field(default_factory=time.monotonic)  # when the last answer came

    def end(self, reason: str, failed: bool = True) -> None:
        """Ask nothing more; the first reason is kept."""
        if not self.stop.is_set():
            self.reason, self.failed = reason, failed
        self.stop.set()

    async def sleep(self, seconds: float) -> None:
        """Sleep, or until the run stops."""
        try:
            await asyncio.wait_for(self.stop.wait(), seconds)
        except TimeoutError:
            return


async def collect(
    cfg: Settings, key: str, questions: Iterable[Question], journal: Journal,
    tokenizer: Tokenizer, progress: Progress, watch: Callable[[asyncio.Event], None],
) -> Collector:
    """Ask for every question that is not settled; return what happened.

    watch: called with the event that stops the asking.
    """
    run = Collector(cfg, key, journal, tokenizer, progress, asyncio.Event(), Gate(cfg.concurrency))
    watch(run.stop)
    waiting = iter(questions)

    async def work() -> None:
        for question in waiting:
            if run.stop.is_set():
                return
            await pursue(run, client, question)

    async with open_client(cfg, key) as client, asyncio.TaskGroup() as tasks:
        for _ in range(cfg.concurrency):
            tasks.create_task(work())
    return run


async def pursue(run: Collector, client, question: Question) -> None:
    """Ask until a question is settled, hopeless, or the run stops."""
    heard = False
    while isinstance(
        outcome := settle(run.cfg, question, run.journal.answers, run.tokenizer), int
    ):
        try:
            answered = await obtain(run, client, question, outcome)
        except Stop as error:
            run.end(str(error))
            return
        heard = heard or answered
        if not answered:
            break
    run.answered += heard
    if isinstance(outcome, dict):
        run.in_row = 0
    elif not run.stop.is_set():
        run.rejected += isinstance(outcome, Rejected)
        run.in_row += 1
        if run.in_row >= run.cfg.max_rejects_in_row:
            last = outcome.code if isinstance(outcome, Rejected) else f"failed {dict(run.gave_up)}"
            run.end(
                f"teacher: rows must come, got {run.in_row} rejects in a row, the last {last}; "
                "look at rejects.jsonl, or raise --max_rejects_in_row"
            )
    if not isinstance(outcome, int):
        note = f"{run.rejected} rejected, ${run.journal.usd:.4f}, {run.gate.limit} at a time"
        run.progress.update(note=note)


async def obtain(run: Collector, client, question: Question, number: int) -> bool:
    """Have one request answered and its answer in the journal; False when that cannot be had."""
    cfg, body = run.cfg, request_body(run.cfg, question, number)
    names = {
        "key": request_key(cfg, question, number),
        "prompt_hash": digest(question.domain, question.prompt),
        "domain": question.domain,
        "try": number,
    }
    worst, failed, turn = worst_usd(teacher_of(cfg).price, body), 0, 0
    while True:
        while (wait := run.gate.closed_for()) and not run.stop.is_set():
            await run.sleep(wait)
        async with run.gate as began:
            if run.gate.closed_for() and not run.stop.is_set():
                continue  # closed while this one waited for a place
            if run.stop.is_set():
                return False
            if run.journal.usd + run.reserved + worst > cfg.max_usd:
                reason = f"--max_usd={cfg.max_usd:g} would be passed by another request"
                run.end(reason, failed=False)
                return False
            run.reserved += worst
            try:
                # after a useless reply another key: a server may remember that reply
                once = f"{names['key']}-{run.journal.useless[names['key']]}"
                record = await ask(client, cfg, body, run.key, once)
                await run.journal.append(names | record)
                run.gate.answered()
                run.heard = time.monotonic()
                return True
            except Retry as error:
                if error.record:
                    await run.journal.append(names | error.record)
                code, seconds, failed = error.code, error.seconds, failed + 1
            except TooFast as error:
                run.gate.too_fast(began, error.seconds)
                code, seconds = "http_429", 0.0
            finally:
                run.reserved -= worst
        run.failures[code] += 1
        if failed >= cfg.attempts:
            run.gave_up[code] += 1
            return False
        if time.monotonic() - run.heard > cfg.patience:
            raise Stop(
                f"teacher: must answer within {cfg.patience:g} s, got nothing but "
                f"{dict(run.failures)}; run the same command again later"
            )
        turn += 1
        longest = min(MAX_BACKOFF, cfg.backoff * 2 ** min(turn, 30))
        await run.sleep(max(seconds, random.uniform(0, longest)))  # full jitter
