"""The microscope shows what the trace holds: marks in the right place, formulas that come out."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.grpo.loss import group_advantages
from gemma_cot.report.microscope import (
    HIT,
    PLAIN,
    TAG,
    advantage_texts,
    locate,
    marked,
    spread,
    sum_text,
    view_of,
    views_within,
    weights_of,
    whole,
)
from gemma_cot.traces import read_trace, traced_steps


@pytest.mark.parametrize(
    ("reasoning", "checkpoint", "want"),
    [
        ("So 44 * 9 = 396, then", "44 * 9 = 396", "44 * 9 = 396"),
        ("So 44*9=396.", "44 * 9 = 396", "44*9=396"),
        ("So 44 × 9 = 396.", "44 * 9 = 396", "44 × 9 = 396"),
        ("144 * 9 = 3960 and 44 * 9 = 396", "44 * 9 = 396", "44 * 9 = 396"),
        ("144 * 9 = 396 and 44 * 9 = 3961", "44 * 9 = 396", None),
        ("The  Water boils", "the water BOILS", "The  Water boils"),
    ],
)
def test_a_checkpoint_is_found_where_it_stands(reasoning, checkpoint, want):
    place = locate(reasoning, checkpoint)
    assert (reasoning[slice(*place)] if place else None) == want
    if place and reasoning.startswith("144"):
        assert place[0] == reasoning.rindex("44 * 9 = 396")  # not the one in a longer number


def test_a_text_is_cut_into_tags_hits_and_the_rest():
    text = " <reasoning>4 * 2 = 8. So 4 * 2 = 8</reasoning>\n<answer>8</answer>"
    pieces = marked(text, ["4 * 2 = 8", "9 - 1 = 8"])
    assert "".join(piece for _, piece in pieces) == text
    assert [piece for kind, piece in pieces if kind == TAG] == [
        "<reasoning>", "</reasoning>", "<answer>", "</answer>"
    ]  # fmt: skip
    assert [piece for kind, piece in pieces if kind == HIT] == ["4 * 2 = 8"]  # the first one
    assert pieces[0] == [PLAIN, " "]
    assert marked("", []) == [] and marked("no tag 4", ["4"]) == [[PLAIN, "no tag 4"]]


def members(rewards, advantages, valid=None, penalty=0.0):
    valid = valid or [True] * len(rewards)
    return [
        {"reward": r, "advantage": a, "valid": v, "kl_penalty": penalty, "scores": {}}
        for r, a, v in zip(rewards, advantages, valid, strict=True)
    ]


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_the_formula_with_its_numbers_gives_the_advantage_of_the_trainer(scale, baseline):
    rewards = np.array([[2.2, 1.4, 1.0, 0.2], [3.0, 0.0, 0.0, 0.0]], np.float32)
    advantages = np.asarray(group_advantages(jnp.asarray(rewards), scale=scale, baseline=baseline))
    config = {"advantage_scale": scale, "baseline": baseline}
    _, formulas = advantage_texts(members(rewards[0].tolist(), advantages[0].tolist()), config)
    for formula, advantage in zip(formulas, advantages[0], strict=True):
        filled = formula.split(" = ")[2].replace("−", "-")
        assert re.fullmatch(r"[-+0-9.e()/ ]+", filled), formula  # numbers only
        assert eval(filled) == pytest.approx(advantage, abs=2e-3)  # four digits are shown
        assert float(formula.split(" = ")[-1]) == pytest.approx(advantage, abs=1e-3)


def test_groups_without_signal_and_rewards_that_do_not_apply_say_so():
    statistics, formulas = advantage_texts(members([1.0] * 3, [0.0] * 3), {})
    assert "no signal" in statistics and set(formulas) == {
        "A = 0: all rewards of the group are equal"
    }
    valid = [True, True, False]
    statistics, formulas = advantage_texts(members([2.0, 0.0, 9.0], [0.7, -0.7, 0.0], valid), {})
    assert statistics.startswith("mean = (2 + 0) / 2 = 1; std with n - 1 = 1.414")
    assert formulas[2] == "A = 0: no total, left out of mean and std"
    statistics, _ = advantage_texts(members([2.0, 0.0], [0.7, -0.7], penalty=0.5), {})
    assert statistics.startswith("mean = (1.5 + -0.5) / 2 = 0.5")  # rewards less beta KL


def test_a_reward_is_shown_as_its_weighted_sum():
    config = {"format_weight": 0.5, "process_weight": 1.0, "reward": ["my.module:short=0.25"]}
    weights = weights_of(config)
    assert weights == {"format": 0.5, "process": 1.0, "short": 0.25}
    member = {"valid": True, "reward": 0.7, "kl_penalty": None,
              "scores": {"format": 1.0, "process": None, "short": 0.8}}  # fmt: skip
    assert sum_text(member, weights) == "0.5·format 1 + 1·process none + 0.25·short 0.8 = 0.7"


def test_token_numbers_become_small_integers():
    assert whole([-0.1234, None, 0.0005], 3) == [-123, None, 0]
    assert whole([0.25, 0.25], 3) == 250 and whole([], 3) == []


def test_a_view_keeps_to_its_bytes_and_shows_groups_with_signal_first(small_run):
    trace = read_trace(small_run, 20)
    trace["groups"] = trace["groups"][::-1]  # the one without signal first
    assert [g["number"] for g in view_of(trace, {})["groups"]] == [1, 2, 3]
    small = view_of(trace, {}, limit=1)
    assert [g["number"] for g in small["groups"]] == [2] and small["of"] == 3
    one = len(json.dumps(small, separators=(",", ":")))
    steps = traced_steps(small_run)
    assert steps == [1, 20, 40]
    views = views_within(small_run, steps, {}, budget=4 * one)
    assert [view["step"] for view in views] == steps
    assert len(json.dumps(views, separators=(",", ":"))) < 5 * one
    views = views_within(small_run, steps, {}, budget=2 * one)
    assert [view["step"] for view in views] == [1, 40]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 100, 200])
def test_steps_are_spread_evenly(count):
    steps = list(range(1, 101))
    chosen = spread(steps, count)
    assert len(chosen) == len(set(chosen)) == min(count, 100)
    assert chosen[-1] == 100 and (count == 1 or chosen[0] == 1)
    gaps = {b - a for a, b in zip(chosen, chosen[1:], strict=False)}
    assert len(gaps) <= 2
