"""What to change when a run does not fit, and how much more would fit."""

import dataclasses
import re
from types import SimpleNamespace

import pytest

from gemma_cot.plan.fit import largest_rollout, needs, refusal, rollout_step
from gemma_cot.plan.programs import FUNCTIONS, call_of, compile_call
from gemma_cot.settings import check_batches

GIB = 2**30


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("decode", {}, "^--prompts_per_rollout: decode must fit .* got 3.00 GiB with "
         "prompts_per_rollout 8; set --prompts_per_rollout=4 or less"),
        ("prefill", {}, "set --prompts_per_rollout=4 or less"),
        ("decode", {"prompts_per_rollout": 4}, "--mesh: decode .* with mesh 4x1; set --mesh=2x2"),
        ("evaluate", {"eval_batch": 16}, "--eval_batch: evaluate .* set --eval_batch=8 or less"),
        ("update", {"remat": "none"}, "--remat: update .* with remat none; set --remat=all"),
        ("update", {"mini_batch": 8, "micro_batch": 4}, "set --micro_batch=2"),
        ("reference_logprobs", {"mini_batch": 8, "micro_batch": 4}, "set --micro_batch=2"),
        ("update", {}, "--mesh: update .* set --mesh=2x2"),
        ("sft", {"sft_micro_batches": 1}, "set --sft_micro_batches=2"),
        ("sft", {}, "--mesh: sft .* set --mesh=2x2"),
    ],
)  # fmt: skip
def test_a_function_too_big_is_refused_with_what_to_change(make_setup, name, changes, words):
    needed = dict.fromkeys(FUNCTIONS, 1.0 * GIB) | {name: 3.0 * GIB}
    line = refusal(make_setup(**changes), needed, 2.0 * GIB)
    assert re.search(words, line), line
    assert "\n" not in line and "2.00 GiB" in line
    assert refusal(make_setup(**changes), needed, 3.0 * GIB) == ""


def test_the_largest_rollout_is_named_where_it_is_known(make_setup):
    needed = dict.fromkeys(FUNCTIONS, 1.0 * GIB) | {"decode": 3.0 * GIB}
    assert "set --prompts_per_rollout=6 or" in refusal(make_setup(), needed, 2.0 * GIB, largest=6)
    assert "set --mesh=2x2" in refusal(make_setup(), needed, 2.0 * GIB, largest=0)


def test_the_rollout_that_is_advised_divides_over_mini_batches_and_devices(make_setup):
    needed = dict.fromkeys(FUNCTIONS, 1.0 * GIB) | {"decode": 3.0 * GIB}
    setup = make_setup(mini_batch=2, prompts_per_rollout=12)
    line = refusal(setup, needed, 2.0 * GIB)
    advised = int(re.search(r"set --prompts_per_rollout=(\d+) or less", line)[1])
    assert advised == 4, "the least common multiple of mini-batch 2 and 4 devices, below 12 / 2"
    check_batches(dataclasses.replace(setup.cfg, prompts_per_rollout=advised), setup.data)
    eight = SimpleNamespace(cfg=make_setup(mini_batch=4).cfg, data=8)
    assert rollout_step(eight) == 8


def test_where_nothing_is_left_to_cut_a_larger_topology_is_named(make_setup):
    needed = dict.fromkeys(FUNCTIONS, 3.0 * GIB)
    weights = 1000.0  # bytes of a chip: less than the weights alone
    assert "set --mesh=2x2" in refusal(make_setup(), needed, weights)
    assert "larger --topology or a smaller --model" in refusal(make_setup(1, 2), needed, weights)


def test_the_largest_rollout_fits_and_a_larger_one_does_not(make_setup, shallow):
    setup = make_setup(shape=shallow)
    programs = {"decode": compile_call(setup, call_of("decode", setup))}
    memory = 5 * needs(setup, programs)["decode"]
    largest = largest_rollout(setup, programs, memory)
    assert largest > 16 and largest % 4 == 0

    def needed(prompts):
        other = make_setup(shape=shallow, prompts_per_rollout=prompts)
        return needs(other, {"decode": compile_call(other, call_of("decode", other))})["decode"]

    assert needed(largest) <= memory < needed(largest * 5 // 4 // 4 * 4)
    assert largest_rollout(setup, programs, 0.0) == 0
