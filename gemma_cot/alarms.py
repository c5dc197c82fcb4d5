"""What goes wrong while training, in plain words: alarms on the metrics, and skipped updates.

An alarm is a condition on the latest rows of metrics.jsonl and says what to try; it is told when
it begins, and again only after WINDOW steps without it. Called by train; knows no model.
"""

from pathlib import Path

import numpy as np

WINDOW = 20  # steps: one noisy step is no alarm, twenty are minutes
HISTORY = 200  # steps: what has doubled or crossed since then is a trend
KL_HIGH = 0.5  # nats a token: over a hundred tokens the policy shares nothing with its reference
ENTROPY_LOW = 0.005  # nats a token: a group's completions are then nearly always the same text
ENTROPY_GROWTH = 1.0  # nats a token more than HISTORY steps ago: the policy falls apart
LENGTH_GROWTH = 2.0  # times: longer without better answers is padding, half as long is giving up
TRUNCATED_HIGH = 0.3  # of completions: cut off before the answer, they are punished for length only
DIVERGENCE = 0.1  # more format and fewer answers: of completions, far above the noise of WINDOW
GAIN = 0.02  # of completions: fewer further answers than this are none
DRIFT_HIGH = 0.05  # nats a token, mean: a quarter of what the ratio is clipped at, without learning
SIGNAL_LOW = 0.1  # of groups: nine tenths of the sampling teach nothing


def onsets(rows: list[dict], last_only: bool = False) -> list[dict]:
    """Return {"stage", "step", "alarm"} for every alarm that begins in `rows`, of metrics.jsonl.

    last_only: only those that begin at the last row, for which the latest HISTORY + WINDOW do.
    """
    found = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        own = [row for row in rows if row["stage"] == stage]
        quiet: dict[str, int] = {}  # alarm -> the row at which it was last on
        first = max(0, len(own) - WINDOW - 1) if last_only else 0
        for i in range(first, len(own)):
            on = conditions(own[max(0, i + 1 - HISTORY) : i + 1])
            found += [
                {"stage": stage, "step": own[i]["step"], "alarm": line}
                for name, line in on.items()
                if i - quiet.get(name, -WINDOW - 1) > WINDOW
            ]
            quiet |= dict.fromkeys(on, i)
    if last_only and rows:
        here = (rows[-1]["stage"], rows[-1]["step"])
        found = [one for one in found if (one["stage"], one["step"]) == here]
    return found


def conditions(rows: list[dict]) -> dict[str, str]:
    """Return name -> line of every alarm that is on at the last of these rows of one stage."""
    last, on = rows[-1], {}
    if last.get("skipped"):
        on["skipped"] = (
            f"loss or gradient of update {last['step']} is not finite: it is skipped, its batch is "
            "in bad/; should it happen again, lower the learning rate and look at the rewards"
        )
    if last.get("filled_groups"):
        on["filled"] = (
            "dynamic sampling found too few groups with signal in its rollouts and filled up with "
            "others: sort out rows that are always or never answered (prepare --pass_rates), or "
            "raise --num_generations"
        )
    if len(rows) < WINDOW:
        return on
    now = {name: _mean(rows[-WINDOW:], name) for name in WATCHED}
    on |= {name: line.format(now[name]) for name, (limit, line) in HIGH.items()
           if now[name] > limit} | {name: line.format(now[name])
           for name, (limit, line) in LOW.items() if now[name] < limit}  # fmt: skip
    if len(rows) >= 2 * WINDOW:
        on |= _trends({name: _mean(rows[:WINDOW], name) for name in WATCHED}, now)
    return on


# Metric -> limit of its mean over WINDOW steps, and what to say beyond it.
HIGH = {
    "kl": (KL_HIGH, "KL is {:.2g} nats a token: the policy has left its reference; raise --beta or "
           "lower --learning_rate"),
    "truncated_rate": (TRUNCATED_HIGH, "{:.0%} of completions are cut off: raise "
                       "--max_completion_tokens, or set --length_weight"),
    "logp_drift_mean": (DRIFT_HIGH, "sampler and trainer differ by {:.2g} nats a token: set "
                        "--dtype=float32 or the reference kernels, and run doctor"),
}  # fmt: skip
LOW = {
    "entropy": (ENTROPY_LOW, "entropy is {:.2g} nats a token: completions of a group are all "
                "alike; raise --temperature or --epsilon_high, lower --learning_rate"),
    "signal_share": (SIGNAL_LOW, "{:.0%} of groups have signal: set --dynamic_sampling, raise "
                     "--num_generations, or sort out rows that are always or never answered "
                     "(prepare --pass_rates)"),
}  # fmt: skip
WATCHED = (*HIGH, *LOW, "completion_tokens", "reward_format", "reward_outcome")


def _trends(then: dict[str, float], now: dict[str, float]) -> dict[str, str]:
    """Return the alarms on what changed between two windows of a stage."""
    on, better = {}, now["reward_outcome"] - then["reward_outcome"]
    length = f"completions went from {then['completion_tokens']:.0f} to "
    length += f"{now['completion_tokens']:.0f} tokens"
    if now["entropy"] > then["entropy"] + ENTROPY_GROWTH:
        on["entropy_growth"] = (
            f"entropy went from {then['entropy']:.2g} to {now['entropy']:.2g} nats a token: the "
            "policy falls apart; lower --learning_rate or raise --beta"
        )
    if now["completion_tokens"] > LENGTH_GROWTH * then["completion_tokens"] and better < GAIN:
        on["longer"] = f"{length} without better answers: set --length_weight or dr_grpo"
    if now["completion_tokens"] * LENGTH_GROWTH < then["completion_tokens"] and better < GAIN:
        on["shorter"] = (
            f"{length} without better answers: a reward pays for less; raise --process_weight or "
            "test your rewards (doctor --reward)"
        )
    if now["reward_format"] - then["reward_format"] > DIVERGENCE and better < -DIVERGENCE:
        on["divergence"] = (
            f"format rose to {now['reward_format']:.0%} while right answers fell to "
            f"{now['reward_outcome']:.0%}: the form is learnt instead of the task; lower "
            "--format_weight or raise --outcome_weight"
        )
    return on


def _mean(rows: list[dict], name: str) -> float:
    """Return the mean of what there is of a metric; NaN, which no alarm is beyond, of nothing."""
    values = [row[name] for row in rows if row.get(name) is not None]
    return sum(values) / len(values) if values else float("nan")


def skipped_in_a_row(rows: list[dict]) -> int:
    """Return how many updates were skipped up to the last row."""
    kept = [i for i, row in enumerate(rows) if not row.get("skipped")]
    return len(rows) - 1 - max(kept, default=-1)


def keep_batch(path: Path, batch: dict[str, np.ndarray]) -> None:
    """Write the host arrays of a batch that gave no finite update, for inspection (np.load)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **batch)
