"""Seconds of an iteration and iterations of a session, from seconds that are powers of ten."""

import math
from types import SimpleNamespace

import pytest

from gemma_cot.config import TrainConfig
from gemma_cot.plan.__main__ import session_hours
from gemma_cot.plan.clock import KEPT_BACK, iteration, iterations_in_session

SECONDS = {"prefill": 1.0, "decode": 10.0, "reference_logprobs": 100.0, "update": 1e3, "sft": 1e4,
           "evaluate": 1e5}  # fmt: skip


def test_an_iteration_decodes_once_scores_each_batch_and_passes_over_it_several_times(make_setup):
    # 8 prompts are 2 mini-batches; each has log-probs of the old policy and of the reference
    twice = dict(num_iterations=2, beta=0.1)
    assert iteration(make_setup(**twice), SECONDS) == 10 + 2 * (2 * 100 + 2 * 1000)
    assert iteration(make_setup(**twice | {"beta": 0.0}), SECONDS) == 10 + 2 * (100 + 2 * 1000)
    # one update of a rollout asks for no old policy
    once = dict(prompts_per_rollout=4, num_iterations=1)
    assert iteration(make_setup(beta=0.1, **once), SECONDS) == 10 + 100 + 1000
    assert iteration(make_setup(beta=0.0, **once), SECONDS) == 10 + 1000


@pytest.mark.parametrize(("sft", "grpo", "evaluations"), [(3, 9, 3), (0, 9, 2), (3, 0, 2)])
def test_a_session_also_compiles_trains_sft_and_evaluates(make_setup, sft, grpo, evaluations):
    setup = make_setup(num_iterations=2, beta=0.0, sft_steps=sft, grpo_steps=grpo)
    assert setup.eval_size[1] == 2, "calls of an evaluation"
    before = 7.0 + sft * 1e4 + evaluations * 2 * 1e5 + KEPT_BACK
    session = before + 3 * iteration(setup, SECONDS)
    assert iterations_in_session(setup, SECONDS, 7.0, session) == 3
    assert iterations_in_session(setup, SECONDS, 7.0, session - 1) == 2
    assert iterations_in_session(setup, SECONDS, 7.0, before - 1e6) == 0


def test_a_session_has_a_number_of_hours():
    ten_minutes = TrainConfig(session="10m")
    for given, cfg, hours in ((3.0, ten_minutes, 3.0), (None, ten_minutes, 1 / 6),
                              (None, TrainConfig(), 9.0)):  # fmt: skip
        assert session_hours(cfg, SimpleNamespace(session_hours=given)) == pytest.approx(hours)
    for given in (math.nan, math.inf):
        with pytest.raises(ValueError, match=f"^--session_hours: .*, got {given}; set 9"):
            session_hours(ten_minutes, SimpleNamespace(session_hours=given))
