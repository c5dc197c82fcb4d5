"""GRPO from the base model and after some SFT: the same 30 steps from three beginnings.

    python experiments/sft_first.py      # about 3 minutes on 2 CPU cores; writes docs/sft_first.*

docs/sft_first.md discusses the numbers.
"""

from laboratory import (
    SHORT,
    begin,
    grpo,
    markdown_table,
    percent,
    publish,
    rates,
    say,
    series,
    side_by_side,
    starts,
)  # fmt: skip

from gemma_cot.curves import BLUE, GREEN, ORANGE, Line, Panel

SFT_STEPS = (0, 200, 300)  # of one SFT run of 300 steps
STEPS = 30
ROWS = 64  # evaluation rows, greedy
COLOURS = (ORANGE, BLUE, GREEN)
PANELS = [
    Panel(title, "grpo", tuple(
        Line(f"{metric}_{steps}", f"{steps} SFT steps" if steps else "base", colour)
        for steps, colour in zip(SFT_STEPS, COLOURS, strict=True)), share=True)
    for title, metric in (("Format reward", "reward_format"), ("Answer reward", "reward_outcome"),
                          ("Groups whose rewards differ", "signal_share"))
]  # fmt: skip
METRICS = ("reward_format", "reward_outcome", "reward_process", "signal_share", "grad_norm")


def measure_start(steps: int, lora) -> dict:
    """Return the curves of GRPO from an adapter, None: from the base model; rates at both ends."""
    run = begin(f"sft_first-{steps}", **SHORT, sft_steps=0, grpo_steps=STEPS)
    before = rates(run, lora, run.eval[:ROWS])
    after, lines = grpo(run, lora)
    result = {"before": before, "after": rates(run, after, run.eval[:ROWS])}
    say(f"{steps} SFT steps: {before} -> {result['after']}")
    return result | {"curves": {metric: series(lines, metric) for metric in METRICS}}


def table(result: dict) -> str:
    """Return the table of the page."""
    names = ("SFT steps", "groups with signal, first 5 steps", "full format: before → after GRPO",
             "answers right: before → after GRPO")  # fmt: skip
    rows = []
    for steps, start in result["starts"].items():
        signal = sum(start["curves"]["signal_share"][:5]) / 5
        cells = [f"{percent(start['before'][name])} → {percent(start['after'][name])}"
                 for name in ("full_format_accuracy", "answer_accuracy")]  # fmt: skip
        rows.append((steps, percent(signal), *cells))
    return "\n".join([markdown_table(names, rows), "", *findings(result)])


def findings(result: dict) -> list[str]:
    """Return a line of what happened from each beginning."""
    found = []
    for steps, start in result["starts"].items():
        signal, slope = start["curves"]["signal_share"], max(start["curves"]["grad_norm"])
        named = "The base model" if steps == "0" else f"{steps} SFT steps"
        found.append(
            f"* {named}: {sum(share > 0 for share in signal)} of {len(signal)} steps had a group "
            f"whose rewards differ; the largest gradient norm was {slope:.3g}."
        )
    return found


def draw(result: dict) -> str:
    """Return the plot of the page."""
    rows = [{"stage": "grpo", "step": step} for step in range(1, result["steps"] + 1)]
    for steps, start in result["starts"].items():
        for metric, values in start["curves"].items():
            for row, value in zip(rows, values, strict=True):
                row[f"{metric}_{steps}"] = value
    return side_by_side(PANELS, rows, "GRPO from the base model and after SFT")


def measure() -> dict:
    """Run GRPO from every beginning."""
    adapters = starts(SHORT, SFT_STEPS)
    measured = {str(steps): measure_start(steps, lora) for steps, lora in adapters.items()}
    return {"steps": STEPS, "rows": ROWS, "starts": measured}


if __name__ == "__main__":
    publish("sft_first", "sft_first", measure, draw, table)
