"""Sparse rewards: GRPO for the outcome alone, with the format, and with the process as well.

    python experiments/three_pillars.py     # 4 minutes on 2 CPU cores; writes docs/three_pillars.*

Three seeds each, all nine runs from the same adapter after a little SFT. docs/three_pillars.md
discusses the numbers.
"""

import numpy as np
from laboratory import (
    SHORT,
    begin,
    grpo,
    markdown_table,
    percent,
    publish,
    say,
    series,
    side_by_side,
    starts,
)

from gemma_cot.curves import BLUE, GREEN, ORANGE, Line, Panel

SFT_STEPS = (0, 200, 300)  # of the same SFT run as in sft_first.py ...
START = 200  # ... and where the nine runs begin
STEPS, SEEDS, LAST = 20, (0, 1, 2), 5
ARMS = {  # name: weights of format, process, outcome
    "outcome": (0.0, 0.0, 1.0),
    "outcome + format": (1.0, 0.0, 1.0),
    "outcome + format + process": (1.0, 1.0, 1.0),
}
METRICS = ("reward_format", "reward_process", "reward_outcome", "signal_share")
TITLES = ("Format reward", "Process reward", "Answer reward", "Groups whose rewards differ")
PANELS = [
    Panel(title, "grpo", tuple(
        Line(f"{metric}_{i}", label, colour) for i, (label, colour) in enumerate(
            zip(("outcome", "+ format", "+ process"), (ORANGE, BLUE, GREEN), strict=True))),
        share=True)
    for title, metric in zip(TITLES, METRICS, strict=True)
]  # fmt: skip


def measure_run(lora, arm: str, seed: int) -> dict:
    """Return the curves of one run."""
    weights = zip(("format_weight", "process_weight", "outcome_weight"), ARMS[arm], strict=True)
    name = f"pillars-{list(ARMS).index(arm)}-{seed}"
    run = begin(name, **SHORT, **dict(weights), sft_steps=0, grpo_steps=STEPS, seed=seed)
    _, lines = grpo(run, lora)
    curves = {metric: series(lines, metric) for metric in METRICS}
    say(f"{arm}, seed {seed}: " + "  ".join(f"{m} {last(c):.3f}" for m, c in curves.items()))
    return curves


def last(values: list[float]) -> float:
    """Return the mean over the last LAST steps."""
    return float(np.mean(values[-LAST:]))


def table(result: dict) -> str:
    """Return the table of the page: means over the last steps, seed by seed, and their mean."""
    names = ("rewards", *(title.lower() for title in TITLES))
    rows = []
    for arm, seeds in result["arms"].items():
        cells = []
        for metric in METRICS:
            ends = [last(curves[metric]) for curves in seeds.values()]
            one_by_one = ", ".join(f"{100 * end:.0f}" for end in ends)
            cells.append(f"{percent(float(np.mean(ends)))} ({one_by_one})")
        rows.append((arm, *cells))
    return "\n".join([markdown_table(names, rows), "", *findings(result)])


def findings(result: dict) -> list[str]:
    """Return, for every two mixtures, whether the seeds of one all end above those of the other."""
    found = []
    for title, metric in zip(TITLES, METRICS, strict=True):
        ends = {arm: [last(curves[metric]) for curves in seeds.values()]
                for arm, seeds in result["arms"].items()}  # fmt: skip
        above = [f"{one} above {other}" for one in ends for other in ends
                 if min(ends[one]) > max(ends[other])]  # fmt: skip
        found.append(f"* {title}, every seed above every seed: {'; '.join(above) or 'none'}.")
    return found


def draw(result: dict) -> str:
    """Return the plot of the page: means over the seeds."""
    rows = [{"stage": "grpo", "step": step} for step in range(1, result["steps"] + 1)]
    for i, seeds in enumerate(result["arms"].values()):
        for metric in METRICS:
            mean = np.mean([curves[metric] for curves in seeds.values()], axis=0)
            for row, value in zip(rows, mean, strict=True):
                row[f"{metric}_{i}"] = round(float(value), 4)
    return side_by_side(PANELS, rows, "Rewards: outcome, format, process")


def measure() -> dict:
    """Run all nine."""
    lora = starts(SHORT, SFT_STEPS)[START]
    arms = {arm: {str(seed): measure_run(lora, arm, seed) for seed in SEEDS} for arm in ARMS}
    return {"steps": STEPS, "start": START, "arms": arms}


if __name__ == "__main__":
    publish("three_pillars", "three_pillars", measure, draw, table)
