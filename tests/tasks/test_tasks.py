"""The synthetic tasks are true: every equation, every printed answer, every row, by other means.

Equations are read from the text and computed by Python's integers; code questions are run.
"""

import contextlib
import io
import itertools
import json
import random
import re

import pytest

from gemma_cot.config import embedded
from gemma_cot.data import parse_row, read_jsonl
from gemma_cot.grpo.reward import TAGS, format_reward, outcome_reward, process_reward
from gemma_cot.tasks.arithmetic import Step, spell, worked_out
from gemma_cot.tasks.dataset import drill, make_row, pretraining_pairs, unique_rows
from gemma_cot.tasks.families import FAMILIES, draw_problem
from gemma_cot.tasks.pretrain import EVAL_ROWS, TRAIN_ROWS, tokenizer_config, write_datasets
from gemma_cot.tokenizer import load_tokenizer

DRAWS = 1000
ALL_FAMILIES = sorted({f for family in FAMILIES.values() for f in family}, key=lambda f: f.__name__)
EQUATION = re.compile(r"(\d+) ?([*+-]) ?(\d+) ?= ?(\d+)")


def equations(text: str) -> list[tuple[int, str, int, int]]:
    """Return (a, operator, b, claimed result) of every equation that is written in `text`."""
    return [(int(a), op, int(b), int(c)) for a, op, b, c in EQUATION.findall(text)]


def is_true(a: int, op: str, b: int, claimed: int) -> bool:
    """Return whether a (op) b is what is claimed; a product as repeated addition."""
    return {"*": sum([a] * b), "+": a + b, "-": a - b}[op] == claimed


def draws(family):
    """Return 1,000 problems of a family."""
    rng = random.Random(7)
    return [family(rng) for _ in range(DRAWS)]


# ---- arithmetic ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "text"),
    [
        (Step("All", 34, "*", 27), "34*20=680, 34*7=238, 680+238=918, 34 * 27 = 918"),
        (Step("All", 34, "*", 20), "34*20=680, 34 * 20 = 680"),
        (Step("All", 34, "*", 6), "30*6=180, 4*6=24, 180+24=204, 34 * 6 = 204"),
        (Step("All", 30, "*", 6), "30*6=180, 30 * 6 = 180"),
        (Step("All", 9, "*", 8), "9 * 8 = 72"),  # in the head
        (Step("All", 34, "+", 27), "34 + 27 = 61"),
        (Step("All", 34, "-", 27), "34 - 27 = 7"),
    ],
)
def test_a_step_worked_out(step, text):
    assert worked_out(step) == text
    assert spell(step, True) == f"All: {text}." and spell(step, False) == f"All: {step.equation}."


def test_working_out_is_true_and_ends_in_the_equation():
    """Every product of 2..120 by 2..60: sub-equations are true and lead to the result."""
    for a, b in itertools.product(range(2, 121), range(2, 61)):
        step = Step("x", a, "*", b)
        text = worked_out(step)
        found = equations(text)
        assert all(itertools.starmap(is_true, found)), text
        assert found[-1] == (a, "*", b, a * b) and text.endswith(step.equation)
        if max(a, b) >= 11:
            assert found[-2][3] == a * b, text  # what comes before already gives the result


# ---- families -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.__name__)
def test_steps_are_true_and_lead_to_the_answer(family):
    for problem in draws(family):
        assert problem.domain in FAMILIES and problem.steps
        for step in problem.steps:
            ((a, op, b, claimed),) = equations(step.equation)
            assert (a, op, b, claimed) == (step.a, step.op, step.b, step.result)
            assert is_true(a, op, b, claimed) and claimed > 0
        if problem.answer not in ("True", "False"):
            number, *unit = problem.answer.split()
            assert int(number) == problem.steps[-1].result
            assert len(unit) == (problem.domain == "science")
        # numbers that a step starts from are in the question or came out of an earlier step
        known = {int(n) for n in re.findall(r"\d+", problem.question)} | {1000}  # metres in a km
        for step in problem.steps:
            assert {step.a, step.b} <= known, problem
            known.add(step.result)


@pytest.mark.parametrize("family", sorted(set(FAMILIES["code"]), key=lambda f: f.__name__))
def test_code_prints_the_answer(family):
    answers = set()
    for problem in draws(family):
        first, _, snippet = problem.question.partition("\n")
        assert first == "What does this print?"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(snippet, {"__builtins__": {"print": print, "range": range}})
        assert printed.getvalue() == problem.answer + "\n", snippet
        answers.add(problem.answer)
    assert len(answers) > 1


@pytest.mark.parametrize("family", ALL_FAMILIES, ids=lambda family: family.__name__)
def test_rows_score_full_marks(family):
    rng = random.Random(3)
    rows = [make_row(problem, rng) for problem in draws(family)]
    prompts, texts = [row["prompt"] for row in rows], [row["chosen"] for row in rows]
    columns = {key: [row[key] for row in rows] for key in ("domain", "metadata")}
    assert set(format_reward(prompts, texts, **columns)) == {1.0}
    assert set(outcome_reward(prompts, texts, **columns)) == {1.0}
    full = [len(set(m["checkpoints"])) / 5 for m in columns["metadata"]]  # 0.2 a checkpoint
    for matcher in ("literal", "normalised"):
        assert process_reward(prompts, texts, matcher=matcher, **columns) == full
    for text, metadata in zip(texts, columns["metadata"], strict=True):
        reasoning = text.removeprefix(TAGS[0]).partition(TAGS[1])[0]
        assert all(checkpoint in reasoning for checkpoint in metadata["checkpoints"])
        assert all(itertools.starmap(is_true, equations(reasoning))), reasoning
    # the questions themselves give nothing away: a copy of the prompt earns no step
    echo = [f"<reasoning>{prompt}</reasoning><answer>?</answer>" for prompt in prompts]
    assert set(process_reward(prompts, echo, **columns)) == {0.0}
    assert set(outcome_reward(prompts, echo, **columns)) == {0.0}


def test_every_domain_and_family_is_drawn():
    rng = random.Random(0)
    counts = {domain: 0 for domain in FAMILIES}
    for _ in range(3000):
        counts[draw_problem(rng).domain] += 1
    # 1,000 expected, standard deviation sqrt(3000 * 1/3 * 2/3) = 26: five of them
    assert all(abs(count - 1000) < 130 for count in counts.values()), counts


# ---- datasets -----------------------------------------------------------------------------------


def test_unique_rows_never_repeat_and_stay_apart():
    taken: set[str] = set()
    first = unique_rows(1, 1500, taken)
    second = unique_rows(1, 1500, taken)  # the same seed: only `taken` keeps them apart
    questions = [row["prompt"] for row in first + second]
    assert len(questions) == len(set(questions)) == 3000 and taken == set(questions)
    assert unique_rows(1, 1500, set()) == first  # a function of the seed


def test_written_datasets_are_the_embedded_ones(tmp_path):
    """data/README.md promises them from seed 0; no question is in both, and all rows are good."""
    taken = write_datasets(tmp_path, seed=0)
    questions = {}
    for name, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        made, shipped = tmp_path / f"{name}.jsonl", embedded(f"{name}.jsonl")
        examples, rejects = read_jsonl(shipped)
        assert len(examples) == count and not rejects
        with open(shipped, "rb") as file:
            assert made.read_bytes() == file.read()
        questions[name] = {example.prompt for example in examples}
        assert len(questions[name]) == count
    assert questions["train"].isdisjoint(questions["eval"])
    assert taken == questions["train"] | questions["eval"]


def test_rows_keep_the_contract():
    rng = random.Random(5)
    for number in range(300):
        row = make_row(draw_problem(rng), rng)
        assert set(row) == {"domain", "prompt", "chosen", "metadata"}
        example = parse_row(json.dumps(row), number)
        assert example.extra == {} and example.metadata == row["metadata"]


# ---- pretraining text ---------------------------------------------------------------------------


def test_pretraining_leaves_taken_questions_out():
    free = [question for question, _ in itertools.islice(pretraining_pairs(4, set()), 2000)]
    stories = [question for question in free if " " in question.strip("0123456789*+- ")]
    taken = set(stories[::2])
    assert len(taken) > 500
    kept = [question for question, _ in itertools.islice(pretraining_pairs(4, taken), 2000)]
    assert taken.isdisjoint(kept)


def test_pretraining_text_has_no_tags_and_is_true():
    for question, solution in itertools.islice(pretraining_pairs(6, set()), 2000):
        assert not [tag for tag in TAGS if tag in question + solution]
        assert "<" not in solution and ">" not in solution
        first, second = solution.split("\n")
        assert first.startswith("reasoning: ") and second.startswith("answer: ")
        assert equations(first) and all(itertools.starmap(is_true, equations(first)))


def test_drills_are_bare_calculations():
    rng = random.Random(8)
    kinds = set()
    for _ in range(1000):
        question, solution = drill(rng)
        a, op, b = question.split()
        assert is_true(int(a), op, int(b), int(solution.rpartition("answer: ")[2]))
        assert f"{question} = " in solution
        kinds.add(op)
    assert kinds == {"*", "+", "-"}


def test_the_embedded_tokenizer_config_is_what_the_script_writes():
    with open(f"{embedded('tiny_model')}/tokenizer_config.json", encoding="utf-8") as file:
        assert json.load(file) == tokenizer_config()
    pieces = load_tokenizer(embedded("tiny_model")).processor.id_to_piece
    for i, token in tokenizer_config()["added_tokens_decoder"].items():
        assert pieces(int(i)) == token["content"]
