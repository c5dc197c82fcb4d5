"""When Math-Verify is asked at all, and that a silent process is killed."""

import sys
import time
from importlib.util import find_spec

import pytest

from gemma_cot.guard import symbolic
from gemma_cot.guard.symbolic import answers_match_symbolic, same_expression


@pytest.fixture
def asked(monkeypatch) -> list:
    """What Math-Verify would be asked; the answer is always yes."""
    questions = []
    monkeypatch.setattr(symbolic, "_ask", lambda *sides: questions.append(sides) or True)
    return questions


@pytest.mark.parametrize(("gold", "predicted"), [
    ("x^2 + 1", "1 + x^2"), (r"\sqrt{8}", r"2\sqrt{2}"), ("$2x+3$", r"\boxed{3+2x}"),
    (r"(1, \frac{1}{2})", "(1, 0.5)"), (r"\left(3, 4\right)", "(3,4)"), ("x < 5", "x<10/2"),
    (r"\{1, 2\}", r"\{2, 1\}"), (r"\frac{x}{2}", "x/2"), ("y = 2x", "y = x + x"),
])  # fmt: skip
def test_it_is_asked_about_two_formulas_of_one_shape(asked, gold, predicted):
    assert answers_match_symbolic(gold, predicted)
    assert len(asked) == 1


@pytest.mark.parametrize(("gold", "predicted"), [
    ("5", "2 + 3"), ("5", r"\sqrt{25}"), ("1/2", r"\frac{\sqrt{1}}{2}"),  # a number is no question
    (r"\frac{\sqrt{2}}{2}", "0.70710678"), ("x^2", "x^2 or x^3"), ("x^2", "x^2, x^3"),
    ("x^2", "the answer is x^2"), ("x^2", r"x^2 \text{ or } x^3"), ("x < 5", "x > 5"),
    ("x < 5", r"x \le 5"), ("(1, 2)", "[1, 2]"), ("(1, 2)", r"\{1, 2\}"), ("(1, 2)", "1, 2"),
    ("x^2", ""), ("x^2", "x\n+x"), ("x^2", "x" + "+x" * 200), ("east", "west"), ("x^2", "x^2;x"),
    ("x + y", "x ± y"),
])  # fmt: skip
def test_it_is_not_asked_about_numbers_prose_or_another_shape(asked, gold, predicted):
    assert not answers_match_symbolic(gold, predicted)
    assert asked == []


def test_it_is_asked_in_mathematics_only(asked):
    assert not answers_match_symbolic("x + y", "y + x", "code")
    assert not answers_match_symbolic("x + y", "y + x", "science")
    assert not answers_match_symbolic(5, "2 + 3")
    assert answers_match_symbolic(5, "5.0") and asked == []


@pytest.fixture
def served_by(monkeypatch):
    """Start another program in the place of Math-Verify's process."""
    real = symbolic.subprocess.Popen
    symbolic._ask.cache_clear()

    def serve(code: str) -> None:
        symbolic._stop()
        monkeypatch.setattr(symbolic.subprocess, "Popen",
                            lambda _, **rest: real([sys.executable, "-c", code], **rest))

    yield serve
    symbolic._stop()
    symbolic._ask.cache_clear()


def test_a_silent_process_is_killed_and_the_next_question_gets_a_new_one(served_by, monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS_A_QUESTION", 0.3)
    served_by("print('ready', flush=True)\nfor line in iter(input, ''):\n"
              "    import time; time.sleep(60 * ('z' in line)); print('yes', flush=True)")
    assert same_expression("x + y", "y + x")
    process = symbolic._worker[0]
    began = time.perf_counter()
    assert not same_expression("x + z", "z + x")
    assert time.perf_counter() - began < 10  # 0.3 s, and time to end a process on a busy machine
    assert process.poll() is not None and symbolic._worker == []
    assert same_expression("x + w", "w + x")


def test_a_process_that_dies_answers_no(served_by):
    served_by("print('ready', flush=True); input()")
    assert not same_expression("x + y", "y + x")
    assert symbolic._worker == []


def test_a_process_that_cannot_start_is_one_clear_line(served_by):
    served_by("raise ImportError('math_verify')")
    with pytest.raises(ValueError, match="^--math_verify: Math-Verify must load, got no answer"):
        same_expression("x + y", "y + x")


@pytest.mark.skipif(find_spec("math_verify") is not None, reason="it is installed")
def test_without_the_extra_it_is_refused_in_one_line():
    with pytest.raises(ValueError, match=r"the extra `math` must be installed.*gemma_cot\[math\]"):
        symbolic.require()
