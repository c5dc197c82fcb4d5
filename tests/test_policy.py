"""The part of a run that travels beside its weights."""

import dataclasses
import json
from types import SimpleNamespace

import jax
import pytest
from absl import flags
from small_runs import MODEL, write_model

from gemma_cot.config import TrainConfig
from gemma_cot.lora import init_lora, save_peft
from gemma_cot.policy import RECIPE, check_positions, load_policy, read_recipe, write_recipe


def test_a_recipe_comes_back_and_an_unknown_key_is_not_read(tmp_path):
    default = {"instruction": "", "max_prompt_tokens": 256, "max_completion_tokens": 512}
    assert read_recipe("", str(tmp_path)) == default
    write_recipe(tmp_path, TrainConfig(instruction="Think.", max_prompt_tokens=7))
    path = tmp_path / RECIPE
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    expected = default | {"instruction": "Think.", "max_prompt_tokens": 7}
    assert read_recipe(str(tmp_path)) == expected


def test_a_recipe_of_another_type_is_refused(tmp_path):
    (tmp_path / RECIPE).write_text('{"max_prompt_tokens": "64"}')
    with pytest.raises(ValueError, match="gemma_cot.json: max_prompt_tokens must be int, got '64'"):
        read_recipe(str(tmp_path))


def test_the_recipe_of_an_adapter_goes_before_its_models(tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    write_model(model)
    save_peft(adapter, MODEL, init_lora(jax.random.key(1), MODEL, 2, 4.0), None)
    for folder, longest in ((model, 7), (adapter, 9)):
        cfg = TrainConfig(instruction=folder.name, max_prompt_tokens=longest)
        write_recipe(folder, cfg)
    values = flags.FlagValues()
    for name in ("instruction", "max_prompt_tokens", "max_completion_tokens"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    for name, value in {"model": str(model), "adapter": str(adapter), "attention": "reference",
                        "dtype": "float32", "mesh": "auto"}.items():  # fmt: skip
        flags.DEFINE_string(name, value, "", flag_values=values)
    values(["load"])
    policy = load_policy(values)
    assert (policy.instruction, policy.max_prompt_tokens) == ("adapter", 9)
    assert policy.max_completion_tokens == 512 and policy.lora.rank == 2


def test_the_folder_of_a_run_is_no_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(TrainConfig())))
    values = SimpleNamespace(model=str(tmp_path), adapter="")
    with pytest.raises(ValueError, match=f"--model: .* that of a run; set --model={tmp_path}/merg"):
        load_policy(values)


def test_a_sample_may_fill_the_positions_and_no_more():
    cfg = dataclasses.replace(MODEL, max_positions=32)
    check_positions(cfg, 20, 12)
    with pytest.raises(ValueError, match="must fit the model's 32 positions, got 33; lower it"):
        check_positions(cfg, 20, 13)
