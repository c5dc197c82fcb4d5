"""GRPO with dynamic sampling on a model of one layer: nothing compiles after the first updates, a
stopped run goes on to the same numbers, an update that is not finite is left out and kept."""

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import numbers, write_model, write_rows

from gemma_cot.cli import COMPILED
from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.grpo.reward import RewardError
from gemma_cot.metrics import MetricsWriter
from gemma_cot.replay import open_replay, replay
from gemma_cot.run import open_run, prepare
from gemma_cot.traces import read_trace
from gemma_cot.train import train_grpo
from gemma_cot.turn import first_adapter

BLOWN = 4  # the rollout, from 0, in which a reward is beyond float32

USER_REWARD = f"""
from pathlib import Path

compiled, seen, fail_at, metrics = [], [], None, None

def sixth(prompts, completions, **columns):
    number = len(seen)
    lines = Path(metrics).read_text().count(chr(10)) if Path(metrics).exists() else 0
    seen.append((len(compiled), lines))
    if number == fail_at:
        raise RuntimeError("reward broke on purpose")
    scores = [float(len(text) % 6 == 0) for text in completions]
    return [1e39] + scores[1:] if number == {BLOWN} else scores
"""


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """The module of a reward that differs within about half of all groups; it notes, at every
    rollout, how much has been compiled and logged by then."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "sixth_reward.py").write_text(USER_REWARD)
    sys.path.insert(0, str(folder))
    import sixth_reward

    def listen(event: str, seconds: float, **_) -> None:
        if event == COMPILED:
            sixth_reward.compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield sixth_reward
    jax.monitoring.unregister_event_duration_listener(listen)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def cfg(tmp_path_factory, user) -> TrainConfig:
    """Eight updates of four groups of 4 from rollouts of four, each saved."""
    folder = tmp_path_factory.mktemp("data")
    write_model(folder / "model")
    write_rows(folder)
    return TrainConfig(
        **PRESETS["tiny"]
        | dict(
            model=str(folder / "model"),
            train_data=str(folder / "train.jsonl"), eval_data=str(folder / "eval.jsonl"),
            output_dir=str(tmp_path_factory.mktemp("out") / "whole"), max_completion_tokens=40,
            lora_rank=4, sft_steps=0, grpo_steps=8, num_generations=4, prompts_per_rollout=4,
            mini_batch=4, micro_batch=2, checkpoint_every=1, sample_every=0, trace_every=1,
            dynamic_sampling=True, reward=("sixth_reward:sixth=1",),
        )
    )  # fmt: skip


def train(cfg: TrainConfig, user) -> dict:
    """Run GRPO alone; return the adapter's arrays by name."""
    user.metrics = f"{cfg.output_dir}/metrics.jsonl"
    run = prepare(cfg)
    open_run(run)
    try:
        with jax.set_mesh(run.mesh), MetricsWriter(run.out) as writer:
            lora, _ = train_grpo(run, writer, first_adapter(run), None)
    finally:
        run.settle()
    flat = jax.tree_util.tree_leaves_with_path(jax.device_get(lora))
    return {jax.tree_util.keystr(path): leaf for path, leaf in flat}


@pytest.fixture(scope="module")
def whole(cfg, user) -> tuple[dict, list[dict], list[tuple]]:
    """(adapter, metrics, what the reward saw) of a run that was never interrupted."""
    user.seen.clear()
    adapter = train(cfg, user)
    return adapter, numbers(cfg.output_dir), list(user.seen)


def test_nothing_is_compiled_after_the_first_updates(whole):
    """Not a program and not a single operation, whatever the number of rollouts and groups."""
    _, rows, seen = whole
    turns = sorted({lines for _, lines in seen if lines})
    settled = [compiled for compiled, lines in seen if lines >= turns[1]]
    assert len(settled) >= 4 and set(settled) == {settled[0]}
    assert len({row["rollouts"] for row in rows}) > 1
    assert len({row["reserve_groups"] for row in rows}) > 1


def test_metrics_of_dynamic_sampling(whole):
    _, rows, seen = whole
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert all(0 <= row["wasted_tokens"] < 1 and row["filled_groups"] == 0 for row in rows)
    for row in rows:
        assert (row["wasted_tokens"] == 0) == (row["signal_share"] == 1)
        assert row["logp_drift_max"] < 1e-4  # pi_old is that of the policy that sampled, float32
    # A group that waited for an update was sampled by an earlier policy: ratios are not 1 there.
    waited = [b for a, b in zip(rows, rows[1:], strict=False) if a["reserve_groups"]
              and not a["skipped"]]  # fmt: skip
    assert waited and all(abs(row["ratio_max"] - 1) > 1e-4 for row in waited)


def test_an_update_that_is_not_finite_is_skipped_told_and_kept(whole, cfg, user, capsys):
    _, rows, seen = whole
    skipped = [row["step"] for row in rows if row["skipped"]]
    assert len(skipped) == 1 and rows[skipped[0] - 1]["loss"] is None
    path = Path(cfg.output_dir) / "bad" / f"grpo-{skipped[0]}.npz"
    with np.load(path) as kept:
        assert np.isnan(kept["advantage_B"]).any() and not np.isnan(kept["logp_old_BT"]).any()
    assert [row["loss"] is None for row in rows].count(True) == 1  # the others go on
    strict = dataclasses.replace(
        cfg, output_dir=cfg.output_dir.replace("whole", "strict"), max_skipped=0
    )
    user.seen.clear()
    with pytest.raises(ValueError, match="--max_skipped: at most 0 updates in a row .* got 1; .*"
                                         f"bad/grpo-{skipped[0]}.npz"):  # fmt: skip
        train(strict, user)
    assert f"ALARM: grpo step {skipped[0]}: loss or gradient" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_numbers(whole, cfg, user):
    adapter, rows, seen = whole
    # Stop at the second rollout of a turn, with groups that wait in the checkpoint before it.
    stop = next(
        n for n in range(len(seen) - 1, BLOWN + 1, -1)
        if seen[n][1] == seen[n - 1][1] and rows[seen[n][1] - 1]["reserve_groups"]
    )  # fmt: skip
    cfg = dataclasses.replace(cfg, output_dir=cfg.output_dir.replace("whole", "broken"))
    user.seen.clear()
    user.fail_at = stop
    with pytest.raises(RewardError, match="reward broke on purpose"):
        train(cfg, user)
    user.fail_at = None
    assert len(numbers(cfg.output_dir)) == seen[stop][1] < 8
    again = train(dataclasses.replace(cfg, resume=True), user)
    assert numbers(cfg.output_dir) == rows
    assert adapter.keys() == again.keys()
    for name, value in adapter.items():
        np.testing.assert_array_equal(value, again[name])
    # A trace tells of a group that waited where it was sampled, and its scores, also when resumed.
    traces = {step: read_trace(cfg.output_dir, step) for step in range(1, 9)}
    assert any(len({g["sampled_in"] for g in trace["groups"]}) > 1 for trace in traces.values())
    for step, trace in traces.items():
        assert trace == read_trace(cfg.output_dir.replace("broken", "whole"), step)
        assert all(set(c["scores"]) == {"format", "process", "outcome", "sixth"}
                   for g in trace["groups"] for c in g["completions"])  # fmt: skip


def test_a_step_with_groups_that_waited_is_made_again(whole, cfg, user):
    sampled_in = {
        step: {group["sampled_in"] for group in read_trace(cfg.output_dir, step)["groups"]}
        for step in range(1, 9)
    }
    step = max(step for step, numbers in sampled_in.items() if len(numbers) > 1)
    user.seen.clear()
    run = open_replay(cfg.output_dir, cfg.mesh)
    with jax.set_mesh(run.mesh):
        assert replay(run, step) == read_trace(cfg.output_dir, step)
