"""Published rows become rows that earn full marks; each format by a row written in it."""

import json

import pytest

from gemma_cot.grpo.reward import format_reward, outcome_reward, process_reward
from gemma_cot.prepare.convert import (
    DATASETS,
    Rejected,
    question_of,
    read_rows,
    spell,
    split_key,
    write_equations,
)


def convert(dataset: str, row: dict) -> list[dict]:
    return list(DATASETS[dataset](row, "here"))


def assert_full_marks(row: dict) -> None:
    """Assert that a row earns format, outcome and every checkpoint with its own completion."""
    columns = {"metadata": [row["metadata"]], "domain": [row["domain"]]}
    assert format_reward([""], [row["chosen"]], **columns) == [1.0]
    assert outcome_reward([""], [row["chosen"]], **columns) == [1.0]
    count = len(row["metadata"]["checkpoints"])
    wanted = [min(count, 5) / 5 if count else None]
    for matcher in ("literal", "normalised"):
        assert process_reward([""], [row["chosen"]], matcher=matcher, **columns) == wanted


@pytest.mark.parametrize(
    ("mark", "text", "checkpoint"),
    [
        ("He has 48/2 = <<48/2=24>>24 clips.", "He has 48 / 2 = 24 clips.", "48 / 2 = 24"),
        ("It is 2 x 3 = $<<2*3=6>>6.00 now.", "It is 2 * 3 = 6 now.", "2 * 3 = 6"),
        ("It is 20 x $.50 = $<<20*.50=10>>10.00.", "It is 20 * 0.50 = 10.", "20 * 0.50 = 10"),
        ("It is $<<1000*2=2000>>2,000 a year.", "It is 1000 * 2 = 2000 a year.", "1000 * 2 = 2000"),
        ("Half is <<5+-2=3>>3", "Half is 5 + -2 = 3", "5 + -2 = 3"),
    ],
)
def test_a_calculator_mark_becomes_an_equation_in_the_prose(mark, text, checkpoint):
    assert write_equations(mark) == (text, [checkpoint])


def test_prose_that_spells_the_step_otherwise_keeps_its_words():
    text, checkpoints = write_equations("Twice that many is 7 and 7 = <<7*2=14>>14 eggs.")
    assert checkpoints == ["7 * 2 = 14"]
    assert "7 * 2 = 14 eggs." in text and text.startswith("Twice that many is 7 and 7")


def test_spell_puts_single_spaces_and_refuses_what_is_no_arithmetic():
    assert spell("(5+.5)*-2") == "(5 + 0.5) * -2"
    with pytest.raises(Rejected, match="must be arithmetic"):
        spell("x+1")


def test_gsm8k_takes_its_answer_from_the_hashes():
    answer = "A is 500*2 = <<500*2=1000>>1000.\nB is <<1000/4=250>>250 of it.\n#### 1,250"
    (row,) = convert("gsm8k", {"question": "How many?", "answer": answer})
    assert row["metadata"] == {
        "checkpoints": ["500 * 2 = 1000", "1000 / 4 = 250"],
        "final_answer": "1250",  # not the last mark
    }
    assert_full_marks(row)
    with pytest.raises(Rejected, match="must end in #### number"):
        convert("gsm8k", {"question": "How many?", "answer": "five"})


def test_svamp_derives_its_steps_from_the_equation():
    row = {"ID": "chal-1", "Body": "Ann has 8 packs of 3 pens", "Question": "How many after 4 go?",
           "Equation": "( ( 8.0 * 3.0 ) - 4.0 )", "Answer": 20.0}  # fmt: skip
    (ours,) = convert("svamp", row)
    assert ours["prompt"] == "Ann has 8 packs of 3 pens. How many after 4 go?"
    assert ours["metadata"] == {"checkpoints": ["8 * 3 = 24", "24 - 4 = 20"], "final_answer": "20"}
    assert_full_marks(ours)
    with pytest.raises(Rejected, match="Equation gives 20, Answer is 1"):
        convert("svamp", row | {"Answer": 1.0})


def test_svamp_keeps_every_digit_and_refuses_what_is_no_number():
    row = {"Body": "Many.", "Question": "How many?",
           "Equation": "9007199254740993 - 10000000000000000"}  # fmt: skip
    (ours,) = convert("svamp", row | {"Answer": -992800745259007})
    assert ours["metadata"]["final_answer"] == "-992800745259007"
    assert ours["metadata"]["checkpoints"] == [
        "9007199254740993 - 10000000000000000 = -992800745259007"
    ]
    with pytest.raises(Rejected, match="Answer a number"):
        convert("svamp", row | {"Answer": float("nan")})


def test_mbpp_asks_for_every_assertion_and_runs_nothing():
    row = {
        "task_id": "MBPP/7",
        "entry_point": "twice",
        "prompt": 'def twice(n):\n\t"""\n\tDouble.\n\t>>> twice(4)\n\t8\n\t"""\n',
        "canonical_solution": "\traise SystemExit('this was run')\n\treturn [n, 2 * n]",
        "test": "def check(candidate):\n    assert candidate(4) == [4, 8]\n"
        "    assert candidate('a') == {'b': (1, True)}\n",
    }
    first, second = convert("mbpp", row)
    assert first["prompt"].endswith("What does `twice(4)` return?")
    assert ">>>" not in first["prompt"]  # the docstring holds the answers
    golds = [ours["metadata"]["final_answer"] for ours in (first, second)]
    assert golds == ["[4, 8]", "{'b': (1, True)}"]
    assert split_key(first["prompt"]) == split_key(second["prompt"])
    row["test"] = row["test"].replace("candidate(4) ==", "candidate(4) !=")
    rows = DATASETS["mbpp"](row, "here")  # the other assertion comes all the same
    assert next(rows)["metadata"]["final_answer"] == golds[1]
    with pytest.raises(Rejected, match="assertion 1: not one =="):
        next(rows)
    assert_full_marks(first)
    assert_full_marks(second)
    with pytest.raises(Rejected, match="assertion 1"):
        convert("mbpp", row | {"test": "assert candidate(4) == len('a')"})


LAYOUTS = [
    ("arc", {"instruction": "Please choose the correct answer to the question: What melts?\n\n"
             "Answer1: ice\n\nAnswer2: iron ore\n\nAnswer format: answer1/answer2",
             "answer": "answer1"}),
    ("arc", {"query": "Question: What melts?", "choices": ["ice", "iron ore"], "gold": 0}),
    ("aristo_mini", {"id": "7", "answerKey": "A", "question": {"stem": "What melts?", "choices": [
        {"text": "ice", "label": "A"}, {"text": "iron ore", "label": "B"}]}}),
]  # fmt: skip


@pytest.mark.parametrize(("dataset", "row"), LAYOUTS)
def test_choice_questions_in_each_published_layout(dataset, row):
    (ours,) = convert(dataset, row)
    assert ours["prompt"] == "What melts?\nA) ice\nB) iron ore"
    assert ours["metadata"] == {"checkpoints": [], "final_answer": "A) ice"}
    assert question_of(ours["prompt"]) == "What melts?"
    assert_full_marks(ours)


def test_a_choice_question_without_a_clear_gold_is_refused():
    row = LAYOUTS[1][1]
    for gold in (2, -1, None, "A", True):
        with pytest.raises(Rejected, match="gold must name one of the options"):
            convert("arc", row | {"gold": gold})
    with pytest.raises(Rejected, match="two options read 'ice'"):
        convert("arc", row | {"choices": ["ice", "ice"]})


def test_rows_are_read_from_lines_and_from_an_array_with_their_line_numbers(tmp_path):
    rows = [{"a": 1}, {"a": "é\n]"}]
    path = tmp_path / "rows"
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    assert [(n, json.loads(text)) for n, text in read_rows(path)] == [(2, rows[0]), (5, rows[1])]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    assert [(n, json.loads(text)) for n, text in read_rows(path)] == [(1, rows[0]), (3, rows[1])]
    for text in ('[{"a": 1}', '[{"a": 1}]\n{"a": 2}\n'):
        path.write_text(text)
        with pytest.raises(ValueError, match="must be one JSON array"):
            list(read_rows(path))
