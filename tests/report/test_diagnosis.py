"""Each rule speaks where its condition holds, with the numbers, and is silent where it does not."""

import dataclasses

import pytest

from gemma_cot.report.diagnosis import LEVELS, diagnose, ends
from gemma_cot.report.gather import RunFiles, gather


def quiet(steps: int = 60) -> RunFiles:
    """Return a run about which there is nothing to say but where its time went."""
    row = {
        "reward": 1.5, "reward_format": 0.9, "reward_process": 0.4, "reward_outcome": 0.5,
        "kl": 0.01, "entropy": 0.4, "completion_tokens": 80.0, "truncated_rate": 0.0,
        "repetition": 0.01, "signal_share": 0.6, "clip_share": 0.01, "logp_drift_mean": 1e-6,
        "seconds_rollout": 0.5, "seconds_reward": 0.01, "seconds_update": 0.4, "loss": 0.01,
        "grad_norm": 0.2, "decode_useful": 0.9,
    }  # fmt: skip
    rows = [{"stage": "grpo", "step": s} | row for s in range(1, steps + 1)]
    return RunFiles(
        folder=None, config={"grpo_steps": steps, "dtype": "auto"}, metrics=rows,
        summary={"devices": ["TFRT_CPU_0"], "steps": {}}, environment={}, results={}, stages={},
        comparisons={}, traced=[],
    )  # fmt: skip


def changing(run: RunFiles, **metrics) -> RunFiles:
    """Return the run with metrics that go in a line from a first to a last value."""
    last = max(1, len(run.metrics) - 1)
    rows = [
        row | {name: a + (b - a) * i / last for name, (a, b) in metrics.items()}
        for i, row in enumerate(run.metrics)
    ]
    return dataclasses.replace(run, metrics=rows)


def test_a_quiet_run_gets_one_note():
    (only,) = diagnose(quiet())
    assert only.level == "note"
    assert only.text == "GRPO spent its time on: rollout 54.9 %, reward 1.1 %, update 44.0 %."
    assert diagnose(dataclasses.replace(quiet(), metrics=[], summary={}, config={})) == []


@pytest.mark.parametrize(
    ("metrics", "level", "words"),
    [
        ({"signal_share": (0.6, 0.2), "reward_outcome": (0.2, 0.95)}, "watch", "are too easy"),
        ({"signal_share": (0.6, 0.2), "reward_outcome": (0.2, 0.05)}, "watch", "are too hard"),
        ({"signal_share": (0.3, 0.0)}, "alarm", "of groups have signal"),
        ({"kl": (0.01, 0.3)}, "watch", "while the reward did not"),
        ({"kl": (0.3, 0.9)}, "alarm", "the policy has left its reference"),
        ({"truncated_rate": (0.0, 0.2)}, "watch", "were cut off at the length limit"),
        ({"truncated_rate": (0.2, 0.6)}, "alarm", "of completions are cut off"),
        ({"completion_tokens": (80, 30)}, "watch", "Completions went from 78 to 32 tokens"),
        ({"repetition": (0.0, 0.3)}, "watch", "repeat an earlier one"),
        ({"entropy": (0.4, 0.04)}, "watch", "Entropy fell from 0.385 to 0.0553"),
        ({"clip_share": (0.1, 0.4)}, "watch", "were clipped (but for CISPO: unmoved)"),
        ({"logp_drift_mean": (1e-6, 1e-3)}, "watch", "that is no rounding"),
        ({"reward_process": (0.0, 0.0)}, "watch", "The reward process was never earned"),
        ({"reward_format": (0.99, 1.0)}, "note", "The reward format was earned nearly always"),
        ({"none_process": (0.25, 0.25)}, "watch", "did not apply to 25.0 % of completions"),
        ({"seconds_reward": (0.5, 0.5)}, "watch", "devices wait for it"),
        ({"decode_useful": (0.4, 0.3)}, "note", "of decode steps went into completions"),
    ],
)
def test_each_rule_speaks_of_its_metric(metrics, level, words):
    found = diagnose(changing(quiet(), **metrics))
    assert [f for f in found if words in f.text and f.level == level], [f.text for f in found]
    assert [f.level for f in found] == sorted((f.level for f in found), key=LEVELS.index)


def test_rising_kl_with_a_rising_reward_is_no_matter():
    run = changing(quiet(), kl=(0.01, 0.3), reward=(1.0, 2.0))
    assert not [f for f in diagnose(run) if "KL" in f.text]


def test_the_same_alarm_is_told_once_with_its_count():
    run = quiet(200)
    for row in run.metrics:
        row["kl"] = 2.0 if row["step"] % 100 < 30 else 0.0
    (alarm,) = [f for f in diagnose(run) if f.level == "alarm"]
    assert alarm.text.startswith("grpo step 20 (again at step 105): KL is 2 nats a token")


def test_an_alarm_of_another_stage_is_another():
    run = quiet(200)
    run.metrics[0] |= {"kl": 2.0}
    run.metrics[:] = [row | {"skipped": float(row["step"] == 3)} for row in run.metrics]
    run.metrics[:0] = [row | {"stage": "sft"} for row in run.metrics[:5]]
    alarms = [f.text for f in diagnose(run) if f.level == "alarm" and "not finite" in f.text]
    assert [text.partition(":")[0] for text in alarms] == ["sft step 3", "grpo step 3"]


@pytest.mark.parametrize(
    ("gained", "lost", "p_value", "level", "words"),
    [
        (30, 4, 1e-5, "good", "Better. sft -> grpo, answer: 40.0 % to 66.0 %"),
        (4, 30, 1e-5, "alarm", "Worse. sft -> grpo, answer"),
        (9, 7, 0.8, "note", "No difference shown. sft -> grpo, answer"),
    ],
)
def test_a_difference_is_only_claimed_where_it_is_shown(gained, lost, p_value, level, words):
    rates = {"n": 100, "answer_accuracy": 0.4, "answer_accuracy_interval": [0.31, 0.5]}
    after = rates | {"answer_accuracy": 0.66, "answer_accuracy_interval": [0.56, 0.75]}
    test = {"gained": gained, "lost": lost, "p_value": p_value}
    run = dataclasses.replace(
        quiet(), stages={"sft": rates, "grpo": after}, comparisons={"sft -> grpo, answer": test}
    )
    (found,) = [f for f in diagnose(run) if words in f.text]
    assert found.level == level and f"{gained} rows gained, {lost} lost" in found.text


def test_format_up_and_answers_down_and_canaries_are_told_in_the_runs_own_words():
    form = {"gained": 9, "lost": 0, "p_value": 0.01}
    answer = {"gained": 0, "lost": 9, "p_value": 0.01}
    earned = {"grpo": {"honest": {"total": 1.0}, "nothing": {"total": 0.95, "format": 0.95}}}
    run = dataclasses.replace(
        quiet(),
        comparisons={"sft -> grpo, full format": form, "sft -> grpo, answer": answer},
        summary={"canaries": earned, "reward_errors": 3, "devices": []},
    )
    alarms = [f.text for f in diagnose(run) if f.level == "alarm"]
    assert any("format rises while answers fall" in text for text in alarms)
    assert any(text.startswith("the hack 'nothing' earns 0.95") for text in alarms)
    assert any("Rewards raised on 3 rows" in text for text in alarms)


def test_a_reward_that_seldom_fails_to_apply_is_weighed_against_all_steps():
    run = quiet(20)
    rows = [row | {"none_process": 0.5} for row in run.metrics[:5]] + run.metrics[5:]
    texts = [f.text for f in diagnose(dataclasses.replace(run, metrics=rows))]
    # half of 5 steps of 20
    assert "The reward process did not apply to 12.5 % of completions." in texts


def test_a_run_that_was_ended_by_its_clock_says_so():
    run = dataclasses.replace(quiet(), config={"grpo_steps": 100})
    assert any("after 60 of 100 steps: its time was up" in f.text for f in diagnose(run))
    going = dataclasses.replace(run, summary={})
    assert not any("its time was up" in f.text for f in diagnose(going))


def test_ends_are_means_of_tenths():
    assert ends([float(i) for i in range(100)]) == (4.5, 94.5)
    assert ends([3.0]) == (3.0, 3.0)


def test_the_small_run_is_told_as_it_is(small_run):
    texts = [f"{f.level}: {f.text}" for f in diagnose(gather(small_run))]
    assert any(t.startswith("good: Better. base -> sft, answer: 0.0 % to 20.0 %") for t in texts)
    assert any(t.startswith("note: No difference shown. sft -> grpo, full format") for t in texts)
