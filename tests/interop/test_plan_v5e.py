"""The planner compiles the run for a v5e without one: needs the PyPI package libtpu, no other.

In processes of their own: conftest switches XLA's optimisations off, and memory depends on them.
"""

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import jax
import pytest

from gemma_cot.config import GEMMA3_1B
from gemma_cot.model.load import write_json
from gemma_cot.plan.chips import tpu_devices
from gemma_cot.plan.programs import FUNCTIONS

pytest.importorskip("libtpu")
pytestmark = pytest.mark.interop
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def compile_case(case: str, function: str) -> dict:
    """Return what benchmarks/v5e_compile.py prints for one function of one case."""
    call = f"v5e_compile.measure({case!r}, {function!r})"
    code = f"import json, v5e_compile; print(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_an_update_of_gemma3_1b_with_4_x_768_tokens_a_chip():
    found = compile_case("1b 4 x 768 a chip", "update")
    assert found["mesh"] == "8x1" and found["hbm_gib"] <= 2.6, found["compiler"]
    assert found["hbm_gib_by_owner"]["weights"] == 1.862  # 999,885,952 in bfloat16, and once
    # the gradient with all summed metrics; the largest of the metrics that are maxima
    assert found["collectives"] == {"all-reduce": [2, 0]}


def test_a_rollout_of_gemma3_1b_with_64_rows_a_chip():
    found = compile_case("1b 64 rows a chip", "decode")
    assert found["hbm_gib"] < 3.5 and found["limiter"] == "HBM", found["compiler"]
    assert found["collectives"] == {}, "no collective in the decode loop, nor anywhere"


def test_a_plan_that_does_not_fit_is_refused_with_what_to_change(tmp_path):
    """Two layers of Gemma 3 1B and 16,384 prompts: the caches alone are larger than four chips."""
    shape = dataclasses.replace(GEMMA3_1B, num_layers=2, global_layers=(False, True))
    write_json(tmp_path / "config.json", shape.to_hf())
    cache = tmp_path / "cache"
    kept = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    kept["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    done = subprocess.run(
        [sys.executable, "-m", "gemma_cot.plan", "--preset=gemma3_1b_v5e8", f"--model={tmp_path}",
         "--topology=v5e:2x2", "--prompts_per_rollout=16384", "--eval_rows=4", "--nolargest",
         "--json"],
        capture_output=True, text=True, env=os.environ | kept,
    )  # fmt: skip
    assert not list(cache.glob("*")), "could not be read back: the next plan would warn of each"
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert not found["fits"] and found["hbm_gib_per_chip"]["decode"] > found["hbm_gib_limit"]
    assert done.stderr == f"error: {found['refusal']}\n"
    assert "decode must fit the 15.75 GiB" in found["refusal"]
    assert "set --prompts_per_rollout=8192 or less" in found["refusal"]
    for key in ("hbm_gib_per_chip", "compile_seconds", "limiter"):
        assert set(found[key]) == set(FUNCTIONS)
    assert set(found["bound_seconds"]) == {*FUNCTIONS, "iteration"}
    assert found["mesh"] == "4x1", "auto: pure data parallel"
    assert found["compiler"] == f"jax {jax.__version__}, libtpu {metadata.version('libtpu')}"
    assert not any(found["collectives_in_loops"].values())


@pytest.mark.parametrize("name", ["v9x:2x4", "v5e:banana", "v5e:3x5", "tpu"])
def test_topologies_that_libtpu_does_not_know_are_refused(name):
    with pytest.raises(ValueError, match=f"--topology: must be one that libtpu knows.*{name}"):
        tpu_devices(name)
