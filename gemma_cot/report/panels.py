"""The curves of a report: which metrics share a panel, and their numbers for readouts.

Drawing is curves.py's. Host only.
"""

from html import escape

from gemma_cot.curves import (
    BLUE,
    GREEN,
    ORANGE,
    Line,
    Panel,
    panel_svg,
    series,
    stages_svg,
    x_range,
)
from gemma_cot.metrics import METRICS
from gemma_cot.report.gather import RunFiles

COLOURS = (BLUE, ORANGE, GREEN, "#cc79a7")  # Okabe-Ito
POINTS = 400  # of a metric that the readout knows
KNOWN_PARTS = ("format", "process", "outcome")


def panels_of(run: RunFiles) -> list[Panel]:
    """Return the panels that have data, in the order of the page."""
    parts = sorted({n for row in run.rows("grpo") for n in row if n.startswith("reward_")})
    parts = [name.removeprefix("reward_") for name in parts if name != "reward_std"]
    own = [name for name in parts if name not in KNOWN_PARTS]

    def panel(title: str, *metrics: tuple[str, str], share: bool = False, stage: str = "grpo"):
        lines = zip(metrics, COLOURS, strict=False)
        return Panel(title, stage, tuple(Line(*m, colour) for m, colour in lines), share)

    wanted = [
        panel("GRPO reward", ("reward", "mean"), ("reward_std", "std within a group")),
        panel(
            "GRPO reward parts (unweighted)",
            *((f"reward_{name}", name) for name in KNOWN_PARTS if name in parts), share=True,
        ),
        *(
            panel("GRPO further rewards (unweighted)",
                  *((f"reward_{name}", name) for name in own[first : first + 4]))
            for first in range(0, len(own), 4)
        ),
        panel("GRPO KL to the reference (nats a token)", ("kl", "KL")),
        panel("GRPO entropy (nats a token)", ("entropy", "entropy")),
        panel("GRPO completion length (tokens)", ("completion_tokens", "mean")),
        panel(
            "GRPO signal, truncation, repetition", ("signal_share", "groups that differ"),
            ("truncated_rate", "cut off"), ("repetition", "repeated"), share=True,
        ),
        panel("GRPO time by phase (seconds an update)", ("seconds_rollout", "rollout"),
              ("seconds_reward", "reward"), ("seconds_update", "update")),
        panel("Memory (GiB, peak so far)", ("memory_gib", "memory")),
        panel("GRPO tokens a second", ("tokens_per_second", "tokens a second")),
        panel("GRPO gradient norm", ("grad_norm", "before clipping")),
        panel("GRPO tokens clipped", ("clip_share", "clipped"), share=True),
        panel("GRPO dynamic sampling (rollouts an update)", ("rollouts", "rollouts")),
        panel("SFT loss (nats a token)", ("loss", "loss"), stage="sft"),
        panel("SFT gradient norm", ("grad_norm", "before clipping"), stage="sft"),
    ]  # fmt: skip
    drawn = (p for p in wanted if any(run.series(line.metric, p.stage) for line in p.lines))
    return list(drawn)


def figures(run: RunFiles) -> str:
    """Return a figure for the evaluations and one for every panel, each with its numbers."""
    parts = []
    if run.stages:
        caption = "Points are rates, whiskers 95 % intervals over rows."
        parts.append(f'<figure class="panel">{stages_svg(run.stages)}'
                     f"<figcaption>{caption}</figcaption></figure>")  # fmt: skip
    for number, panel in enumerate(panels_of(run)):
        svg = panel_svg(panel, run.metrics)
        parts.append(
            f'<figure class="panel" tabindex="0" data-panel="{number}" '
            f'aria-label="{escape(panel.title)}; arrow keys read single steps">{svg}'
            f'<output class="readout" aria-live="polite"></output>{_caption(run, panel)}</figure>'
        )
    return "".join(parts)


def readouts(run: RunFiles) -> list[dict]:
    """Return, panel by panel, what the page needs to read values out under the pointer."""
    found = []
    for panel in panels_of(run):
        values = {
            line.label: series(run.metrics, panel.stage, line.metric) for line in panel.lines
        }
        steps = [step for points in values.values() for step, _ in points]
        found.append(
            {
                "range": x_range(steps),
                "lines": {label: _thin(points) for label, points in values.items() if points},
            }
        )
    return found


def _thin(points: list[tuple[int, float]]) -> list[list[float]]:
    """Return at most about POINTS [step, value] pairs, values to four digits, the last included."""
    every = -(-len(points) // POINTS)
    thin = points[::every] + (points[-1:] if (len(points) - 1) % every else [])
    return [[step, float(f"{value:.4g}")] for step, value in thin]


def _caption(run: RunFiles, panel: Panel) -> str:
    """Return what the lines mean, and a table of their first, last, least and largest values."""
    meanings, rows = [], []
    for line in panel.lines:
        points = series(run.metrics, panel.stage, line.metric)
        if line.metric in METRICS:
            meanings.append(f"<b>{escape(line.label)}</b>: {escape(METRICS[line.metric])}")
        if points:
            values = [value for _, value in points]
            cells = (values[0], values[-1], min(values), max(values))
            shown = "".join(f"<td>{value:.4g}</td>" for value in cells)
            rows.append(f'<tr><th scope="row">{escape(line.label)}</th>{shown}</tr>')
    words = ("", "first", "last", "least", "most")
    head = "".join(f'<th scope="col">{word}</th>' for word in words)
    return (
        f"<figcaption><details><summary>meaning and numbers</summary><p>{'<br>'.join(meanings)}</p>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
        "</figcaption>"
    )
