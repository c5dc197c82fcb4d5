"""A session keeps back what must come at the end, forecasts, and listens to whoever stops it."""

import os
import signal
import socket
import subprocess
import sys
import time
from datetime import datetime, timedelta

import pytest

from gemma_cot.session import Session
from gemma_cot.settings import session_seconds


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def turns(text: str, total: int, seconds: float, reserve: float, first: float | None = None):
    """Run a stage of single steps of `seconds` each, the first `first`.

    Returns (steps done, when, what was said).
    """
    clock, said = Clock(), []
    session, step = Session(text, said.append, clock), 0
    while step < total and session.turn("grpo", step, total, reserve):
        clock.now += first if first and step == 0 else seconds
        step += 1
    return step, clock.now - 1000, said


def test_without_a_limit_every_step_is_done_and_nothing_said():
    assert turns("", 50, 10.0, 1e9) == (50, 500.0, [])


def test_a_stage_ends_before_what_is_kept_back_for_the_end():
    # 100 s less 30 kept back leave 70: seven steps of 10 s, an eighth would end at 80
    step, when, said = turns("100s", 50, 10.0, 30.0)
    assert (step, when) == (7, 70.0)
    assert len(said) == 1 and "10 s a GRPO step, measured on 2; 7 of 50 steps fit" in said[0]
    assert "30 s kept back" in said[0] and "schedule of 50 steps" in said[0]


def test_the_first_turn_compiles_and_is_not_measured():
    # after the first turn (40 s) 60 - 30 s are left: three steps of 10 s
    step, when, said = turns("100s", 50, 10.0, 30.0, first=40.0)
    assert (step, when) == (4, 70.0) and "10 s a GRPO step" in said[0]


@pytest.mark.parametrize("before", [3, 4])
def test_the_forecast_of_a_stage_knows_no_turn_of_the_stage_before(before):
    clock, said = Clock(), []
    session = Session("2h", said.append, clock)
    for stage, steps, seconds in (("sft", before, 3.0), ("grpo", 4, 10.0)):
        said.clear()
        for step in range(steps):
            assert session.turn(stage, step, 50, 30.0)
            clock.now += seconds
        clock.now += 1000.0  # its evaluation
    assert len(said) == 1 and said[0].startswith("session: 10 s a GRPO step, measured on 2; ")


def test_a_turn_of_several_steps_is_shared_among_them():
    # 500 s less the 240 of three turns and 60 kept back leave 200: 20 steps of 10 s on top of 24
    clock, said = Clock(), []
    session = Session("500s", said.append, clock)
    for step in range(0, 32, 8):
        assert session.turn("grpo", step, 100, 60.0)
        clock.now += 80.0
    (line,) = said
    assert "10 s a GRPO step, measured on 16; 44 of 100 steps fit" in line


def test_the_forecast_of_a_run_that_fits_names_both_ends():
    step, _, said = turns("1h", 60, 10.0, 120.0)
    assert step == 60 and "all 60 steps would end at" in said[0]
    end = datetime.now() + timedelta(seconds=570 + 120)  # 57 steps are left when it is said
    assert any(
        (end + timedelta(seconds=late)).strftime("%H:%M:%S") in said[0] for late in range(-3, 4)
    )


def test_a_slow_turn_is_reckoned_with():
    clock = Clock()
    session = Session("200s", clock=clock)
    for step, seconds in enumerate([10, 10, 50, 10]):
        assert session.turn("grpo", step, 9, 30.0)
        clock.now += seconds
    clock.now = 1000 + 121  # 79 s are left: 30 kept back and a turn of 50, as there was, do not fit
    assert not session.turn("grpo", 4, 9, 30.0)
    assert session.turn("grpo", 4, 9, 28.0)


def test_how_late_it_is():
    clock = Clock()
    session = Session("200s", clock=clock)
    clock.now += 200.0
    assert session.spent() == {"total": 200.0}
    clock.now += 7.0
    assert session.spent() == {"total": 207.0, "over_session": 7.0}
    assert Session(clock=clock).spent() == {"total": 0.0}


def test_no_time_at_all():
    assert turns("10s", 5, 1.0, 15.0)[0] == 0


def test_a_deadline_is_a_session_that_ends_then():
    in_an_hour = datetime.now() + timedelta(hours=1)
    assert session_seconds(in_an_hour.isoformat()) == pytest.approx(3600, abs=5)
    zoned = in_an_hour.astimezone().isoformat(timespec="minutes")
    assert session_seconds(zoned) == pytest.approx(3600, abs=65)
    for text in ("2020-01-01T00:00", "2026-13-01T00:00", "T"):
        with pytest.raises(ValueError, match="or a deadline ahead .*, got"):
            session_seconds(text)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_asks_to_stop_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with Session().listening() as session:
        assert not session.stops() and session.turn("sft", 0, 5, 0.0)
        os.kill(os.getpid(), number)
        assert not session.turn("sft", 1, 5, 0.0)
        assert session.asked == number.name and session.stops()
    assert signal.getsignal(number) is before
    assert f"{number.name}: stopping after this step" in capfd.readouterr().err


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Session().listening() as session:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not session.stops()
    finally:
        signal.signal(signal.SIGHUP, before)


LOOP = """
import time
from gemma_cot.session import Session
with Session().listening() as session:
    begun = False
    while not session.stops():
        if not begun:
            print("ready", flush=True)
        begun = True
        time.sleep(0.05)
print("saved", session.asked, flush=True)
"""


IN_C = """
import time
from gemma_cot.session import Session
with Session().listening() as session:
    print("ready", flush=True)
    while not session.stops():
        time.sleep(0.01)
    sum(range(10**15))  # like a compiled program: no Python runs until it ends
"""


@pytest.fixture
def start():
    """start(source) -> a process that runs it, once it listens to signals; none outlives a test."""
    begun = []

    def start(source: str) -> subprocess.Popen:
        begun.append(subprocess.Popen(
            [sys.executable, "-c", source], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        ))  # fmt: skip
        assert begun[-1].stdout.readline() == "ready\n"
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.wait()


def test_the_turn_is_finished_and_the_process_ends_in_order(start):
    process = start(LOOP)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved SIGTERM\n" and process.returncode == 0


def test_a_second_interrupt_ends_at_once(start):
    process = start(IN_C)
    process.send_signal(signal.SIGINT)
    assert any("again to end at once" in line for line in iter(process.stderr.readline, ""))
    time.sleep(0.5)  # into the program that never ends
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "" and process.returncode == -signal.SIGINT


HOST = """
import sys, time, jax
port, number = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", 2, int(number))
from gemma_cot.session import Session
step = 0
with Session().listening() as session:
    while session.turn("grpo", step, 10**6, 0.0):
        step += 1
        time.sleep(0.02 if number == "0" else 0.03)
        if step == 5:
            print("running", flush=True)
print(step, session.asked, flush=True)
"""


def test_a_notice_to_one_host_stops_all_after_the_same_step():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOST, port, number], stdout=subprocess.PIPE, text=True,
            env=environment | {"JAX_PLATFORMS": "cpu"},
        )
        for number in "01"
    ]  # fmt: skip
    try:
        for host in hosts:  # past what gloo says
            assert "running\n" in iter(host.stdout.readline, "")
        hosts[1].send_signal(signal.SIGTERM)  # as a scheduler announces that it takes the machine
        lines = [host.communicate(timeout=120)[0].splitlines()[-1] for host in hosts]
    finally:
        for host in hosts:
            host.kill()
            host.wait()
    step, _, why = lines[0].partition(" ")
    assert lines[0] == lines[1] and int(step) >= 5 and why == "a preemption notice"
