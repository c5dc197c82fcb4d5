"""Draw the curves of a run as one self-contained SVG: plain string building, no plotting library.

Six small panels from metrics.jsonl and the `stages` of summary.json: SFT loss, GRPO reward parts,
KL, completion length, shares, and the accuracies of base, SFT and GRPO with their 95 % intervals.
Called by train; report places the panels one by one. Host only; knows no model and no flag.
"""

import math
from dataclasses import dataclass
from html import escape
from pathlib import Path

from gemma_cot.metrics import read_metrics

COLUMNS, PANEL_WIDTH, PANEL_HEIGHT = 3, 400, 290
LEFT, RIGHT, TOP, BOTTOM = 56, 18, 62, 44  # margins of a panel, around its plot
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # Okabe-Ito: told apart by every eye
X_TITLE = "step (pale: each step, strong: moving mean)"
STAGES = ("base", "sft", "grpo")
MAX_POINTS = 600  # of a drawn line; a plot is 326 units wide


@dataclass(frozen=True)
class Line:
    """One metric of a panel."""

    metric: str  # its name in metrics.jsonl or in a stage of summary.json
    label: str  # its name in the legend
    colour: str


@dataclass(frozen=True)
class Panel:
    """One plot over the steps of a stage."""

    title: str
    stage: str
    lines: tuple[Line, ...]
    share: bool = False  # the y axis is 0 to 100 %


PANELS = (
    Panel("SFT loss (nats a token)", "sft", (Line("loss", "loss", BLUE),)),
    Panel(
        "GRPO reward parts (unweighted)",
        "grpo",
        (
            Line("reward_format", "format", BLUE),
            Line("reward_process", "process", ORANGE),
            Line("reward_outcome", "outcome", GREEN),
        ),
        share=True,
    ),
    Panel("GRPO KL to the reference (nats a token)", "grpo", (Line("kl", "KL", BLUE),)),
    Panel(
        "GRPO completion length (tokens)",
        "grpo",
        (Line("completion_tokens", "mean completion tokens", BLUE),),
    ),
    Panel(
        "GRPO signal and truncation",
        "grpo",
        (
            Line("signal_share", "groups whose rewards differ", BLUE),
            Line("truncated_rate", "truncated completions", ORANGE),
        ),
        share=True,
    ),
)
STAGE_TITLE = "Evaluation of each stage (95 % interval)"
STAGE_LINES = (
    Line("full_format_accuracy", "full format", BLUE),
    Line("answer_accuracy", "answer", GREEN),
    Line("process_score", "process", ORANGE),
)


@dataclass(frozen=True)
class Axes:
    """Where data land in a panel: x from x0 to x1 and y from y0 to y1 fill the plot."""

    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        """Return the horizontal position of a data value in panel units."""
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (PANEL_WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return the vertical position of a data value in panel units, downwards."""
        return (
            PANEL_HEIGHT
            - BOTTOM
            - (value - self.y0) / (self.y1 - self.y0) * (PANEL_HEIGHT - TOP - BOTTOM)
        )


def draw_curves(metrics_path: str | Path, summary: dict | None, out_path: str | Path) -> None:
    """Write the SVG of a run from its metrics.jsonl and, when there is one, its summary.

    A panel without data says so. Raises ValueError when a line of metrics.jsonl is broken.
    """
    Path(out_path).write_text(curves_svg(read_metrics(metrics_path), summary), encoding="utf-8")


def curves_svg(rows: list[dict], summary: dict | None) -> str:
    """Return the SVG of the rows of metrics.jsonl and of `summary["stages"]`, ready to inline."""
    panels = [_step_panel(panel, rows) for panel in PANELS]
    panels.append(_stage_panel((summary or {}).get("stages") or {}))
    width = COLUMNS * PANEL_WIDTH
    height = math.ceil(len(panels) / COLUMNS) * PANEL_HEIGHT
    placed = [
        f'<g transform="translate({i % COLUMNS * PANEL_WIDTH} {i // COLUMNS * PANEL_HEIGHT})">'
        f"{panel}</g>"
        for i, panel in enumerate(panels)
    ]
    return _svg("\n".join(placed), width, height, "Curves of a training run")


def panel_svg(panel: Panel, rows: list[dict]) -> str:
    """Return an SVG of one panel alone, with the lines drawn from `x_range` of its steps."""
    return _svg(_step_panel(panel, rows), PANEL_WIDTH, PANEL_HEIGHT, panel.title)


def stages_svg(stages: dict) -> str:
    """Return an SVG of the evaluation of every stage alone."""
    return _svg(_stage_panel(stages), PANEL_WIDTH, PANEL_HEIGHT, STAGE_TITLE)


def x_range(steps: list[int]) -> tuple[int, int]:
    """Return the steps at the left and right end of a plot."""
    return min(steps), max(max(steps), min(steps) + 1)


def _svg(inner: str, width: int, height: int, title: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" font-family="Helvetica, Arial, sans-serif" font-size="11" '
        f'fill="#333333">\n<title>{escape(title)}</title>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n{inner}\n</svg>\n'
    )


def _step_panel(panel: Panel, rows: list[dict]) -> str:
    """Draw each metric twice over the steps: as it is, pale, and its moving mean, strong."""
    found = {line.metric: series(rows, panel.stage, line.metric) for line in panel.lines}
    points = [point for one in found.values() for point in one]
    head = _title(panel.title) + _legend(panel.lines)
    if not points:
        return head + _empty(f"no {panel.stage} steps in metrics.jsonl")
    steps = [step for step, _ in points]
    low, high = (0.0, 1.0) if panel.share else _y_range([value for _, value in points])
    ticks = _ticks(low, high)
    axes = Axes(*x_range(steps), low, high)
    parts = [head, _grid(axes, ticks, _percent if panel.share else _number)]
    for tick in _ticks(axes.x0, axes.x1, whole=True):
        parts.append(_text(axes.x(tick), PANEL_HEIGHT - BOTTOM + 16, f"{tick:.0f}", "middle"))
    parts.append(_text((LEFT + PANEL_WIDTH - RIGHT) / 2, PANEL_HEIGHT - 10, X_TITLE, "middle"))
    for line in panel.lines:
        values = found[line.metric]
        parts.append(_polyline(axes, values, line.colour, 'stroke-width="1" opacity="0.3"'))
        parts.append(_polyline(axes, _smooth(values), line.colour, 'stroke-width="2"'))
    return "".join(parts)


def _stage_panel(stages: dict) -> str:
    """Draw the rates of every stage as points with a whisker from end to end of the interval."""
    head = _title(STAGE_TITLE) + _legend(STAGE_LINES)
    if not any(stages.get(stage) for stage in STAGES):
        return head + _empty("no evaluation in summary.json")
    axes = Axes(-0.5, len(STAGES) - 0.5, 0.0, 1.0)
    parts = [head, _grid(axes, _ticks(0.0, 1.0), _percent)]
    for i, stage in enumerate(STAGES):
        result = stages.get(stage) or {}
        count = f", n = {result['n']}" if "n" in result else ""
        label = f"{stage}{count}" if result else f"{stage}: not evaluated"
        parts.append(_text(axes.x(i), PANEL_HEIGHT - BOTTOM + 16, label, "middle"))
        for j, line in enumerate(STAGE_LINES):
            if _is_number(result.get(line.metric)):
                x = axes.x(i + (j - 1) * 0.27)
                interval = result.get(f"{line.metric}_interval")
                parts.append(_whisker(axes, x, result[line.metric], interval, line.colour))
    return "".join(parts)


def _whisker(axes: Axes, x: float, value: float, interval: list | None, colour: str) -> str:
    """Draw a point, its value in per cent beside it and its interval."""
    low, high = interval or (value, value)
    top, bottom, y = axes.y(high), axes.y(low), axes.y(value)
    path = f"M{x:.1f} {top:.1f}V{bottom:.1f}M{x - 4:.1f} {top:.1f}h8M{x - 4:.1f} {bottom:.1f}h8"
    return (
        f'<path d="{path}" stroke="{colour}" stroke-width="1.5" fill="none"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>'
        + _text(x, top - 5, f"{100 * value:.1f}", "middle", f'fill="{colour}"')
    )


def series(rows: list[dict], stage: str, metric: str) -> list[tuple[int, float]]:
    """Return the (step, value) pairs of a stage; null, NaN and absent values are left out."""
    mine = [row for row in rows if row["stage"] == stage]
    return [(row["step"], row[metric]) for row in mine if _is_number(row.get(metric))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _smooth(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the centred moving mean over about a tenth of the points, cut off at the ends.

    Half a window is always left, so that the first and last step alone never make a hook.
    """
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    half = len(points) // 20
    smooth = []
    for i, (step, _) in enumerate(points):
        first, after = max(0, i - half), min(len(points), i + half + 1)
        smooth.append((step, (sums[after] - sums[first]) / (after - first)))
    return smooth


def _polyline(axes: Axes, points: list[tuple[int, float]], colour: str, style: str) -> str:
    """Draw the points as one line, thinned to at most about MAX_POINTS; a lone point as a dot."""
    every = max(1, len(points) // MAX_POINTS)
    thin = points[::every] + (points[-1:] if (len(points) - 1) % every else [])
    where = " ".join(f"{axes.x(step):.1f},{axes.y(value):.1f}" for step, value in thin)
    if len(points) == 1:
        x, y = where.split(",")
        return f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>'
    return f'<polyline points="{where}" fill="none" stroke="{colour}" {style}/>'


def _y_range(values: list[float]) -> tuple[float, float]:
    """Return rounded ends around all values; 0 is the lower one unless values are negative."""
    low, high = min(0.0, *values), max(0.0, *values)
    if low == high:
        return 0.0, 1.0
    step = _tick_step(low, high)
    return math.floor(low / step) * step, math.ceil(high / step) * step


def _tick_step(low: float, high: float) -> float:
    """Return 1, 2 or 5 times a power of ten that cuts the range into about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def _ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """Return the round values between low and high, whole numbers only when asked."""
    step = max(1.0, _tick_step(low, high)) if whole else _tick_step(low, high)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _grid(axes: Axes, ticks: list[float], label) -> str:
    """Draw a pale line and a label for every y tick, and the x axis."""
    parts = []
    right, bottom = PANEL_WIDTH - RIGHT, PANEL_HEIGHT - BOTTOM
    for tick in ticks:
        y = axes.y(tick)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e3e3e3"/>')
        parts.append(_text(LEFT - 6, y + 4, label(tick), "end"))
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="#888888"/>')
    return "".join(parts)


def _title(text: str) -> str:
    return _text(LEFT, 24, text, "start", 'font-size="14" font-weight="bold"')


def _legend(lines: tuple[Line, ...]) -> str:
    """Draw a colour mark and a name for each line, left to right above the plot."""
    parts, x = [], float(LEFT)
    for line in lines:
        parts.append(f'<rect x="{x:.1f}" y="37" width="12" height="4" fill="{line.colour}"/>')
        parts.append(_text(x + 17, 43, line.label, "start"))
        x += 17 + 6.0 * len(line.label) + 16  # 6 units a letter is generous at this size
    return "".join(parts)


def _empty(text: str) -> str:
    x, y = (LEFT + PANEL_WIDTH - RIGHT) / 2, (TOP + PANEL_HEIGHT - BOTTOM) / 2
    return _text(x, y, text, "middle", 'fill="#888888"')


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {style}>{escape(text)}</text>'
