"""A progress bar for long stages, standard library only. Knows nothing of what it counts."""

import shutil
import sys
import time
from collections.abc import Callable
from typing import TextIO


class Progress:
    """Show count, rate and time left of a long stage on stderr. A context manager.

    A terminal sees one line redrawn; a log file gets a line at most every `every_seconds`, and the
    last one. `start` counts what a resumed stage had done before: it is in the bar, not the rate.
    """

    def __init__(
        self,
        label: str,
        total: int,
        start: int = 0,
        every_seconds: float = 10,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._label, self._total, self._start, self._count = label, total, start, start
        self._stream, self._clock = stream or sys.stderr, clock
        self._redraws = self._stream.isatty()
        self._every = 0.1 if self._redraws else every_seconds
        self._began = self._shown = clock()
        self._shown_count = -1  # nothing has been shown yet
        self._note = ""

    def update(self, n: int = 1, note: str = "") -> None:
        """Count `n` more; `note` stands at the end of the line until the next update."""
        self._count, self._note = self._count + n, note
        if self._clock() - self._shown >= self._every:
            self._show()

    def count(self, n: int = 1) -> None:
        """Count `n` more and show nothing: for a stage that prints lines of its own."""
        self._count += n

    def time_left(self) -> str:
        """Return the time left at the rate so far, "?" before anything is done."""
        done = self._count - self._start
        left = max(0, self._total - self._count) * (self._clock() - self._began)
        return _clock_time(left / done) if done else "?"

    def line(self) -> str:
        """Return the line, e.g. `evaluate  [####----]  50/100  4.8/s  10s left  12 cut off`."""
        seconds, total = self._clock() - self._began, self._total
        done = self._count - self._start
        filled = min(20, 20 * self._count // total) if total else 20
        parts = [self._label, f"[{'#' * filled:-<20}]", f"{self._count}/{total}"]
        if done and seconds > 0:
            rate = done / seconds
            parts.append(f"{rate:.1f}/s" if rate >= 1 else f"{1 / rate:.1f}s each")
            left = max(0, total - self._count) / rate
            parts.append(f"{_clock_time(left)} left" if left else f"{_clock_time(seconds)} in all")
        return "  ".join(parts + [self._note] * bool(self._note))

    def _show(self, end: str = "") -> None:
        self._shown, self._shown_count = self._clock(), self._count
        if self._redraws:  # return to column 0, and erase what the longer last line left behind
            columns = shutil.get_terminal_size().columns - 1
            self._stream.write(f"\r{self.line()[:columns]}\x1b[K{end}")
        else:
            self._stream.write(self.line() + "\n")
        self._stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if self._redraws or self._shown_count != self._count:
            self._show(end="\n")


def _clock_time(seconds: float) -> str:
    """Return 8s, 3m08s or 2h03m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s" if minutes else f"{rest}s"
