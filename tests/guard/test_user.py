"""A user's own rewards: found by name or refused in one line, and called with all checked."""

import sys
from functools import partial, wraps

import numpy as np
import pytest

from gemma_cot.grpo.reward import RewardError
from gemma_cot.guard.user import checked, load_reward


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


def test_columns_are_passed_on_as_keyword_lists():
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [None]

    assert checked("spy", spy)(["p"], ["c"], level=[3]) == [None]
    assert seen == {"prompts": ["p"], "completions": ["c"], "level": [3]}


def len_of_completions(completions, **columns):
    """Score as TRL's first example does."""
    return [float(len(text)) for text in completions]


TRL_STYLES = [
    len_of_completions,
    lambda completions, **kwargs: [float(len(c)) for c in completions],
    lambda completions, prompts, **kwargs: [float(len(c)) for c in completions],
    lambda completions, prompts=None, level=None: [float(len(c)) for c in completions],
    lambda *, prompts, completions, level: [float(len(c)) for c in completions],
    lambda **given: [float(len(c)) for c in given["completions"]],
    lambda p, c, **columns: [float(len(x)) for x in c],
    lambda p, texts, completions=None, **columns: [float(len(x)) for x in texts],
    lambda level, completions, **columns: [float(len(x)) for x in completions],
    lambda level, **columns: [float(len(x)) for x in columns["completions"]],
    lambda *, prompts, **columns: [float(len(x)) for x in columns["completions"]],
    partial(lambda scale, completions, **columns: [scale * len(x) for x in completions], 1.0),
    wraps(len_of_completions)(lambda ps, cs, **columns: [float(len(x)) for x in cs]),
    wraps(len_of_completions)(
        lambda *by_place, **by_name: [float(len(x)) for x in by_name["completions"]]
    ),
    lambda *both, **columns: [float(len(x)) for x in both[1]],
]


@pytest.mark.parametrize("function", TRL_STYLES, ids=range(len(TRL_STYLES)))
def test_prompts_and_completions_go_by_name_where_a_function_has_the_names(function):
    assert checked("f", function)(["p"], ["four"], level=[3]) == [4.0]


def test_completions_never_stand_in_for_a_column_that_is_missing():
    with pytest.raises(RewardError, match="f - must not raise - got TypeError"):
        checked("f", lambda completions, answer: [1.0])(["p"], ["four"], level=[3])


@pytest.mark.parametrize("value", [
    True, 1, 0.5, np.float32(0.5), np.float64(0.5), np.int64(1), np.bool_(True), np.array(0.5),
])
def test_bools_and_numpy_scalars_are_numbers(value):
    (got,) = checked("f", lambda prompts, completions: [value])(["p"], ["c"])
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
def test_what_is_no_list_of_scores_is_refused(values, message):
    with pytest.raises(RewardError) as caught:
        checked("mine", lambda prompts, completions: values)(["p"], ["c"])
    text = str(caught.value)
    assert text.startswith("reward function mine - ") and message in text
    assert "\n" not in text and len(text) < 300


def test_a_function_that_raises_is_named():
    def mine(prompts, completions):
        raise KeyError("no\nsuch")

    completion = "x" * 200 + "y" + "\n" * 50
    with pytest.raises(RewardError) as caught:
        checked("mine", mine)(["p"], [completion])
    text = str(caught.value)
    assert text.startswith("reward function mine - ") and "KeyError: 'no\\nsuch'" in text
    assert "x" * 200 in text and "xy" not in text and "\n" not in text
    assert isinstance(caught.value.__cause__, KeyError) and isinstance(caught.value, ValueError)


def test_a_missing_parameter_and_an_empty_batch_are_reported():
    with pytest.raises(RewardError, match="mine .*TypeError.*level"):
        checked("mine", lambda prompts, completions: [1])(["p"], ["c"], level=[1])
    with pytest.raises(RewardError, match="ZeroDivisionError"):
        checked("mine", lambda prompts, completions: 1 / 0)([], [])


def test_an_interrupt_is_not_swallowed():
    def mine(prompts, completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checked("mine", mine)(["p"], ["c"])


def picky(prompts, completions, level, **columns):
    """A reward that fails on an empty completion, and with it on the whole batch."""
    assert len(prompts) == len(completions) == len(level)
    return [number / len(text) for number, text in zip(level, completions, strict=True)]


def test_the_row_that_raises_is_named_not_the_first_one():
    with pytest.raises(RewardError, match="ZeroDivisionError: division by zero on completion ''"):
        checked("picky", picky)(["p"] * 3, ["ab", "", "abcd"], level=[1, 1, 1])


def test_rows_that_raise_are_noted_with_their_input_and_score_none():
    errors = [{"reward": "earlier"}]
    call = checked("picky", picky, errors)
    assert call(["p", "q", "r", "s"], ["ab", "", "abcd", ""], level=[1, 2, 3, 4]) == [
        0.5, None, 0.75, None]  # fmt: skip
    wanted = {"reward": "picky", "error": "ZeroDivisionError: division by zero", "completion": ""}
    assert errors[1:] == [wanted | {"prompt": "q"}, wanted | {"prompt": "s"}]
    assert call(["p"], ["ab"], level=[4]) == [2.0] and len(errors) == 3


def test_what_fails_as_a_batch_only_is_never_passed_over():
    def whole(prompts, completions):
        if len(prompts) > 1:
            raise RuntimeError("only ever one")
        return [1.0]

    errors = []
    with pytest.raises(RewardError, match="whole .*RuntimeError: only ever one"):
        checked("whole", whole, errors)(["p"] * 2, ["a", "b"])
    assert errors == []


def test_a_bad_score_is_refused_even_where_errors_are_noted():
    with pytest.raises(RewardError, match="mine - every score must be a finite number"):
        checked("mine", lambda prompts, completions: [float("nan")], [])(["p"], ["c"])
