"""One step of arithmetic, verified by computation, written in either of two ways.

In the head:  "34 * 27 = 918"
Worked out:   "34*20=680, 34*7=238, 680+238=918, 34 * 27 = 918"

Both end in the same equation, which is the step's checkpoint. A small model is often wrong in the
head and mostly right when it works the step out: that is what GRPO has to find.
"""

import operator
from dataclasses import dataclass

_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Step:
    """`label`: what is computed, in a word or two; a (op) b, all integers."""

    label: str
    a: int
    op: str  # one of + - *
    b: int

    @property
    def result(self) -> int:
        """The value of a (op) b."""
        return _OPERATORS[self.op](self.a, self.b)

    @property
    def equation(self) -> str:
        """The step's checkpoint, e.g. "34 * 27 = 918"."""
        return f"{self.a} {self.op} {self.b} = {self.result}"


def worked_out(step: Step) -> str:
    """Return the step's sub-equations before its equation; additions are always in the head."""
    if step.op != "*" or min(step.a, step.b) < 2 or max(step.a, step.b) < 11:
        return step.equation
    a, b = step.a, step.b
    if b >= 10:
        tens, ones = b // 10 * 10, b % 10
        parts = [f"{a}*{tens}={a * tens}"]
        left, right = a * tens, a * ones
        if ones:
            parts.append(f"{a}*{ones}={right}")
    else:
        tens, ones = a // 10 * 10, a % 10
        left, right = tens * b, ones * b
        parts = [f"{tens}*{b}={left}"]
        if ones:
            parts.append(f"{ones}*{b}={right}")
    if ones:
        parts.append(f"{left}+{right}={left + right}")
    return ", ".join([*parts, step.equation])


def spell(step: Step, work_out: bool) -> str:
    """Return "Label: equation." with or without its sub-equations."""
    return f"{step.label}: {worked_out(step) if work_out else step.equation}."
