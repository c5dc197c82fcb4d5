"""Two ways to treat rows over a length limit in SFT: leave them out, or cut them.

    python experiments/discard.py        # about 2 minutes on 2 CPU cores; writes docs/discard.*

The limit is low on purpose, so that many rows are over it. Both ways take the same number of steps
of the same size. How many completions end by themselves is then measured by sampling, with room for
twice the limit. docs/discard_never_truncate.md discusses the numbers.
"""

import dataclasses

from laboratory import (
    begin,
    markdown_table,
    percent,
    publish,
    rates,
    say,
    series,
    sft,
    side_by_side,
)

from gemma_cot.curves import BLUE, ORANGE, Line, Panel
from gemma_cot.data import Encoded
from gemma_cot.metrics import read_metrics

LIMITS = (60,)  # tokens of a target, its stop token included
ROOM = 144  # tokens that a sampled completion may have
STEPS, EVERY = 150, 50
ROWS = 64  # evaluation rows, one completion each at temperature 1
ARMS = {"discard": "left out", "truncate": "cut"}
PANELS = [
    Panel(f"{title}, limit {limit}", "sft", tuple(
        Line(f"{metric}_{arm}_{limit}", label, colour)
        for (arm, label), colour in zip(ARMS.items(), (BLUE, ORANGE), strict=True)), share=True)
    for limit in LIMITS
    for title, metric in (("Never stop", "truncated_rate"), ("Full format", "full_format_accuracy"))
]  # fmt: skip


def treated(rows: list[Encoded], arm: str, limit: int) -> list[Encoded]:
    """Return the training rows as an arm has them. A cut target has lost its stop token."""
    if arm == "discard":
        return [row for row in rows if len(row.target_ids) <= limit]
    return [dataclasses.replace(row, target_ids=row.target_ids[:limit]) for row in rows]


def measure_arm(arm: str, limit: int) -> dict:
    """Train one arm; return its rates after every EVERY steps, and its loss."""
    run = begin(f"discard-{arm}-{limit}", sft_steps=STEPS, checkpoint_every=EVERY,
                keep_checkpoints=STEPS, max_completion_tokens=ROOM)  # fmt: skip
    run.train = treated(run.train, arm, limit)
    stops = set(run.tokenizer.stop_ids)
    result = {
        "rows": len(run.train),
        "without_stop": sum(row.target_ids[-1] not in stops for row in run.train),
        "after": {},
    }
    adapters = {0: None} | sft(run, tuple(range(EVERY, STEPS, EVERY)))
    for step, lora in adapters.items():
        result["after"][str(step)] = rates(run, lora, run.eval[:ROWS], temperature=1.0)
        never = percent(result["after"][str(step)]["truncated_rate"])
        say(f"limit {limit}, {arm}, {step} steps: {never} never stop")
    return result | {"loss": series(read_metrics(run.out / "metrics.jsonl"), "loss")}


def table(result: dict) -> str:
    """Return the table of the page."""
    names = ("limit", "rows over it", "steps", "never stop", "95 % interval", "full format",
             "mean tokens")  # fmt: skip
    rows = []
    for limit, arms in result["limits"].items():
        for arm, label in ARMS.items():
            for step, rate in arms[arm]["after"].items():
                low, high = rate["truncated_rate_interval"]
                never, whole = rate["truncated_rate"], rate["full_format_accuracy"]
                interval = f"{100 * low:.1f}–{100 * high:.1f}"
                rows.append((limit, label, step, percent(never), interval, percent(whole),
                             f"{rate['tokens']:.1f}"))  # fmt: skip
    return markdown_table(names, rows)


def draw(result: dict) -> str:
    """Return the plot of the page."""
    steps = {}
    for limit, arms in result["limits"].items():
        for arm in ARMS:
            for step, rate in arms[arm]["after"].items():
                row = steps.setdefault(step, {"stage": "sft", "step": int(step)})
                for metric in ("truncated_rate", "full_format_accuracy"):
                    row[f"{metric}_{arm}_{limit}"] = rate[metric]
    shown = [panel for panel in PANELS if panel.title.split()[-1] in result["limits"]]
    return side_by_side(shown, list(steps.values()), "Discard or truncate")


def measure() -> dict:
    """Train all arms."""
    limits = {str(limit): {arm: measure_arm(arm, limit) for arm in ARMS} for limit in LIMITS}
    return {"room": ROOM, "steps": STEPS, "rows": ROWS, "limits": limits}


if __name__ == "__main__":
    publish("discard", "discard_never_truncate", measure, draw, table)
