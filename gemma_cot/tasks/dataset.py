"""Rows of the contract's schema, and the plain text that the tiny model is pretrained on.

A row's `chosen` is tagged; a pretraining solution is not: its lines start with "reasoning:"
and "answer:". Every checkpoint of a row is an equation that stands in its reasoning.
"""

import random
from collections.abc import Iterator

from gemma_cot.tasks.arithmetic import Step, spell, worked_out
from gemma_cot.tasks.families import Problem, draw_problem

WORKED_OUT_IN_ROWS = 0.25  # share of a row's steps that are worked out; the rest is in the head
WORKED_OUT_IN_PRETRAINING = 0.9
DRILL_SHARE = 0.3


def solve(problem: Problem, rng: random.Random, worked_out_share: float) -> str:
    """Return the reasoning text of a problem; one draw decides for all its steps."""
    work_out = rng.random() < worked_out_share
    return " ".join(spell(step, work_out) for step in problem.steps)


def make_row(problem: Problem, rng: random.Random) -> dict:
    """Return a dataset row: tagged solution, checkpoints and final answer."""
    reasoning = solve(problem, rng, WORKED_OUT_IN_ROWS)
    return {
        "domain": problem.domain,
        "prompt": problem.question,
        "chosen": f"<reasoning>{reasoning}</reasoning><answer>{problem.answer}</answer>",
        "metadata": {
            "checkpoints": [step.equation for step in problem.steps],
            "final_answer": problem.answer,
        },
    }


def unique_rows(seed: int, count: int, taken: set[str]) -> list[dict]:
    """Draw `count` rows whose questions are not in `taken`, and add them to it."""
    rng = random.Random(seed)
    rows = []
    while len(rows) < count:
        problem = draw_problem(rng)
        if problem.question not in taken:
            taken.add(problem.question)
            rows.append(make_row(problem, rng))
    return rows


def drill(rng: random.Random) -> tuple[str, str]:
    """Return a bare calculation and its solution, the sub-steps of working out among them."""
    kind = rng.random()
    if kind < 0.2:
        step = Step("Result", rng.randint(11, 99), "*", rng.randint(2, 9))
    elif kind < 0.4:
        step = Step("Result", rng.randint(11, 99), "*", rng.randint(11, 49))
    elif kind < 0.7:
        step = Step("Result", rng.randint(11, 1999), "+", rng.randint(11, 999))
    else:
        a = rng.randint(100, 2900)
        step = Step("Result", a, "-", rng.randint(11, min(a - 1, 999)))
    work_out = step.op == "*" and rng.random() < WORKED_OUT_IN_PRETRAINING
    text = worked_out(step) if work_out else step.equation
    return (
        f"{step.a} {step.op} {step.b}",
        f"reasoning: {step.label}: {text}.\nanswer: {step.result}",
    )


def pretraining_pairs(seed: int, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Yield endless (question, plain worked solution) pairs, none of whose questions is `taken`."""
    rng = random.Random(seed)
    while True:
        if rng.random() < DRILL_SHARE:
            yield drill(rng)
            continue
        problem = draw_problem(rng)
        if problem.question not in taken:
            reasoning = solve(problem, rng, WORKED_OUT_IN_PRETRAINING)
            yield problem.question, f"reasoning: {reasoning}\nanswer: {problem.answer}"
