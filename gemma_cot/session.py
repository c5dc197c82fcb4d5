"""How long a run may take, and who asks it to stop: --session, a signal, preemption.

A session measures turns of the loop, says after the first ones how many steps fit, and ends a stage
early enough for what must come after it. A signal is noted; the run looks at it between turns, so
that whatever it stops has been saved. On several hosts every answer is the same on all of them.
Called by run; knows no stage's mathematics.
"""

import math
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from itertools import pairwise

import jax
import numpy as np
from jax.experimental import multihost_utils

from gemma_cot.settings import session_seconds

MEASURED = 2  # turns that the forecast is made of; a stage's first turn compiles and is none
RECENT = 5  # turns of which the longest is the one to come


class Interrupted(Exception):
    """The run was asked to stop, and what it had is saved."""


class Session:
    """The time limit `text` (--session, "" for none), counted from now; and requests to stop.

    say(line) shows the forecast.
    """

    def __init__(
        self,
        text: str = "",
        say: Callable[[str], None] = lambda line: None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._say, self._clock, self.began = say, clock, clock()
        self._end = self.began + session_seconds(text)
        self.asked = ""  # the name of the signal that asked the run to stop
        self._signal = ""
        self._polls = 0
        self._stage, self._first, self._forecast_due = "", 0, False
        self._ends = deque(maxlen=RECENT + 1)  # (time, steps done) after each turn of the stage

    @contextmanager
    def listening(self) -> Iterator["Session"]:
        """Take SIGTERM, SIGINT and SIGHUP (the terminal is closed) as requests to stop; a second
        SIGINT ends the process at once. Under nohup SIGHUP stays ignored.

        Under jax.distributed SIGTERM is JAX's, which tells all hosts of it.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ours = [signal.SIGINT] if _notices() else [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            ours.append(signal.SIGHUP)
        before = {number: signal.signal(number, self._note) for number in ours}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame) -> None:
        self._signal, again = signal.Signals(number).name, ""
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)  # the next one needs no Python to end the process
            again = "; again to end at once"
        with suppress(OSError):  # the terminal may be gone
            os.write(2, f"\n{self._signal}: stopping after this step{again}\n".encode())

    def stops(self, reserve: float = 0.0) -> bool:
        """Whether to begin no other turn: asked to stop, or no time for it and `reserve` seconds.

        On several hosts all must call it equally often; the answer is then the same.
        """
        longest = max(self._seconds(), default=0.0)
        late = self._clock() + longest + reserve > self._end
        noticed = bool(self._signal)
        if _notices():
            self._polls += 1
            noticed |= multihost_utils.reached_preemption_sync_point(self._polls)
        if jax.process_count() > 1:
            mine = np.array([noticed, late])
            noticed, late = multihost_utils.process_allgather(mine).any(axis=0)
        if noticed and not self.asked:
            self.asked = self._signal or "a preemption notice"
        return bool(self.asked) or bool(late)

    def spent(self) -> dict[str, float]:
        """Return the seconds so far, "total"; past its end also those since then, "over_session"
        (the first turn of a stage compiles, and how long that takes is not forecast)."""
        now = self._clock()
        late = {"over_session": round(now - self._end, 2)} if now > self._end else {}
        return {"total": round(now - self.began, 2)} | late

    def turn(self, stage: str, step: int, total: int, reserve: float) -> bool:
        """Whether another turn of `stage`, `step` of whose `total` steps are done, may begin.

        reserve: seconds that what comes after the stage takes. Shows the forecast once a stage.
        """
        if stage != self._stage:
            self._stage, self._forecast_due, self._first = stage, self._end < math.inf, step
            self._ends.clear()
        elif step > self._first:
            self._ends.append((self._clock(), step))
        if self._forecast_due and len(self._seconds()) == MEASURED and step < total:
            self._forecast_due = False
            self._say(self.forecast(stage, step, total, reserve))
        return not self.stops(reserve)

    def forecast(self, stage: str, step: int, total: int, reserve: float) -> str:
        """Return the line that says when the stage would end and how many steps of it fit."""
        (began, first), (now, last) = self._ends[-1 - MEASURED], self._ends[-1]
        seconds = (now - began) / max(last - first, 1)
        left = self._end - now - reserve
        fits = min(total, step + max(0, int(left / max(seconds, 1e-9))))
        rest = f"evaluation and export ({reserve:.0f} s kept back)"
        line = f"session: {seconds:.3g} s a {stage.upper()} step, measured on {last - first}; "
        if fits < total:
            return line + (
                f"{fits} of {total} steps fit with {rest} before {self._at(self._end)}; the "
                f"learning rate stays on the schedule of {total} steps"
            )
        end = now + (total - step) * seconds
        return line + (
            f"all {total} steps would end at {self._at(end)}, {rest} at {self._at(end + reserve)}, "
            f"before {self._at(self._end)}"
        )

    def _seconds(self) -> list[float]:
        """Return the lengths of the latest turns."""
        return [b - a for (a, _), (b, _) in pairwise(self._ends)]

    def _at(self, moment: float) -> str:
        """Return the time of day of a moment of the clock."""
        ahead = timedelta(seconds=moment - self._clock())
        return (datetime.now() + ahead).strftime("%a %H:%M:%S")


def _notices() -> bool:
    """Whether JAX passes preemption notices on to all hosts."""
    return jax.distributed.is_initialized() and jax.config.jax_enable_preemption_service
