"""Every sentence of the format, process and outcome rewards, and the errors of user rewards."""

import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_cot.grpo.reward import (
    RewardError,
    checkpoint_hits,
    format_reward,
    has_format,
    load_reward,
    normalise,
    outcome_reward,
    process_reward,
    score,
    split_blocks,
)


def blocks(reasoning="think", answer="5"):
    return f"<reasoning>{reasoning}</reasoning><answer>{answer}</answer>"


def process(reasoning, checkpoints, **kwargs):
    return process_reward(
        ["p"], [blocks(reasoning)], metadata=[{"checkpoints": checkpoints}], **kwargs)[0]


def outcome(answer, gold, **columns):
    return outcome_reward(
        ["p"], [blocks(answer=answer)], metadata=[{"final_answer": gold}], **columns)[0]


# Format

GOOD = [
    blocks(), f"  {blocks()}\n", f"\u00a0{blocks()}\u2003",
    "<reasoning>a</reasoning>\n \t<answer>b</answer>",
    "<reasoning>\na\n</reasoning>\u00a0<answer>\nb\n</answer>",
    blocks("if a < b && c > d: x = a<b>", "a & b < c"),  # the text is not XML
    blocks("<Reasoning> <ANSWER> <reason> </ answer>"),  # tags are literal and case sensitive
    blocks("<think>a</think>", "<b>5</b>"), blocks("。", "!"), blocks("é", "日"),
    blocks("a" * 100_000, "<" * 100_000),
]
BAD = [
    "", " ", "5", "<reasoning>", "<answer>5</answer>", "<reasoning>a</reasoning>",
    "<answer>5</answer><reasoning>a</reasoning>",  # order
    "</reasoning>a<reasoning><answer>5</answer>", "<reasoning>a</reasoning></answer>5<answer>",
    "<reasoning>a<answer>5</answer></reasoning>", "<reasoning>a<answer>5</reasoning></answer>",
    "x" + blocks(), blocks() + "x", blocks() + "<eos>", blocks() + "\u200b", "\ufeff" + blocks(),
    "<reasoning>a</reasoning>x<answer>5</answer>", "<reasoning>a</reasoning>,<answer>5</answer>",
    blocks() + blocks(), blocks("<reasoning>a"), blocks("a</reasoning>"), blocks("a <answer>"),
    blocks(answer="5</answer>"), blocks(answer="<answer>5"), blocks() + "<reasoning>",
    blocks(""), blocks(answer=""), blocks("  \n"), blocks(answer="\u00a0"), blocks("\u200b\u200d"),
    blocks(answer="\u3164"), blocks(answer="\x00\x1f"), blocks(answer="\ud800"),
    blocks(answer="\u0301"), blocks(answer="\u2800"), blocks().upper(), blocks().title(),
    "<reasoning >a</reasoning><answer>5</answer>", "< reasoning>a</reasoning><answer>5</answer>",
    "<reasoning>a</reasoning><answer>5<answer>", "<reasoning>a<reasoning><answer>5</answer>",
    "＜reasoning＞a＜/reasoning＞＜answer＞5＜/answer＞",  # no Unicode normalisation
    "<rea\u00adsoning>a</reasoning><answer>5</answer>", "&lt;reasoning&gt;" + blocks(),
    "<reasoning>" * 10_000, "</answer>" * 10_000, "<" * 100_000,
]


@pytest.mark.parametrize("text", GOOD, ids=range(len(GOOD)))
def test_format_is_one_for_the_format(text):
    assert has_format(text)
    assert format_reward(["p"], [text]) == [1.0]


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_format_is_all_or_nothing(text):
    assert format_reward(["p"], [text]) == [0.0]


def test_blocks_exist_one_by_one():
    assert split_blocks("x<answer>5</answer>") == (None, "5")
    assert split_blocks("<reasoning>a</reasoning> b <answer>") == ("a", None)
    assert split_blocks(blocks("") + "tail") == ("", "5")
    assert split_blocks("<answer>5</answer><reasoning>a</reasoning>") == ("a", "5")
    assert split_blocks("<reasoning>a<answer>5</answer></reasoning>") == (
        "a<answer>5</answer>", "5")
    assert split_blocks("</answer>5<answer><reasoning>a</reasoning><reasoning>") == (None, None)


def test_conversational_completions_are_read_by_content():
    chat = [{"role": "assistant", "content": blocks()}]
    odd = [None, 5, [], [{"role": "assistant"}], [{"content": None}], ["text"], {"content": 3}]
    assert format_reward(["p"] * 2, [chat, chat[0]]) == [1.0, 1.0]
    assert format_reward(["p"] * len(odd), odd) == [0.0] * len(odd)
    assert outcome_reward(["p"], [chat], metadata=[{"final_answer": 5}]) == [1.0]
    assert process_reward(["p"], [chat], metadata=[{"checkpoints": ["think"]}]) == [0.2]


def test_rewards_ignore_foreign_columns_and_empty_batches():
    for function in (format_reward, process_reward, outcome_reward):
        assert function([], [], completion_ids=[], trainer_state=None) == []


# Process


def test_process_pays_a_fifth_a_checkpoint_up_to_one():
    checkpoints = [f"step {c}" for c in "abcdefg"]
    for found in range(8):
        reasoning = " ".join(checkpoints[:found])
        assert process(reasoning, checkpoints) == min(found, 5) / 5


def test_process_reads_only_the_single_reasoning_block():
    row = {"metadata": [{"checkpoints": ["a = 1"]}]}
    assert process_reward(["p"], ["a = 1 " + blocks("none", "a = 1")], **row) == [0.0]
    assert process_reward(["p"], [blocks("a = 1") + " broken"], **row) == [0.2]
    assert process_reward(["p"], [blocks("a = 1") + "<reasoning>"], **row) == [0.0]
    assert process_reward(["a = 1"], ["a = 1"], **row) == [0.0]
    assert process_reward(["a = 1"], [blocks("no steps")], **row) == [0.0]


def test_process_skips_blank_and_duplicate_checkpoints():
    assert process("a = 1", ["", " ", "\n", "\u200b", "a = 1", "a = 1"]) == 0.2
    assert process("a = 1", ["a = 1", "a=1", "A  =  1", "$a = 1"]) == 0.2
    assert process("a = 1 a=1", ["a = 1", "a=1"], matcher="literal") == 0.4
    assert process("a = 1", ["a = 1", "a = 1", " "], matcher="literal") == 0.2
    assert process("costs $ 5", ["$", "$ 5"]) == 0.2


@pytest.mark.parametrize(("reasoning", "checkpoint"), [
    ("so 4*2=8.", "4 * 2 = 8"), ("so 4 * 2 = 8", "4*2=8"), ("4  *\n2 =\t8", "4 * 2 = 8"),
    ("4 × 2 = 8", "4 * 2 = 8"), ("4 · 2 = 8", "4 * 2 = 8"), ("8 ÷ 2 = 4", "8 / 2 = 4"),
    ("9 \u2212 2 = 7", "9 - 2 = 7"), ("9 – 2 = 7", "9 - 2 = 7"), ("4 \\times 2 = 8", "4*2=8"),
    ("$4 * 2 = $8", "4 * 2 = 8"), ("4*2=8", "$4 * 2 = $8"), ("€4*2=€8", "£4*2=£8"),
    ("Light Energy is", "light energy"), ("( 3 + 4 ) * 2 = 14", "(3+4)*2=14"),
    ("50 % of 8", "50% of 8"), ("4*2=80, so 4*2=8", "4*2=8"), ("first, 4*2=8, then", "4*2=8"),
    ("done.4*2=8.", "4*2=8"), ("1. 4*2=8", "4*2=8"), ("x4*2=8y", "4*2=8"), ("a 4*2=8, 9", "4*2=8"),
])
def test_normalised_matcher_finds_the_step_in_another_spelling(reasoning, checkpoint):
    assert checkpoint_hits(reasoning, [checkpoint]) == (1, 1)


@pytest.mark.parametrize(("reasoning", "checkpoint"), [
    ("4*2=80", "4*2=8"), ("14*2=8", "4*2=8"), ("4*2=8.5", "4*2=8"), ("4*2=8,500", "4*2=8"),
    ("0.4*2=8", "4*2=8"), (".4*2=8", "4*2=8"), ("1,4*2=8", "4*2=8"), ("15", "5"), ("150", "15"),
    ("$15", "5"), ("4*2=8.5", "4*2=8."), ("4 * 2", "4 * 2 = 8"), ("4 + 2 = 8", "4 * 2 = 8"),
    ("light  energies", "light energy"), ("-14*2=8", "-4*2=8"), ("4*2=8٣", "4*2=8"),
    ("", "4*2=8"), ("1" * 5000, "1" * 40),
])
def test_normalised_matcher_refuses_longer_numbers_and_other_steps(reasoning, checkpoint):
    assert checkpoint_hits(reasoning, [checkpoint]) == (0, 1)


def test_literal_matcher_is_plain_substring():
    assert process("4 * 2 = 80", ["4 * 2 = 8"], matcher="literal") == 0.2
    assert process("4*2=8", ["4 * 2 = 8"], matcher="literal") == 0.0
    assert process("Light", ["light"], matcher="literal") == 0.0


def test_unknown_matcher_is_refused():
    with pytest.raises(ValueError, match="'normalised' or 'literal' - got 'fuzzy'"):
        process("a", ["a"], matcher="fuzzy")


BAD_METADATA = [
    None, {}, [], "", "not json", "[1]", "5", "null", 5, 2.5, True, object(), {"checkpoints": None},
    {"checkpoints": []}, {"checkpoints": "4 * 2 = 8"}, {"checkpoints": 5}, {"checkpoints": {}},
    {"checkpoints": [None, 5, ["4 * 2 = 8"]]}, {"checkpoints": ["", "  "]}, {"steps": ["a"]},
    '{"checkpoints": ["a"', "[" * 100_000, '{"checkpoints": [""]}', b"{}", {"final_answer": " "},
    {"final_answer": ""}, {"final_answer": None}, {"final_answer": [5]}, {"final_answer": {}},
    {"final_answer": float("nan")}, {"final_answer": float("inf")}, {"final_answer": "\u200b"},
]


@pytest.mark.parametrize("value", BAD_METADATA, ids=range(len(BAD_METADATA)))
@pytest.mark.parametrize("column", ["metadata", "metadata_json"])
@pytest.mark.parametrize("function", [process_reward, outcome_reward])
def test_metadata_without_the_value_does_not_apply(value, column, function):
    assert function(["p"], [blocks("4 * 2 = 8")], **{column: [value]}) == [None]


@pytest.mark.parametrize("column", [None, [], (), {}, {0: {"final_answer": "5"}}, "text", 5, b"x"])
def test_a_column_that_is_no_list_or_too_short_does_not_apply(column):
    for function in (process_reward, outcome_reward):
        assert function(["p"], [blocks()], metadata=column) == [None]
        assert function(["p"], [blocks()], metadata_json=column) == [None]
    assert process_reward(["p"], [blocks()]) == outcome_reward(["p"], [blocks()]) == [None]


def test_missing_metadata_does_not_apply_even_without_a_block():
    assert process_reward(["p"], ["no block"], metadata=[None]) == [None]
    assert process_reward(["p"], ["no block"], metadata=[{"checkpoints": ["a"]}]) == [0.0]


def test_metadata_json_stands_in_for_metadata():
    text = '{"checkpoints": ["think"], "final_answer": "5"}'
    for columns in ({"metadata_json": [text]}, {"metadata": [None], "metadata_json": [text]},
                    {"metadata": [text]}, {"metadata_json": np.array([text], dtype=object)}):
        assert process_reward(["p"], [blocks()], **columns) == [0.2]
        assert outcome_reward(["p"], [blocks()], **columns) == [1.0]
    both = {"metadata": [{"final_answer": "6"}], "metadata_json": [text]}
    assert outcome_reward(["p"], [blocks()], **both) == [0.0]


def test_rows_are_scored_one_by_one():
    metadata = [{"checkpoints": ["a"], "final_answer": "1"}, None,
                {"checkpoints": ["b"], "final_answer": 2}]
    completions = [blocks("a", "1"), blocks("a", "1"), blocks("a", "2")]
    assert process_reward(["p"] * 3, completions, metadata=metadata) == [0.2, None, 0.0]
    assert outcome_reward(["p"] * 3, completions, metadata=metadata) == [1.0, None, 1.0]


def test_normalise_is_stable():
    once = normalise(" $4 × ( 2 + 1 ) = 12 % OF  it ")
    assert once == "4*(2+1)=12%of it"
    assert normalise(once) == once


# Outcome


def test_outcome_compares_the_single_answer_block():
    row = {"metadata": [{"final_answer": "72"}]}
    assert outcome(" **72**. ", "72") == 1.0
    assert outcome("73", "72") == 0.0
    assert outcome_reward(["p"], ["72"], **row) == [0.0]
    assert outcome_reward(["p"], ["<answer>72</answer>"], **row) == [1.0]
    assert outcome_reward(["p"], ["x <answer>72</answer> y </reasoning>"], **row) == [1.0]
    assert outcome_reward(["p"], ["<answer>1</answer><answer>72</answer>"], **row) == [0.0]
    assert outcome_reward(["p"], ["</answer>72<answer>"], **row) == [0.0]
    assert outcome_reward(["p"], ["<reasoning>72</reasoning>"], **row) == [0.0]
    assert outcome("", "72") == outcome("71, 72", "72") == 0.0


def test_outcome_takes_numbers_as_gold():
    assert outcome("72", 72) == outcome("72", 72.0) == outcome("0.5", np.float32(0.5)) == 1.0
    assert outcome("0", 0) == outcome("True", True, domain=["code"]) == 1.0


def test_outcome_reads_the_domain_column():
    assert outcome("True", "1", domain=["code"]) == outcome("1.0", "1", domain=["code"]) == 0.0
    assert outcome("1.0", "1", domain=["math"]) == outcome("1.0", "1") == 1.0
    assert outcome("B) 5", "5", domain=["science"]) == 1.0
    assert outcome("B) 5", "5", domain=["math"]) == outcome("B) 5", "5", domain=[None]) == 0.0
    assert outcome("1.0", "1", domain=[]) == outcome("1.0", "1", domain="code") == 1.0


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80), st.text(max_size=20),
       st.recursive(st.none() | st.text(max_size=5) | st.integers() | st.floats(),
                    lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_built_in_rewards_never_raise(reasoning, answer, value):
    row = {"metadata": [{"checkpoints": value, "final_answer": value}], "domain": [value]}
    for completion in (blocks(reasoning, answer), reasoning):
        assert format_reward(["p"], [completion], **row)[0] in (0.0, 1.0)
        assert outcome_reward(["p"], [completion], **row)[0] in (0.0, 1.0, None)
        process_score = process_reward(["p"], [completion], **row)[0]
        assert process_score is None or 0.0 <= process_score <= 1.0


# A user's own rewards


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    """Put a module `my_rewards`, and one that fails at import, on the path."""
    (tmp_path / "my_rewards.py").write_text(
        "constant = 3\ndef brevity(prompts, completions, **columns):\n"
        "    return [1 / (1 + len(c)) for c in completions]\n")
    (tmp_path / "broken_rewards.py").write_text("raise RuntimeError('first\\nsecond')\n")
    (tmp_path / "leaving_rewards.py").write_text("import sys; sys.exit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("my_rewards", None)


@pytest.mark.parametrize(("spec", "weight"), [
    ("my_rewards:brevity", 1.0), ("my_rewards:brevity=0.5", 0.5), ("my_rewards:brevity=-2", -2.0),
    ("my_rewards:brevity=1e-3", 1e-3), (" my_rewards : brevity = 2 ", 2.0),
    ("my_rewards:brevity=0", 0.0),
])
def test_load_reward(user_module, spec, weight):
    name, function, loaded_weight = load_reward(spec)
    assert (name, loaded_weight) == ("brevity", weight)
    assert function(["p"], ["abc"], extra=[1]) == [0.25]


@pytest.mark.parametrize(("spec", "message"), [
    ("", "must read package.module:function=weight"), ("my_rewards", "must read package.module"),
    ("my_rewards:", "must read package.module"), (":brevity", "must read package.module"),
    ("my_rewards.brevity=0.5", "must read package.module"), ("=0.5", "must read package.module"),
    ("no_such_module_:f", "ModuleNotFoundError: No module named 'no_such_module_'"),
    (".relative:f", "must be importable"), ("my_rewards:missing", "got no such name"),
    ("my_rewards:constant", "must be a function in my_rewards - got type int"),
    ("my_rewards:brevity=", "finite number - got ''"),
    ("my_rewards:brevity=much", "finite number - got 'much'"),
    ("my_rewards:brevity=nan", "finite number - got 'nan'"),
    ("my_rewards:brevity=inf", "finite number - got 'inf'"),
    ("my_rewards:brevity=1=2", "finite number - got '1=2'"),
    ("broken_rewards:f", "RuntimeError: first second"), ("leaving_rewards:f", "SystemExit: 3"),
])
def test_load_reward_refuses_with_one_clear_line(user_module, spec, message):
    with pytest.raises(ValueError) as caught:
        load_reward(spec)
    text = str(caught.value)
    assert message in text and repr(spec) in text and "\n" not in text


def test_score_calls_every_function_by_name():
    rewards = [("format", format_reward, 1.0), ("outcome", outcome_reward, 2.0)]
    columns = {"metadata": [{"final_answer": 5}, None], "domain": ["math", "math"]}
    expected = {"format": [1.0, 0.0], "outcome": [1.0, None]}
    assert score(rewards, ["p"] * 2, [blocks(), "x"], columns) == expected
    by_name = {name: function for name, function, _ in rewards}
    assert score(by_name, ["p"] * 2, [blocks(), "x"], columns) == expected
    assert score([], ["p"], ["c"], {}) == {}


def test_score_passes_columns_as_keyword_lists():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [None]

    assert score({"spy": spy}, ["p"], ["c"], {"level": [3]}) == {"spy": [None]}
    assert seen == {"prompts": ["p"], "completions": ["c"], "level": [3]}


@pytest.mark.parametrize("value", [
    True, 1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1), np.bool_(True), np.array(0.5),
])
def test_score_takes_bools_and_numpy_scalars_as_numbers(value):
    (got,) = score({"f": lambda prompts, completions: [value]}, ["p"], ["c"], {})["f"]
    assert type(got) is float and got == float(value)


@pytest.mark.parametrize(("values", "message"), [
    (None, "must return a list - got type NoneType"), (1.0, "type float"), ((1.0,), "type tuple"),
    (np.ones(1), "type ndarray"), ({0: 1.0}, "type dict"), ([], "got 0 scores for 1"),
    ([1.0, 2.0], "got 2 scores for 1"), (["1.0"], "finite number or None - got '1.0' at row 0"),
    ([[1.0]], "finite number or None"), ([float("nan")], "got nan at row 0"),
    ([float("inf")], "got inf at row 0"), ([1j], "finite number or None"), ([{}], "finite number"),
    ([10**400], "finite number or None"), ([np.float32("nan")], "finite number or None"),
    ([np.ones(2)], "finite number or None"), (["a\nb" * 99], "finite number or None"),
])
def test_score_refuses_what_is_no_list_of_scores(values, message):
    with pytest.raises(RewardError) as caught:
        score({"good": format_reward, "mine": lambda prompts, completions: values},
              ["p"], ["c"], {})
    text = str(caught.value)
    assert text.startswith("reward function mine - ") and message in text
    assert "\n" not in text and len(text) < 300


def test_score_names_the_function_that_raised():
    def mine(prompts, completions):
        raise KeyError("no\nsuch")

    completion = "x" * 200 + "y" + "\n" * 50
    with pytest.raises(RewardError) as caught:
        score([("mine", mine, 1.0)], ["p"], [completion], {})
    text = str(caught.value)
    assert text.startswith("reward function mine - ") and "KeyError: 'no\\nsuch'" in text
    assert "x" * 200 in text and "xy" not in text and "\n" not in text
    assert isinstance(caught.value.__cause__, KeyError) and isinstance(caught.value, ValueError)


def test_score_reports_a_function_that_misses_a_column_and_an_empty_batch():
    with pytest.raises(RewardError, match="mine .*TypeError.*level"):
        score({"mine": lambda prompts, completions: [1]}, ["p"], ["c"], {"level": [1]})
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        score({"mine": lambda prompts, completions: 1 / 0}, [], [], {})


def test_score_refuses_two_functions_of_one_name():
    with pytest.raises(RewardError, match="reward function f - names must differ"):
        score([("f", format_reward, 1.0), ("f", outcome_reward, 1.0)], ["p"], ["c"], {})


def test_an_interrupt_is_not_swallowed():
    def mine(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score({"mine": mine}, ["p"], ["c"], {})
