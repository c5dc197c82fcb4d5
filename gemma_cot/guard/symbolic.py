"""Are two formulas the same expression? Math-Verify (extra `math`) in a process that can be killed.

The last resort of the answer matcher (rule 10), by --math_verify: asked only where both sides are
formulas of the same shape with one candidate each, never where the gold answer is a number, since
an expression still to be evaluated is wrong. A question that takes too long is answered no, and its
process is killed. `python -m gemma_cot.guard.symbolic` is that process.
"""

import atexit
import json
import re
import selectors
import subprocess
import sys
import threading
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec

from gemma_cot.grpo.answer import answers_match, parse_quantity, strip_marks

SECONDS_A_QUESTION, SECONDS_TO_START = 2.0, 60.0
MEMORY_MIB = 2048
MAX_FORMULA = 200  # characters
_FUNCTIONS = set("sqrt sin cos tan sec csc cot arcsin arccos arctan sinh cosh tanh log ln".split())
_WORD = re.compile(r"(?<![A-Za-z\\])[A-Za-z]{2,}")  # \frac and \pi are commands, `or` is a word
_MARK = re.compile(
    r"[,;=<>≤≥≠±]|\\(?:leq?|geq?|neq?|lt|gt|pm|cup|cap|in)(?![a-z])"
    r"|(?:\\left|\\right)?(?:\\[{}]|[()\[\]])"
)


def answers_match_symbolic(gold: str, predicted: str, domain: str = "math") -> bool:
    """Return `answers_match`, or in mathematics whether both are the same expression."""
    return answers_match(gold, predicted, domain) or (
        domain == "math" and isinstance(gold, str) and same_expression(gold, predicted)
    )


def same_expression(gold: str, predicted: str) -> bool:
    """Return whether two formulas of one shape are equal as expressions.

    Raises ValueError, one line, only where Math-Verify cannot be loaded.
    """
    gold, predicted = strip_marks(gold), strip_marks(predicted)
    if not (_is_formula(gold) and _is_formula(predicted)) or _shape(gold) != _shape(predicted):
        return False
    return _ask(gold, predicted)


def _is_formula(text: str) -> bool:
    """Return whether `text` is short, no number, no word and no prose."""
    if not text or len(text) > MAX_FORMULA or "\n" in text or parse_quantity(text) is not None:
        return False
    return all(word in _FUNCTIONS for word in _WORD.findall(text))


def _shape(text: str) -> list[str]:
    """Return what two spellings must share: commas, relations and signs, in order.

    Where there are commas the brackets too: they tell a set, an interval and a point apart.
    """
    marks = [mark.removeprefix("\\left").removeprefix("\\right") for mark in _MARK.findall(text)]
    brackets = set("([{}])") | {"\\{", "\\}"}
    return marks if "," in marks else [mark for mark in marks if mark not in brackets]


def require() -> None:
    """Raise ValueError, one line, unless Math-Verify is installed."""
    if find_spec("math_verify") is None:
        raise ValueError(
            "--math_verify: the extra `math` must be installed, got no module math_verify; "
            "pip install 'gemma_cot[math]', or leave the flag out"
        )


# ---- the process --------------------------------------------------------------------------------

_worker: list[subprocess.Popen] = []  # none or one
_lock = threading.Lock()


@lru_cache(maxsize=4096)
def _ask(gold: str, predicted: str) -> bool:
    """Ask the process; kill it and answer False when it is silent for too long."""
    with _lock:
        if not _worker:
            _start()
        answer = ""
        try:
            with suppress(BrokenPipeError):  # it died, out of memory
                _worker[0].stdin.write(json.dumps([gold, predicted]) + "\n")
                _worker[0].stdin.flush()
                answer = _read_line(_worker[0], SECONDS_A_QUESTION)
        finally:
            if not answer:
                _stop()
        return answer == "yes\n"


def _start() -> None:
    """Start the process and wait until it has loaded. Raises ValueError, one line."""
    _worker.append(subprocess.Popen(
        [sys.executable, "-m", "gemma_cot.guard.symbolic"], text=True, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ))  # fmt: skip
    atexit.register(_stop)
    if not _read_line(_worker[0], SECONDS_TO_START):
        _stop()
        raise ValueError("--math_verify: Math-Verify must load, got no answer from its process; "
                         "leave the flag out, or see what `import math_verify` says")  # fmt: skip


def _read_line(process: subprocess.Popen, seconds: float) -> str:
    """Return the next line of a process, "" when it ends or is silent for `seconds`."""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(seconds) else ""


def _stop() -> None:
    """Kill the process, if there is one."""
    while _worker:
        process = _worker.pop()
        process.kill()
        process.communicate()


def serve() -> None:
    """Answer questions, a JSON line each, with yes or no; Math-Verify's own time-outs are off."""
    import resource

    from math_verify import parse, verify

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_MIB << 20, MEMORY_MIB << 20))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        sides = [parse(f"${side}$", parsing_timeout=None) for side in json.loads(line)]
        is_same = all(sides) and verify(*sides, float_rounding=12, timeout_seconds=None)
        sys.stdout.write("yes\n" if is_same else "no\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve()
