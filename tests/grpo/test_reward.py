"""Every sentence of the format, process and outcome rewards, and of the penalties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_cot.grpo.reward import (
    checkpoint_hits,
    format_reward,
    has_format,
    length_penalty,
    normalise,
    outcome_reward,
    overlong,
    process_reward,
    repeated_share,
    repetition_penalty,
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
    ("so .5*2=1", ".5 * 2 = 1"), ("-.5+1=.5", "-.5 + 1 = .5"), ("($.5+1)*2=3", "(.5+1)*2=3"),
    ("done.5+3=8", ".5+3=8"), ("at x.5 it is 7", "x.5 it is 7"), ("1..5=6", "..5=6"),
])
def test_normalised_matcher_finds_the_step_in_another_spelling(reasoning, checkpoint):
    assert checkpoint_hits(reasoning, [checkpoint]) == (1, 1)


@pytest.mark.parametrize(("reasoning", "checkpoint"), [
    ("4*2=80", "4*2=8"), ("14*2=8", "4*2=8"), ("4*2=8.5", "4*2=8"), ("4*2=8,500", "4*2=8"),
    ("0.5*2=1", ".5*2=1"), ("1.5*2=3", ".5*2=3"), ("1,.5*2=1", ".5*2=1"), (".5*2=1", "5*2=1"),
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


@pytest.mark.parametrize("blank", ["\t", "\n", "\r\n", "\u00a0", "\u2003", "\x85", "  "])
def test_normalise_takes_any_white_space_for_one_space(blank):
    assert normalise(f"{blank}a{blank}b 1{blank}+{blank}2{blank}") == "a b 1+2"


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


# Penalties, in tokens


@pytest.mark.parametrize(("tokens", "penalty"), [
    # L_max 512, L_cache 100: free up to 412, then 1/100 a token, -1 at 512 and beyond
    (0, 0.0), (1, 0.0), (411, 0.0), (412, 0.0), (413, -0.01), (437, -0.25), (462, -0.5),
    (511, -0.99), (512, -1.0), (513, -1.0), (10_000, -1.0),
])
def test_overlong_is_daposs_penalty_in_tokens(tokens, penalty):
    assert overlong(tokens, 512, 100) == pytest.approx(penalty, abs=1e-12)
    ids = {"completion_ids": [[7] * tokens]}
    got = length_penalty(["p"], ["one text"], limit=512, cache=100, **ids)
    assert got == [pytest.approx(penalty, abs=1e-12)]


def test_the_length_penalty_counts_tokens_and_never_characters():
    ids = {"completion_ids": [[1] * 10, [1] * 20]}
    assert length_penalty(["p"] * 2, ["x" * 9000, ""], limit=20, cache=20, **ids) == [-0.5, -1.0]


def test_a_penalty_without_tokens_does_not_apply():
    for columns in ({}, {"completion_ids": None}, {"completion_ids": [None, None]}):
        assert length_penalty(["p"] * 2, ["a", "b"], limit=9, cache=3, **columns) == [None, None]
        assert repetition_penalty(["p"] * 2, ["a", "b"], **columns) == [None, None]


def test_repeated_share_is_that_of_runs_seen_before():
    assert repeated_share([]) == repeated_share([5]) == repeated_share([5] * 7) == 0.0
    assert repeated_share(list(range(100))) == 0.0
    assert repeated_share([5] * 8) == 0.0  # one run of eight
    assert repeated_share([5] * 9) == 0.5  # two runs, one of them again
    assert repeated_share([5] * 107) == 0.99  # 100 runs, one distinct
    # 16 tokens twice: 25 runs of 8; those at 16 .. 24 stood at 0 .. 8 before
    assert repeated_share(list(range(16)) * 2) == pytest.approx(9 / 25)
    assert repeated_share([1, 2, 1, 2, 1], n=2) == pytest.approx(2 / 4)


def test_the_repetition_penalty_is_minus_that_share():
    ids = {"completion_ids": [[5] * 9, list(range(30)), []]}
    assert repetition_penalty(["p"] * 3, ["a", "b", "c"], **ids) == [-0.5, 0.0, 0.0]
    assert str(repetition_penalty(["p"], ["a"], completion_ids=[[1]])) == "[0.0]"  # not -0.0


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 9))
def test_repeated_share_equals_counting_one_by_one(ids, n):
    seen, repeats, runs = set(), 0, range(len(ids) - n + 1)
    for first in runs:
        run = tuple(ids[first : first + n])
        repeats += run in seen
        seen.add(run)
    assert repeated_share(ids, n) == pytest.approx(repeats / len(runs) if runs else 0.0)
