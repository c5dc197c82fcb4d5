"""A curriculum from measured completions: which prompts a model still learns from.

GRPO learns nothing from a group whose rewards are all equal; a prompt that a model always or never
answers gives mostly such groups on the answer reward, one whose completions all earned the same on
the sum of the rewards. Both come from a result file of `evaluate --num_completions=K` and are
matched by prompt. Pure functions on rows and files of rows.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from gemma_cot.prepare.convert import Rejected
from gemma_cot.prepare.filters import text_key
from gemma_cot.results import read_results
from gemma_cot.scores import samples_of


class Measured(NamedTuple):
    """What the completions of a prompt earned."""

    rate: float  # share that was right
    differs: bool  # whether format + process + outcome, the recipe's sum, is not the same for all


def read_rates(paths: Sequence[str]) -> dict[bytes, Measured]:
    """Return text_key of domain and prompt -> what all its completions earned.

    Raises ValueError for no result file, and for one with a completion a row: its rates are 0 or 1.
    """
    outcomes: dict[bytes, list[float]] = {}
    totals: dict[bytes, set[float]] = {}
    for path in paths:
        for result in read_results(path):
            if result["outcome"] is not None:
                key = text_key(result["domain"], result["prompt"])
                samples = samples_of(result)
                outcomes.setdefault(key, []).extend(sample["outcome"] for sample in samples)
                totals.setdefault(key, set()).update(map(_total, samples))
    most = max(map(len, outcomes.values()), default=0)
    if paths and most < 2:
        raise ValueError(
            f"--pass_rates: rows must have been completed at least twice, got {most} completions; "
            "evaluate with --num_completions=4 --temperature=1"
        )
    return {key: Measured(fmean(right), len(totals[key]) > 1) for key, right in outcomes.items()}


def _total(sample: dict) -> float:
    return sum(sample[name] or 0.0 for name in ("format", "process", "outcome"))


def add_rate(
    row: dict, rates: dict[bytes, Measured], low: float, high: float, unmeasured: str, by: str
) -> bool:
    """Write `pass_rate` into a row; return whether it has one. Raises Rejected for a row to drop.

    Kept are, by "answer", rates from `low` to `high`; by "reward", whatever the rate, rows whose
    completions did not all earn the same; rows without a rate when `unmeasured` is "keep".
    """
    row.pop("pass_rate", None)  # of an earlier curriculum
    measured = rates.get(text_key(row["domain"], row["prompt"]))
    if measured is None:
        if unmeasured == "drop":
            raise Rejected("pass_rate_unmeasured", "its prompt is not in --pass_rates")
        return False
    rate, differs = measured
    if by == "reward":
        if not differs:
            raise Rejected("rewards_equal", "its completions all earned the same")
    elif not low <= rate <= high:
        code = "pass_rate_too_low" if rate < low else "pass_rate_too_high"
        raise Rejected(code, f"{rate:g}, kept are {low:g} to {high:g}")
    row["pass_rate"] = rate
    return True


def order_by_rate(path: Path) -> None:
    """Rewrite a JSONL file, highest `pass_rate` first and rows without one last; else as it was."""
    places = []
    with open(path, "rb") as file:
        at = 0
        for line in file:
            places.append((-json.loads(line).get("pass_rate", -1.0), at))
            at += len(line)
    fresh = path.with_suffix(".ordered")
    with open(path, "rb") as file, open(fresh, "wb") as out:
        for _, at in sorted(places):
            file.seek(at)
            out.write(file.readline())
    fresh.replace(path)
