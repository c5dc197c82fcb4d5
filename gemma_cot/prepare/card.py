"""The data card of a prepared dataset: one Markdown page, and its lengths as an SVG."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np

BINS, WIDTH, HEIGHT = 40, 420, 240


@dataclass
class Report:
    """What happened to the rows."""

    settings: dict
    rows_in: int = 0  # objects in the input files
    converted: int = 0  # rows of ours made of them (MBPP: one an assertion)
    test_questions: int = 0  # questions in --against
    reasons: Counter = field(default_factory=Counter)  # reason code -> rows dropped
    kept: list[dict] = field(default_factory=list)  # split, domain, reasoning, lengths of each row


def quantiles(values: Sequence[int]) -> str:
    """Return `min / median / 90 % / 99 % / max`."""
    points = np.quantile(values, [0, 0.5, 0.9, 0.99, 1], method="higher")
    return " / ".join(str(int(p)) for p in points)


def markdown(report: Report) -> str:
    """Return the card."""
    kept, reasons = report.kept, report.reasons
    lines = ["# Data card", "", "Made by `python -m gemma_cot.prepare`.", ""]
    lines += [f"- {key}: {value}" for key, value in report.settings.items()]
    lines += ["", "## Rows", "", "| | rows |", "|---|---|", f"| read | {report.rows_in} |"]
    lines += [f"| converted | {report.converted} |"]
    lines += [f"| dropped: {code} | {count} |" for code, count in sorted(reasons.items())]
    lines += [f"| kept | {len(kept)} |", ""]
    lines += ["| split | domain | reasoning | rows |", "|---|---|---|---|"]
    groups = Counter((k["split"], k["domain"], k["reasoning"]) for k in kept)
    lines += [f"| {' | '.join(group)} | {count} |" for group, count in sorted(groups.items())]
    lines += ["", "## Lengths (min / median / 90 % / 99 % / max)", ""]
    for name in ("prompt_tokens", "completion_tokens", "checkpoints"):
        lines.append(f"- {name}: {quantiles([k[name] for k in kept])}")
    lines.append(f"- rows without a checkpoint: {sum(not k['checkpoints'] for k in kept)}")
    exact, grams = reasons["in_test_set"], reasons["overlaps_test_set"]
    lines += ["", "## Overlaps", "", f"- against {report.test_questions} test questions: "
              f"{exact} the same, {grams} more share 8-grams"]  # fmt: skip
    lines.append(f"- repeats: {reasons['duplicate']} exact, {reasons['near_duplicate']} near")
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
        counts, _ = np.histogram([k[name] for k in report.kept], BINS, (0, limit))
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
