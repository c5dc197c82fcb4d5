"""The self-test passes on a sound model and names what is wrong with a damaged one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from commands import run_here
from safetensors.numpy import load_file, save_file

from gemma_cot.config import embedded
from gemma_cot.doctor import examine


@pytest.fixture
def model(tmp_path) -> Path:
    """A copy of the embedded model that a test may damage."""
    return Path(shutil.copytree(embedded("tiny_model"), tmp_path / "model"))


def failed(model: Path) -> dict[str, str]:
    """Return the failed checks and their details."""
    return {check.name: check.detail for check in examine(str(model)) if not check.passed}


def test_the_embedded_model_passes_every_check():
    checks = examine(embedded("tiny_model"))
    assert [check.name for check in checks if not check.passed] == []
    assert len(checks) == 9
    (stop,) = (check for check in checks if check.name == "stop token in mask")
    assert int(stop.detail.split()[0]) > 0, "the check must have a row that stops"


def test_a_value_that_is_not_finite_is_named(model):
    tensors = load_file(model / "model.safetensors")
    weights = tensors["model.layers.2.mlp.up_proj.weight"].copy()
    weights[3, 5] = np.nan
    tensors["model.layers.2.mlp.up_proj.weight"] = weights
    save_file(tensors, model / "model.safetensors")
    found = failed(model)
    assert found["tensors"] == "not finite: ['layers']['up']"
    assert "sampler = trainer" in found  # NaN log-probs are no agreement either


def test_a_missing_tensor_is_named(model):
    tensors = load_file(model / "model.safetensors")
    tensors.pop("model.layers.4.self_attn.k_proj.weight")
    save_file(tensors, model / "model.safetensors")
    assert "model.layers.4.self_attn.k_proj.weight" in failed(model)["model folder"]


def test_a_tokenizer_of_another_model_is_named(model):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 700}))
    assert "vocabulary must fit the embedding's 700 rows" in failed(model)["model folder"]


PLANTED = """
def gold_anywhere(prompts, completions, metadata, **columns):
    return [float(m["final_answer"] in c) for m, c in zip(metadata, completions)]
"""


@pytest.mark.parametrize(("reward", "code", "words"), [
    ("gemma_cot.grpo.reward:format_reward", 0, "pays for   format 1"),
    ("gemma_cot.grpo.reward:process_reward", 0, "pays for   steps 1"),
    ("gemma_cot.grpo.reward:outcome_reward", 0, "ok    wrongly pays: 0"),
    ("planted_reward:gold_anywhere", 1, "FAIL  wrongly pays: "),
    ("planted_reward:gold", 2, "gold must be a function in planted_reward - got no such name"),
    ("planted_reward", 2, "must read package.module:function"),
])  # fmt: skip
def test_a_reward_function_is_tested_by_its_name(
    tmp_path, monkeypatch, capsys, reward, code, words
):
    (tmp_path / "planted_reward.py").write_text(PLANTED)
    monkeypatch.syspath_prepend(tmp_path)
    ended, out, err = run_here("gemma_cot.doctor", f"--reward={reward}", capsys=capsys)
    assert ended == code, err
    assert words in (err if code == 2 else out)
    assert len(err.splitlines()) == (1 if code == 2 else 0)


def test_a_folder_without_a_model_is_named(tmp_path):
    assert "config.json" in failed(tmp_path)["model folder"]
