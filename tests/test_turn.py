"""What a turn asks of the sampler: noise, first adapter, stop tokens and slots."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from gemma_cot import turn
from gemma_cot.config import TrainConfig
from gemma_cot.data import Encoded, Example

ROWS = [Encoded(Example(number, "math", "p", "c", {}, {}), [2, number], [1]) for number in (1, 2)]


def stub(**settings) -> SimpleNamespace:
    """Return a run of two rows without a model."""
    return SimpleNamespace(
        cfg=TrainConfig(**settings), params=None, model_cfg=None, width=2, mesh=None, train=ROWS,
        tokenizer=SimpleNamespace(stop_ids=(1, 5, 106), end_of_turn=106),
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """asked(run, number) -> what a rollout asks of the sampler, its key as numbers."""

    def sample(params, cfg, lora, prompts, width, key, mesh, **rest):
        return rest | {"key": jax.random.key_data(key).tolist()}

    monkeypatch.setattr(turn, "sample_prompts", sample)
    return lambda run, number: turn.roll_out(run, None, ROWS, number)


def test_every_rollout_has_noise_of_its_own_and_the_same_when_made_again(asked):
    def noise(number: int, seed: int = 0) -> list[int]:
        return asked(stub(seed=seed), number)["key"]

    assert noise(0) == noise(0)
    keys = [noise(0), noise(1), noise(2), noise(0, seed=1), noise(1, seed=1)]
    assert len(set(map(tuple, keys))) == 5


def test_a_rollout_is_sampled_as_the_settings_say(asked):
    told = asked(stub(rollout_slots=6, temperature=0.7, num_generations=3,
                      max_completion_tokens=9), 0)  # fmt: skip
    assert told["stop_ids"] == (1, 5, 106)
    assert (told["slots"], told["temperature"], told["num_completions"]) == (6, 0.7, 3)
    assert told["max_new_tokens"] == 9


def test_the_first_adapter_is_drawn_from_the_seed(cfg):
    def drawn(seed: int) -> np.ndarray:
        run = stub(seed=seed, lora_rank=2)
        run = SimpleNamespace(**vars(run) | {"model_cfg": cfg, "place": lambda tree: tree})
        return np.asarray(turn.first_adapter(run).layers["q"]["a"])

    np.testing.assert_array_equal(drawn(3), drawn(3))
    assert np.any(drawn(3) != drawn(4))
