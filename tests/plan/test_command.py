"""The command: one JSON object with what scripts rely on, and every refusal in one line."""

import json
import sys
from importlib import metadata
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags

from gemma_cot.model.load import write_json
from gemma_cot.plan.__main__ import define_plan_flags, main, set_up
from gemma_cot.plan.chips import compiler_of, tpu_devices
from gemma_cot.plan.programs import FUNCTIONS

SMALL = (
    "--topology=local", "--num_generations=2", "--prompts_per_rollout=4", "--mini_batch=4",
    "--micro_batch=2", "--max_prompt_tokens=16", "--max_completion_tokens=4", "--lora_rank=2",
    "--sft_batch=4", "--eval_limit=4", "--eval_batch=4",
)  # fmt: skip


@pytest.fixture
def parse(shallow, tmp_path):
    """Return f(*flags) -> parsed flags of the command; the model is conftest's, of one layer."""

    def run(*given: str) -> flags.FlagValues:
        write_json(tmp_path / "config.json", shallow.to_hf())
        values = flags.FlagValues()
        define_plan_flags(values)
        values(["plan", f"--model={tmp_path}", *SMALL, *given])
        return values

    return run


def test_a_plan_for_this_machine_as_json_and_measured(parse, capsys):
    main(parse("--json", "--measure"))
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True and plan["refusal"] == ""
    for key in ("hbm_gib_per_chip", "collectives", "compile_seconds", "measured_seconds"):
        assert list(plan[key]) == list(FUNCTIONS), key
    assert all(value > 0 for value in plan["hbm_gib_per_chip"].values())
    assert all(value > 0 for value in plan["measured_seconds"].values())
    assert plan["collectives"]["decode"] == {} and plan["collectives"]["update"]["all-reduce"] > 0
    # a CPU has no peak figures that are known here
    assert plan["bound_seconds"] is None and plan["iterations_in_session"] is None
    assert plan["mesh"] == "4x1" and plan["dtype"] == "float32"
    assert plan["compiler"] == f"jax {jax.__version__}"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--mesh=3x1"], "--mesh=3x1: must multiply to the 4 devices"),
        (["--mesh=4x1", "--sft_batch=6"], "--sft_batch: must be divisible by 4"),
        (["--mesh=4x1", "--micro_batch=3"], "set --micro_batch to one of"),
        (["--mesh=1x4"], "--mesh=1x4: the model axis must divide the 6 of axis N"),
        (["--model=7b"], "--model: must be one of tiny, 270m, 1b, 4b, 12b, 27b or a folder"),
        (["--measure", "--topology=v5e:2x4"], "--measure: can only time the devices of this"),
        (["--session=soon"], "--session: must be a time"),
        (["--max_completion_tokens=99999"], "--max_completion_tokens: .* 32768 positions"),
    ],
)
def test_bad_input_is_refused_in_one_line(parse, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        set_up(parse(*given))
    assert "\n" not in str(caught.value)


def test_shapes_by_name_and_by_preset():
    values = flags.FlagValues()
    define_plan_flags(values)
    values(["plan", "--preset=gemma3_1b_v5e8", "--topology=local", "--mesh=4x1"])
    setup, chip, memory = set_up(values)
    assert setup.model_cfg.embed_dim == 1152 and setup.cfg.remat == "all" and chip is None
    assert memory == float("inf") and setup.eval_rows == 1000


def test_what_compiles_is_named(monkeypatch):
    """libtpu where it compiles, under the name it was installed by, such as libtpu-nightly."""
    monkeypatch.setattr(metadata, "packages_distributions", lambda: {"libtpu": ["numpy"]})
    cpu, tpu = (compiler_of(SimpleNamespace(platform=platform)) for platform in ("cpu", "tpu"))
    assert cpu == f"jax {jax.__version__}"
    assert tpu == f"jax {jax.__version__}, numpy {np.__version__}"


def test_without_libtpu_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "libtpu", None)
    with pytest.raises(ValueError, match=r"'gemma_cot\[tpu\]', or set --topology=local"):
        tpu_devices("v5e:2x4")
