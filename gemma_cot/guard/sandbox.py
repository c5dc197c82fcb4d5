"""Run model-written code against tests, shut in (guard/jail.py), and pay for what passes. Linux.

`code_reward` is a reward function; it runs nothing unless it is told that it may, which train does
for --allow_code_execution only. A row whose code escapes, hangs, crashes or floods scores 0.
"""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from gemma_cot.grpo.reward import completion_text, split_blocks

JAIL = Path(__file__).with_name("jail.py")
_FENCE = re.compile(r"\s*```[^\n]*\n(.*?)\n?[ \t]*```\s*", re.DOTALL)


@dataclass(frozen=True)
class Limits:
    """What a completion's code may use; each of its two processes on its own, but the clock."""

    wall_seconds: float = 8.0
    cpu_seconds: int = 4
    memory_mib: int = 512
    file_mib: int = 1


LIMITS = Limits()


def code_reward(
    prompts: list, completions: list, *, metadata=None, allow_code_execution: bool = False,
    limits: Limits = LIMITS, **columns,
) -> list[float | None]:
    """Return 1.0 where the code in the answer block passes every test of its row, else 0.0.

    `metadata["tests"]` is a list of assert statements that call the code's functions with plain
    values; None where there is none. Raises ValueError, one line, unless it is allowed to run code.
    """
    if not allow_code_execution:
        raise ValueError(
            "code_reward: model-written code runs only where it is allowed, got no permission; "
            "give train --allow_code_execution instead of --reward"
        )

    def one(row: int) -> float | None:
        tests = tests_of(metadata, row)
        if not tests:
            return None
        code = code_of(completion_text(completions[row]))
        return float(code is not None and run_tests(code, tests, limits)["passed"] == len(tests))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(one, range(len(completions))))


def tests_of(metadata: object, row: int) -> list[str]:
    """Return the tests of a row, [] where its metadata hold no list of strings."""
    cell = metadata[row] if isinstance(metadata, Sequence) and row < len(metadata) else None
    tests = cell.get("tests") if isinstance(cell, Mapping) else None
    is_list = isinstance(tests, list | tuple) and all(isinstance(test, str) for test in tests)
    return list(tests) if is_list else []


def code_of(completion: str) -> str | None:
    """Return the code in the answer block, out of its fence if it has one; None without a block."""
    answer = split_blocks(completion)[1]
    fenced = _FENCE.fullmatch(answer or "")
    return fenced[1] if fenced else answer


def run_tests(
    code: str, tests: list[str], limits: Limits = LIMITS, without: tuple[str, ...] = ()
) -> dict:
    """Return {"passed": number of tests passed, "why": what the first failure was, "missing": {}}.

    `missing` names every wall that this machine does not give, and why. without: walls to leave
    out ("namespaces", "seccomp"), as on such a machine. Never raises for what the code does.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        job = {"code": code, "tests": tests, "limits": asdict(limits), "without": without,
               "root": folder, "libraries": libraries()}  # fmt: skip
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(JAIL)], cwd=folder, env={}, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            out, _ = process.communicate(json.dumps(job).encode(), limits.wall_seconds)
        except BaseException as error:  # an interrupt too leaves no process behind
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            out = b'{"passed": 0, "why": "over the wall-clock limit", "missing": {}}'
    return json.loads(out or b'{"passed": 0, "why": "the tester was killed", "missing": {}}')


def libraries() -> list[str]:
    """Return the folders that Python needs inside: its own, and the system's shared libraries."""
    return [os.path.realpath(sys.base_prefix), "/usr/lib", "/usr/lib64", "/lib", "/lib64"]


def check() -> list[str]:
    """Run a line of code in the sandbox; return a line for every wall that this machine lacks.

    Raises ValueError, one line, where nothing can be run safely.
    """
    rule = "--allow_code_execution: model-written code must be shut in"
    if sys.platform != "linux":
        raise ValueError(f"{rule}, which takes Linux, got {sys.platform}; leave the flag out")
    code = "import dataclasses\ndef f(x):\n    return x + 1"  # that Python's library is there too
    outcome = run_tests(code, ["assert f(1) == 2"])
    if outcome["passed"] != 1:
        walls = "".join(f"; {wall}: {why}" for wall, why in outcome["missing"].items())
        raise ValueError(f"{rule}, got {outcome['why']}{walls}; leave the flag out")
    return [
        f"sandbox: no {wall} on this machine ({why}); the other walls stand"
        for wall, why in outcome["missing"].items()
    ]
