"""Alarms on runs written down as rows: each begins where it should, is told once, and is silent on
a run that goes well."""

import numpy as np
import pytest

from gemma_cot.alarms import HISTORY, WATCHED, WINDOW, keep_batch, onsets, skipped_in_a_row
from gemma_cot.metrics import KEPT_ROWS, METRICS, MetricsWriter

GOOD = {
    "stage": "grpo", "kl": 0.05, "entropy": 0.3, "completion_tokens": 80.0, "truncated_rate": 0.02,
    "logp_drift_mean": 1e-6, "signal_share": 0.6, "reward_format": 0.95, "reward_outcome": 0.4,
    "skipped": 0.0,
}  # fmt: skip


def run(steps: int, **changes) -> list[dict]:
    """Return rows of GRPO steps 1 to `steps`; changes: metric -> (step from which on, value)."""
    rows = [GOOD | {"step": step} for step in range(1, steps + 1)]
    for name, (first, value) in changes.items():
        for row in rows[first - 1 :]:
            row[name] = value
    return rows


def told(rows: list[dict]) -> list[tuple[int, str]]:
    return [(one["step"], one["alarm"]) for one in onsets(rows)]


def test_a_run_that_goes_well_sets_off_nothing():
    rng = np.random.default_rng(0)
    rows = run(300)
    for i, row in enumerate(rows):  # answers improve, completions grow with them, noise on all
        row["reward_outcome"] = 0.3 + 0.001 * i + rng.normal(0, 0.05)
        row["completion_tokens"] = 60 + 0.4 * i + rng.normal(0, 5)
        row["kl"] = 0.05 + abs(rng.normal(0, 0.05))
    assert told(rows) == []


def test_a_run_keeps_the_rows_that_its_alarms_look_at():
    assert KEPT_ROWS >= HISTORY + WINDOW


@pytest.mark.parametrize(
    ("changes", "step", "words"),
    [
        # from step 41 on; a mean over 20 steps is beyond the limit after as many of them as it says
        (dict(kl=(41, 2.0)), 45, ("KL is 0.54", "raise --beta")),  # (15 x 0.05 + 5 x 2) / 20
        (dict(entropy=(41, 0.0)), 60, ("entropy is 0 ", "raise --temperature")),
        (dict(entropy=(41, 2.2)), 51, ("from 0.3 to 1.3", "falls apart")),
        (dict(truncated_rate=(41, 0.9)), 47, ("33% of completions", "--max_completion_tokens")),
        (dict(logp_drift_mean=(41, 0.9)), 42, ("differ by 0.09", "--dtype=float32")),
        (dict(signal_share=(41, 0.0)), 57, ("9% of groups", "--dynamic_sampling")),
        (dict(completion_tokens=(41, 400.0)), 46, ("80 to 176", "--length_weight")),
        (dict(completion_tokens=(41, 4.0)), 51, ("80 to 38", "pays for less")),
        (dict(filled_groups=(41, 3.0)), 41, ("too few groups with signal", "--pass_rates")),
    ],
)  # fmt: skip
def test_an_alarm_is_told_once_where_it_begins(changes, step, words):
    (first, line), = told(run(120, **changes))
    assert first == step
    assert all(word in line for word in words), line
    assert "\n" not in line


def test_more_format_and_fewer_answers():
    changes = dict(reward_format=(41, 0.95), reward_outcome=(41, 0.08))
    rows = run(40, reward_format=(1, 0.5)) + run(120, **changes)[40:]
    (step, line), = told(rows)
    # 0.5 -> 0.95 is beyond 0.1 after 5 steps, 0.4 -> 0.1 after 7
    assert step == 47 and "format rose to 66%" in line and "fell to 29%" in line
    assert "--format_weight" in line
    better = run(40, reward_format=(1, 0.5)) + run(120, reward_format=(41, 0.95))[40:]
    assert told(better) == []


def test_longer_with_better_answers_is_no_alarm():
    assert told(run(120, completion_tokens=(41, 400.0), reward_outcome=(41, 0.6))) == []


def test_an_alarm_that_comes_back_soon_is_not_told_again_and_later_it_is():
    rows = run(200)
    for step in (10, 12, 30, 90):
        rows[step - 1]["skipped"] = 1.0
    assert [step for step, _ in told(rows)] == [10, 90]  # 12 and 30 are at most WINDOW after one
    assert "update 10 is not finite" in told(rows)[0][1]


@pytest.mark.parametrize("step", [45, 46, 90, 119])
def test_the_last_rows_tell_what_the_whole_run_tells(step):
    """What is printed while training is what summary.json lists in the end."""
    rows = run(120, kl=(41, 2.0))
    rows[89]["skipped"] = 1.0
    kept = rows[:step][-(HISTORY + WINDOW + 1) :]
    sft = [{"stage": "sft", "step": n, "loss": 1.0, "skipped": 0.0} for n in range(1, 30)]
    live = [one["step"] for one in onsets(sft + kept, last_only=True)]
    assert live == [s for s, _ in told(rows) if s == step] == ([step] if step in (45, 90) else [])


def test_a_long_history_is_compared_with_what_it_was_200_steps_ago():
    slow = run(600)
    for i, row in enumerate(slow):  # doubles in 400 steps: never within HISTORY
        row["completion_tokens"] = 80 * 2 ** (i / 400)
    assert told(slow) == []


def test_numbers_that_are_missing_set_off_nothing():
    rows = run(60, reward_outcome=(30, None), kl=(30, None), entropy=(1, None))
    assert told(rows) == []
    assert told([{"stage": "sft", "step": n, "loss": None} for n in range(1, 60)]) == []


def test_skipped_updates_are_counted_from_the_end():
    rows = run(6)
    assert skipped_in_a_row(rows) == 0
    for step in (2, 4, 5, 6):
        rows[step - 1]["skipped"] = 1.0
    assert skipped_in_a_row(rows) == 3 and skipped_in_a_row(rows[:3]) == 0
    assert skipped_in_a_row(rows[3:]) == 3 and skipped_in_a_row([]) == 0


def test_a_resumed_run_still_knows_which_updates_were_skipped(tmp_path):
    with MetricsWriter(tmp_path) as writer:
        for step, skipped in enumerate((1, 0, 1, 1), 1):
            writer.write("grpo", step, {"skipped": skipped})
    with MetricsWriter(tmp_path) as resumed:
        assert skipped_in_a_row(list(resumed.rows)) == 2
        resumed.write("grpo", 5, {"skipped": 1})
        assert skipped_in_a_row(list(resumed.rows)) == 3


def test_a_kept_batch_reads_back(tmp_path):
    batch = {"tokens_BT": np.arange(6, dtype=np.int32).reshape(1, 2, 3),
             "advantage_B": np.array([[np.nan, 1]], np.float32)}  # fmt: skip
    keep_batch(tmp_path / "bad" / "grpo-7.npz", batch)
    with np.load(tmp_path / "bad" / "grpo-7.npz") as back:
        assert set(back) == set(batch)
        for name, value in batch.items():
            np.testing.assert_array_equal(back[name], value)


def test_every_watched_metric_is_in_the_glossary():
    assert {*WATCHED, "skipped", "filled_groups"} <= METRICS.keys()
