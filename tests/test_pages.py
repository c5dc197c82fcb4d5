"""Pages of docs/ that report an experiment say what it stored; cheap parts of it are made again.

The experiments themselves take minutes: experiments/NAME.py writes docs/NAME.json, docs/NAME.svg
and a part of the page. `pytest -m experiment -n 0` makes them again, whole.
"""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest

from gemma_cot.config import GEMMA3_1B, embedded
from gemma_cot.data import encode_examples, read_jsonl
from gemma_cot.model.params import num_params
from gemma_cot.plan.cost import Share
from gemma_cot.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    "kv_cache": "kv_cache",
    "discard": "discard_never_truncate",
    "sft_first": "sft_first",
    "three_pillars": "three_pillars",
}
LINK = re.compile(r"\]\((\w+\.md)\)")


@cache
def page(name: str) -> str:
    return (DOCS / f"{PAGES[name]}.md").read_text()


@cache
def stored(name: str) -> dict:
    return json.loads((DOCS / f"{name}.json").read_text())


@cache
def script(name: str):
    """The experiment, as a module."""
    sys.path.insert(0, str(ROOT / "experiments"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


@pytest.mark.parametrize("name", PAGES)
def test_page_and_plot_hold_the_stored_numbers(name):
    assert script(name).table(stored(name)) in page(name)
    assert script(name).draw(stored(name)) == (DOCS / f"{name}.svg").read_text()
    assert f"({name}.svg)" in page(name)


@pytest.mark.experiment
@pytest.mark.parametrize("name", [name for name in PAGES if name != "kv_cache"])  # times differ
def test_the_experiment_measures_what_is_stored(name):
    """To the digit, on the kind of machine and with the versions that it was stored with."""
    ours = ("XLA_", "JAX_")  # conftest's devices and precision
    environment = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    command = [sys.executable, str(ROOT / "experiments" / f"{name}.py"), "--check"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment | {"JAX_PLATFORMS": "cpu"}
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_every_page_is_in_the_index():
    listed = LINK.findall((DOCS / "index.md").read_text())
    assert len(listed) == len(set(listed))
    assert set(listed) == {path.name for path in DOCS.glob("*.md")} - {"index.md"}


def test_the_formulas_of_the_cache_are_those_of_plan():
    kv, share = script("kv_cache"), Share(GEMMA3_1B, rank=1, data=1, model=1, item=2)
    assert kv.cache_bytes(GEMMA3_1B, 1) == share.cache_token == 26 * 2**10
    assert kv.matrix_flops(GEMMA3_1B) == pytest.approx(2 * share.layer_weights, rel=2e-4)
    one, two = (kv.flops(GEMMA3_1B, n, cached=True) for n in (64, 65))  # all layers see one more
    assert two - one == share.pair
    past, further = (kv.flops(GEMMA3_1B, n, cached=True) for n in (600, 601))  # global layers do
    assert further - past == share.pair * sum(GEMMA3_1B.global_layers) / GEMMA3_1B.num_layers
    by_hand = sum(kv.flops(GEMMA3_1B, n, cached=True) for n in range(1, 65))
    unembeddings = 63 * 2 * GEMMA3_1B.vocab_size * GEMMA3_1B.embed_dim  # of all but the last
    assert kv.flops(GEMMA3_1B, 64, cached=False) == by_hand - unembeddings


def test_what_the_page_of_the_cache_claims():
    kv, ms = script("kv_cache"), stored("kv_cache")["ms"]
    growth = kv.flops(GEMMA3_1B, 1024, True) / kv.flops(GEMMA3_1B, 64, True)
    ratio = kv.flops(GEMMA3_1B, 1024, False) / kv.flops(GEMMA3_1B, 1024, True)
    weights = 2 * num_params(GEMMA3_1B) / 2**20
    measured = ms["1024"]["without"] / ms["1024"]["with"]
    words = " ".join(page("kv_cache").split())
    assert f"it is {100 * (growth - 1):.0f} % more than at 64" in words
    assert f"{measured:.0f}, less than the formula's {ratio:.0f} for 1B" in words
    assert f"26 MiB beside {weights:,.0f} MiB of weights" in words
    assert measured < ratio
    assert f"that is {256 + 4 * 512:,} columns and not {4 * (256 + 512):,}" in words
    for length, time in ms.items():
        assert time["with"] < time["without"], length


def test_rows_left_out_and_rows_cut():
    discard, result = script("discard"), stored("discard")
    tokenizer = load_tokenizer(embedded("tiny_model"))
    examples, _ = read_jsonl(embedded("train.jsonl"))
    rows, _ = encode_examples(tokenizer, examples, "", 64, result["room"])
    stops = set(tokenizer.stop_ids)
    words = " ".join(page("discard").split())
    for limit, arms in result["limits"].items():
        for arm, told in arms.items():
            kept = discard.treated(rows, arm, int(limit))
            without = sum(row.target_ids[-1] not in stops for row in kept)
            assert (len(kept), without) == (told["rows"], told["without_stop"])
            assert max(len(row.target_ids) for row in kept) == int(limit)
        over = arms["truncate"]["without_stop"]
        assert arms["discard"]["without_stop"] == 0 and over == len(rows) - arms["discard"]["rows"]
        assert f"{over:,} of the {len(rows):,} rows are over {limit} tokens" in words


def overlap(one: list[float], other: list[float]) -> bool:
    return max(one[0], other[0]) <= min(one[1], other[1])


def test_what_the_page_of_cut_rows_claims():
    arms, words = stored("discard")["limits"]["60"], " ".join(page("discard").split())
    left, cut = (arms[arm]["after"] for arm in ("discard", "truncate"))
    for step in left:
        for rate in ("truncated_rate", "full_format_accuracy"):
            assert overlap(left[step][f"{rate}_interval"], cut[step][f"{rate}_interval"])
    count = {(arm, rate): round(64 * arms[arm]["after"]["150"][rate])
             for arm in arms for rate in ("truncated_rate", "full_format_accuracy")}  # fmt: skip
    never, whole = ([count[arm, rate] for arm in ("truncate", "discard")]
                    for rate in ("truncated_rate", "full_format_accuracy"))  # fmt: skip
    told = f"150 steps {never[0]} of 64 completions never stop, against {never[1]} of 64"
    assert told in words and f"({whole[0]} and {whole[1]} of 64" in words
    assert left["0"]["truncated_rate"] == cut["0"]["truncated_rate"] == 0
    tokens = [f"{after['150']['tokens']:.1f}" for after in (left, cut)]
    assert f"{tokens[0]} tokens a completion against {tokens[1]}" in words
    share = arms["truncate"]["without_stop"] / arms["truncate"]["rows"]
    assert f"{100 * share:.0f} % of the targets had no stop token" in words


def test_what_the_page_of_sft_claims():
    result, words = stored("sft_first"), " ".join(page("sft_first").split())
    base = result["starts"]["0"]["curves"]
    assert {len(curve) for curve in base.values()} == {result["steps"]} == {30}
    assert {value for curve in base.values() for value in curve} == {0.0}
    assert f"the {8 * result['steps']} groups" in words
    assert f"on {result['rows']} unseen rows" in words
    few, many = (result["starts"][steps] for steps in ("200", "300"))
    signal = [
        f"{100 * np.mean(start['curves']['signal_share'][:5]):.1f} %" for start in (few, many)
    ]
    assert f"{signal[0]} and {signal[1]} of them in the first five steps" in words
    answers = [[f"{100 * start[when]['answer_accuracy']:.1f} %" for when in ("before", "after")]
               for start in (few, many)]  # fmt: skip
    assert f"took answers from {answers[1][0]} to {answers[1][1]}" in words
    assert f"in 30 steps: {answers[0][0]} to {answers[0][1]}, a loss, though the intervals" in words
    assert answers[0][0] == answers[1][0]
    assert few["before"]["full_format_accuracy"] == many["before"]["full_format_accuracy"]
    name = "answer_accuracy_interval"
    assert overlap(few["before"][name], few["after"][name])
    assert not overlap(few["after"][name], many["after"][name])


def test_nine_runs_of_as_many_steps():
    result = stored("three_pillars")
    assert [len(seeds) for seeds in result["arms"].values()] == [3, 3, 3]
    lengths = {len(curve) for seeds in result["arms"].values() for curves in seeds.values()
               for curve in curves.values()}  # fmt: skip
    assert lengths == {result["steps"]}
    assert f"{result['steps']} steps of 8 prompts" in page("three_pillars")
    assert f"{result['start']} steps into the SFT run" in page("three_pillars")
    words = " ".join(page("three_pillars").split())
    means = [
        [100 * np.mean([np.mean(curves[metric][-5:]) for curves in seeds.values()])
         for seeds in result["arms"].values()]
        for metric in ("signal_share", "reward_outcome", "reward_process")
    ]  # fmt: skip
    signal, answers, process = ([f"{mean:.1f} %" for mean in three] for three in means)
    assert f"{signal[0]} of them by outcome alone, {signal[1]} with format, {signal[2]}" in words
    assert f"than with format alone ({process[2]} against {process[1]}), the seeds overlap" in words
    ends = {
        metric: [[np.mean(curves[metric][-5:]) for curves in seeds.values()]
                 for seeds in result["arms"].values()]
        for metric in ("signal_share", "reward_format", "reward_outcome")
    }  # fmt: skip
    assert "in this order in all three seeds" in words
    assert all(one < two < three for one, two, three in zip(*ends["signal_share"], strict=True))
    alone, two, three = ends["reward_format"]
    assert "in each seed, the lowest of the one above the highest of the other; with" in words
    assert min(two) > max(alone) and np.greater(three, alone).sum() == 2
    alone, two, three = ends["reward_outcome"]
    assert f"{answers[0]}, {answers[1]} and {answers[2]}: the seeds of any two" in words
    for one, other in permutations((alone, two, three), 2):
        assert min(one) <= max(other)


def functions_of(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef)}  # fmt: skip


def test_every_bug_elsewhere_has_its_test_here():
    lines = (DOCS / "what_was_wrong_elsewhere.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| bug")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", row.split("|")[-2])
        assert named, row
        for path, name in named:
            assert name in functions_of(ROOT / path), f"{path}::{name}"
