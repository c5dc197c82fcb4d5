"""Math-Verify, in its killable process, on formulas that the matcher cannot tell."""

import pytest

from gemma_cot.guard.symbolic import answers_match_symbolic

pytestmark = pytest.mark.interop


@pytest.mark.parametrize(("gold", "predicted", "verdict"), [
    ("x^2+1", "1+x^2", True), (r"\sqrt{8}", r"2\sqrt{2}", True), ("x^2-1", "(x-1)(x+1)", True),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}", True), (r"\{1,2\}", r"\{2,1\}", True),
    (r"\left(3, 4\right)", "(3,4)", True), ("y = 2x+3", "y = 3+2x", True),
    ("x^2+1", "x^2+2", False), ("(1,2)", "(2,1)", False), ("2x+3", "3x+2", False),
    (r"(x+1)^{100000}", r"(x+2)^{100000}", False),  # killed
])  # fmt: skip
def test_math_verify_decides_on_formulas(gold, predicted, verdict):
    pytest.importorskip("math_verify")
    assert answers_match_symbolic(gold, predicted) is verdict
