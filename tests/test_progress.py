"""The bar in a log file and on a terminal, against a clock that the test turns."""

import io

import pytest

from gemma_cot.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_log_file_gets_a_line_every_ten_seconds_and_a_last_one():
    stream, clock = io.StringIO(), Clock()
    with Progress("evaluate", 100, stream=stream, clock=clock) as progress:
        for _ in range(25):  # 4 seconds each: shown at 12, 24, ... 96 (every third), and at 100
            clock.now += 4
            progress.update(4, note="3 cut off")
    lines = stream.getvalue().splitlines()
    assert len(lines) == 9
    # 12 of 100 in 12 s is 1.0/s, so 88 s are left; 20 * 12 // 100 = 2 marks.
    assert lines[0] == (
        "evaluate  [##------------------]  12/100  1.0/s  1m28s left  3 cut off"
    )  # fmt: skip
    assert lines[-1] == f"evaluate  [{'#' * 20}]  100/100  1.0/s  1m40s in all  3 cut off"
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_terminal_redraws_one_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    stream, clock = Terminal(), Clock()
    with Progress("x", 10, stream=stream, clock=clock) as progress:
        for _ in range(10):
            clock.now += 0.5
            progress.update(note="a note that is longer than the terminal is wide")
    text = stream.getvalue()
    assert text.count("\n") == 1 and text.endswith("\n")
    draws = text.split("\r")[1:]
    assert len(draws) == 11 and all(draw.rstrip("\n").endswith("\x1b[K") for draw in draws)
    assert max(len(draw.rstrip("\n").removesuffix("\x1b[K")) for draw in draws) == 39


def test_resumed_stage_counts_only_its_own_work_in_the_rate():
    clock = Clock()
    progress = Progress("sft", 1000, start=900, stream=io.StringIO(), clock=clock)
    assert progress.line() == "sft  [##################--]  900/1000"  # no rate yet
    clock.now += 100
    progress.update(20)  # 20 in 100 s: 5 s each, 80 left
    assert progress.line() == "sft  [##################--]  920/1000  5.0s each  6m40s left"


@pytest.mark.parametrize(
    ("seconds", "words"), [(8, "8s in all"), (188, "3m08s in all"), (7380, "2h03m in all")]
)
def test_times_are_readable(seconds, words):
    clock = Clock()
    progress = Progress("x", 1, stream=io.StringIO(), clock=clock)
    clock.now += seconds
    progress.update()
    assert progress.line().endswith(words)


def test_empty_and_overfull_stages_still_print():
    stream = io.StringIO()
    with Progress("nothing", 0, stream=stream, clock=Clock()):
        pass
    assert stream.getvalue() == f"nothing  [{'#' * 20}]  0/0\n"
    clock = Clock()
    progress = Progress("x", 2, stream=io.StringIO(), clock=clock)
    clock.now += 3
    progress.update(3)
    assert progress.line() == f"x  [{'#' * 20}]  3/2  1.0/s  3s in all"


def test_a_failing_stage_shows_where_it_stopped_and_still_raises():
    stream = io.StringIO()
    with (
        pytest.raises(RuntimeError, match="boom"),
        Progress("x", 4, stream=stream, clock=Clock()) as progress,
    ):
        progress.update(3)
        raise RuntimeError("boom")
    assert "3/4" in stream.getvalue()
