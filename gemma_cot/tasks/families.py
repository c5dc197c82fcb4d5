"""The task families: each draws numbers and words, and returns a question with its verified steps.

math: several arithmetic steps in a story. code: what does this snippet print. science: a formula
and units. Knows no tokenizer and no file.
"""

import random
from dataclasses import dataclass

from gemma_cot.tasks.arithmetic import Step


@dataclass(frozen=True)
class Problem:
    """A question, the steps that solve it in order, and the answer they give."""

    domain: str
    question: str
    steps: tuple[Step, ...]
    answer: str


NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Ida", "Jon", "Kim", "Leo", "Mia")
ITEMS = ("pens", "eggs", "coins", "cards", "books", "shells", "stamps", "apples", "nails", "seeds")
BOXES = ("boxes", "bags", "trays", "packs", "rows", "sets")


def factors(rng: random.Random) -> tuple[int, int]:
    """Draw two factors of two digits (now and then one digit) with a product of at most 2,000."""
    while True:
        a = rng.randint(12, 99)
        b = rng.randint(2, 9) if rng.random() < 0.15 else rng.randint(11, 49)
        if a * b <= 2000:
            return a, b


def some_of(rng: random.Random, total: int) -> int:
    """Draw a number of at least 11 to take away from `total` (or anything below a small total)."""
    return rng.randint(min(11, total - 1), max(min(total - 1, 900), 1))


def sell_some(rng: random.Random) -> Problem:
    a, b = factors(rng)
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    c = some_of(rng, a * b)
    verb = rng.choice(("sells", "gives away", "loses", "uses"))
    question = (
        f"{name} has {b} {box} of {a} {item} and {verb} {c} {item}. How many {item} are left?"
    )
    steps = (Step("All", a, "*", b), Step("Left", a * b, "-", c))
    return Problem("math", question, steps, str(a * b - c))


def add_more(rng: random.Random) -> Problem:
    a, b = factors(rng)
    name, item, box = rng.choice(NAMES), rng.choice(ITEMS), rng.choice(BOXES)
    c = rng.randint(11, 900)
    verb = rng.choice(("finds", "buys", "gets", "makes"))
    question = (
        f"{name} has {b} {box} of {a} {item} and {verb} {c} more. How many {item} is that in all?"
    )
    steps = (Step("First", a, "*", b), Step("All", a * b, "+", c))
    return Problem("math", question, steps, str(a * b + c))


def save_money(rng: random.Random) -> Problem:
    a, b = factors(rng)
    name = rng.choice(NAMES)
    c = some_of(rng, a * b)
    thing = rng.choice(("a bike", "a coat", "a phone", "a tent", "a lamp"))
    unit = rng.choice(("day", "week", "month"))
    question = (
        f"{name} saves {a} dollars a {unit} for {b} {unit}s and then buys {thing} for {c} dollars. "
        "How many dollars are left?"
    )
    steps = (Step("Saved", a, "*", b), Step("Left", a * b, "-", c))
    return Problem("math", question, steps, str(a * b - c))


def two_kinds(rng: random.Random) -> Problem:
    a, b = factors(rng)
    c, d = rng.randint(12, 99), rng.randint(2, 9)
    name = rng.choice(NAMES)
    one, two = rng.sample(ITEMS, 2)
    question = (
        f"{name} buys {b} {one} for {a} cents each and {d} {two} for {c} cents each. "
        "What is the cost in cents?"
    )
    steps = (Step("First", a, "*", b), Step("Second", c, "*", d), Step("All", a * b, "+", c * d))
    return Problem("math", question, steps, str(a * b + c * d))


def print_expression(rng: random.Random) -> Problem:
    a, b = factors(rng)
    x, y = rng.sample("abcmnpxyz", 2)
    if rng.random() < 0.5:
        c, op = some_of(rng, a * b), "-"
    else:
        c, op = rng.randint(11, 900), "+"
    question = f"What does this print?\n{x} = {a}\n{y} = {b}\nprint({x} * {y} {op} {c})"
    steps = (Step("Product", a, "*", b), Step("Result", a * b, op, c))
    return Problem("code", question, steps, str(steps[-1].result))


def print_loop(rng: random.Random) -> Problem:
    start, each, times = rng.randint(11, 99), rng.randint(11, 99), rng.randint(2, 3)
    t, i = rng.sample("ikntsx", 2)
    question = (
        f"What does this print?\n{t} = {start}\nfor {i} in range({times}):\n    {t} += {each}\n"
        f"print({t})"
    )
    steps, total = [], start
    for turn in range(times):
        steps.append(Step(f"Turn {turn + 1}", total, "+", each))
        total += each
    return Problem("code", question, tuple(steps), str(total))


def print_comparison(rng: random.Random) -> Problem:
    a, b = factors(rng)
    sign = rng.choice("<>")
    bound = max(10, a * b + rng.choice((-1, 1)) * rng.randint(1, 200))
    if bound == a * b:
        bound += 1
    x, y = rng.sample("abcmnpxyz", 2)
    question = f"What does this print?\n{x} = {a}\n{y} = {b}\nprint({x} * {y}{sign}{bound})"
    answer = a * b < bound if sign == "<" else a * b > bound
    return Problem("code", question, (Step("Product", a, "*", b),), str(answer))


def distance(rng: random.Random) -> Problem:
    a, b = factors(rng)
    c = rng.randint(11, 900)
    vehicle = rng.choice(("train", "car", "boat", "plane", "bus"))
    question = (
        f"A {vehicle} moves at {a} km/h for {b} hours and then another {c} km. "
        "How far is that in all?"
    )
    steps = (Step("Distance = speed * time", a, "*", b), Step("All", a * b, "+", c))
    return Problem("science", question, steps, f"{a * b + c} km")


def net_force(rng: random.Random) -> Problem:
    a, b = factors(rng)
    c = some_of(rng, a * b)
    thing = rng.choice(("cart", "sled", "rocket", "crate", "stone"))
    question = (
        f"A motor pushes a {thing} of {a} kg at {b} m/s per second, and friction takes {c} N of "
        "that push. What push is left?"
    )
    steps = (Step("Force = mass * acceleration", a, "*", b), Step("Left", a * b, "-", c))
    return Problem("science", question, steps, f"{a * b - c} N")


def energy(rng: random.Random) -> Problem:
    a, b = factors(rng)
    c = rng.randint(11, 900)
    thing = rng.choice(("lamp", "motor", "heater", "pump", "fan"))
    question = (
        f"A {thing} of {a} watts runs for {b} seconds and starts with {c} joules. "
        "What energy does it use in all?"
    )
    steps = (Step("Energy = power * time", a, "*", b), Step("All", a * b, "+", c))
    return Problem("science", question, steps, f"{a * b + c} J")


def metres(rng: random.Random) -> Problem:
    a, c = rng.randint(2, 9), rng.randint(11, 900)
    b = rng.randint(11, 900)
    question = f"A path is {a} km and {b} m long. A wall takes {c} m of it. What length is free?"
    steps = (
        Step("Metres", a, "*", 1000),
        Step("Path", a * 1000, "+", b),
        Step("Free", a * 1000 + b, "-", c),
    )
    return Problem("science", question, steps, f"{steps[-1].result} m")


FAMILIES = {
    "math": (sell_some, add_more, save_money, two_kinds),
    "code": (print_expression, print_expression, print_loop, print_comparison),
    "science": (distance, net_force, energy, metres),
}


def draw_problem(rng: random.Random) -> Problem:
    """Draw a domain, a family of it, and a problem of that family."""
    return rng.choice(FAMILIES[rng.choice(tuple(FAMILIES))])(rng)
