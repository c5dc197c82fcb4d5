"""The part of a run that travels beside its weights."""

import json

import pytest

from gemma_cot.config import TrainConfig
from gemma_cot.policy import RECIPE, read_recipe, write_recipe


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
