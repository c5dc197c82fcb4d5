"""A small run for the planner: conftest's tiny shape, every axis another size, host devices."""

import jax
import pytest

from gemma_cot.axes import make_mesh
from gemma_cot.config import TrainConfig
from gemma_cot.plan.programs import Setup

SMALL = dict(
    num_generations=2, prompts_per_rollout=8, mini_batch=4, micro_batch=1, max_prompt_tokens=16,
    max_completion_tokens=7, lora_rank=2, sft_batch=8, sft_micro_batches=2, eval_batch=4,
    remat="all",
)  # fmt: skip


@pytest.fixture
def make_setup(cfg):
    """Return f(data=4, model=1, shape, dtype, **changes of SMALL) -> Setup over host devices."""

    def make(data: int = 4, model: int = 1, shape=cfg, dtype="float32", **changes) -> Setup:
        mesh = make_mesh(f"{data}x{model}", jax.devices()[: data * model])
        return Setup(TrainConfig(**SMALL | changes), shape, mesh, dtype, 20)

    return make
