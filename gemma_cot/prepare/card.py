"""The data card of a prepared dataset: one Markdown page, and its lengths as an SVG."""

from collections import Counter
from dataclasses import dataclass, field
from html import escape

import numpy as np

SIZES = ("prompt_tokens", "completion_tokens", "checkpoints")
BINS, WIDTH, HEIGHT = 40, 420, 240


@dataclass
class Report:
    """What happened to the rows."""

    settings: dict
    rows_in: int = 0  # objects in the input files
    converted: int = 0  # rows of ours made of them (MBPP: one an assertion)
    test_questions: int = 0  # questions in --against
    unmeasured: int = 0  # rows kept that --pass_rates does not know
    reasons: Counter = field(default_factory=Counter)  # reason code -> rows dropped
    kept: int = 0
    groups: Counter = field(default_factory=Counter)  # split, domain, reasoning -> rows kept
    lengths: dict[str, Counter] = field(default_factory=lambda: {name: Counter() for name in SIZES})

    def add(self, measured: dict) -> None:
        """Count a row that is kept."""
        self.kept += 1
        self.unmeasured += not measured.get("has_rate", True)
        self.groups[measured["split"], measured["domain"], measured["reasoning"]] += 1
        for name in SIZES:
            self.lengths[name][measured[name]] += 1


def quantiles(counts: Counter) -> str:
    """Return `min / median / 90 % / 99 % / max` of values that were counted."""
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    ranks = np.ceil(np.array([0, 0.5, 0.9, 0.99, 1]) * (ends[-1] - 1))
    return " / ".join(str(values[i]) for i in np.searchsorted(ends, ranks, side="right"))


def markdown(report: Report) -> str:
    """Return the card."""
    reasons = report.reasons
    lines = ["# Data card", "", "Made by `python -m gemma_cot.prepare`.", ""]
    lines += [f"- {key}: {value}" for key, value in report.settings.items()]
    lines += ["", "## Rows", "", "| | rows |", "|---|---|", f"| read | {report.rows_in} |"]
    lines += [f"| converted | {report.converted} |"]
    lines += [f"| dropped: {code} | {count} |" for code, count in sorted(reasons.items())]
    lines += [f"| kept | {report.kept} |", ""]
    lines += ["| split | domain | reasoning | rows |", "|---|---|---|---|"]
    groups = sorted(report.groups.items())
    lines += [f"| {' | '.join(group)} | {count} |" for group, count in groups]
    if any(kind == "none" for _, _, kind in report.groups):
        lines += ["", "Reasoning `none`: the file has no worked solution and the target only names "
                  "the answer; use these rows for GRPO or evaluation, or let a teacher write "
                  "solutions (distill): SFT on them teaches to skip the steps."]  # fmt: skip
    lines += ["", "## Lengths (min / median / 90 % / 99 % / max)", ""]
    lines += [f"- {name}: {quantiles(counts)}" for name, counts in report.lengths.items()]
    lines.append(f"- rows without a checkpoint: {report.lengths['checkpoints'][0]}")
    exact, grams = reasons["in_test_set"], reasons["overlaps_test_set"]
    lines += ["", "## Overlaps", "", f"- against {report.test_questions} test questions: "
              f"{exact} the same, {grams} more share 8-grams"]  # fmt: skip
    lines.append(f"- repeats: {reasons['duplicate']} exact, {reasons['near_duplicate']} near")
    if report.settings["pass_rates"]:
        lines += ["", "## Pass rates", "", f"- kept without a measured rate: {report.unmeasured}"]
    lines += ["", "![lengths](lengths.svg)", ""]
    return "\n".join(lines)


def lengths_svg(report: Report) -> str:
    """Return histograms of the kept rows' prompt and completion lengths."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    ]
    for column, name in enumerate(("prompt_tokens", "completion_tokens")):
        limit = report.settings[f"max_{name}"]
        lengths = report.lengths[name]
        weights = list(lengths.values())
        counts, _ = np.histogram(list(lengths), BINS, (0, limit), weights=weights)
        left, step = column * WIDTH + 40, (WIDTH - 60) / BINS
        title = escape(f"{name}, 0 to {limit}; highest bar {counts.max()} rows")
        parts.append(f'<text x="{left}" y="24">{title}</text>')
        for i, count in enumerate(counts):
            height = (HEIGHT - 70) * count / counts.max()
            parts.append(
                f'<rect x="{left + i * step:.1f}" y="{HEIGHT - 30 - height:.1f}" '
                f'width="{step - 1:.1f}" height="{height:.1f}" fill="#0072b2"/>'
            )
        parts.append(f'<text x="{left}" y="{HEIGHT - 12}">0</text>')
        right = left + WIDTH - 60
        parts.append(f'<text x="{right}" y="{HEIGHT - 12}" text-anchor="end">{limit}</text>')
    return "\n".join([*parts, "</svg>\n"])
