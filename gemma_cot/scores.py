"""What several completions of one row score together, and two evaluations compared row by row.

Plain Python, host only. The row is the unit everywhere: completions of one prompt are no
independent draws of the task, so every interval is one over rows. Called by evaluation, evaluate
and prepare; knows no model and no file.
"""

import math
from collections.abc import Sequence
from statistics import fmean

from gemma_cot.grpo.answer import answers_match
from gemma_cot.grpo.reward import is_visible, split_blocks
from gemma_cot.stats import Z95, mcnemar_exact, wilson

MEANS = ("format", "process", "outcome", "code", "num_tokens", "repetition", "checkpoints_literal",
         "checkpoints_normalised")  # fmt: skip


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return the unbiased estimate that at least one of k completions is right: `right` of n were.

    1 - C(n - right, k) / C(n, k), M. Chen et al., "Evaluating large language models trained on
    code" (2021), eq. 1. Raises ValueError unless 1 <= k <= n and 0 <= right <= n.
    """
    if not (1 <= k <= n and 0 <= right <= n):
        raise ValueError(
            f"pass_at_k: k and the right completions must not exceed n, got n {n}, right {right}, "
            f"k {k}; pass counts"
        )
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def budgets(k: int) -> list[int]:
    """Return the powers of two below k, and k: 1, 2, 4, 6 for 6."""
    return [2**i for i in range((k - 1).bit_length())] + [k]


def majority(answers: Sequence[str | None], domain: str) -> int | None:
    """Return the index of the first answer of the largest group, None where nobody answers.

    An answer joins the first group whose first answer it equals or matches (`answers_match`); of
    groups of one size the one that was begun first wins. None and blank answers do not vote.
    """
    groups: list[list[int]] = []
    for i, answer in enumerate(answers):
        if answer is None or not is_visible(answer):
            continue
        for group in groups:
            first = answers[group[0]]
            if first.strip() == answer.strip() or answers_match(first, answer, domain):
                group.append(i)
                break
        else:
            groups.append([i])
    return max(groups, key=len)[0] if groups else None


def fold_samples(samples: list[dict], domain: str) -> dict:
    """Return the result of a row that was completed several times: mean scores, the majority's
    score, and `samples` themselves."""
    row: dict = {
        name: None if samples[0][name] is None else fmean(sample[name] for sample in samples)
        for name in MEANS
        if name in samples[0]
    }
    voted = majority([split_blocks(sample["completion"])[1] for sample in samples], domain)
    row["majority"] = 0.0 if voted is None else samples[voted]["outcome"]
    if row["outcome"] is None:
        row["majority"] = None
    return row | {"samples": samples}


def samples_of(row: dict) -> list[dict]:
    """Return the completions of a result row, one or several."""
    return row.get("samples") or [row]


def rate_interval(values: Sequence[float], k: int = 1) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the mean of row scores in [0, 1].

    0/1 scores: n rows. Means of k completions each: the effective n that makes the variance of a
    rate p, p(1 - p)/n, that of the mean of the rows; at most all completions, n where all rows are
    equal.
    """
    n = len(values)
    if all(value in (0, 1) for value in values):
        return wilson(int(sum(values)), n)
    mean = fmean(values)
    variance = fmean((value - mean) ** 2 for value in values)
    effective = min(n * mean * (1 - mean) / variance, n * k) if variance else n
    return wilson(mean * effective, effective)


# Two evaluations of the same rows


def pair_rows(before: list[dict], after: list[dict]) -> list[tuple[dict, dict]]:
    """Return the rows that both hold, paired by id. Raises ValueError where these are other rows.

    A row is another one when its prompt is; no row in common is refused too.
    """
    old = {row["id"]: row for row in before}
    pairs = [(old[row["id"]], row) for row in after if row["id"] in old]
    strangers = [a["id"] for a, b in pairs if a["prompt"] != b["prompt"]]
    if strangers or not pairs:
        raise ValueError(
            f"--compare: both files must hold results of the same rows, got {len(strangers)} of "
            f"{len(pairs)} common ids with another prompt; evaluate both on one dataset"
        )
    return pairs


def paired(pairs: list[tuple[dict, dict]], score: str) -> dict | None:
    """Return the difference of a score over paired rows, its 95 % interval, a test, a verdict.

    0/1 scores: exact McNemar test; interval of Agresti and Min, "Simple improved confidence
    intervals for comparing matched proportions", Statistics in Medicine 24 (2005) 729-740: half a
    row added to each of the four cells. Other scores (means over completions, process): exact sign
    test over rows, normal interval of the mean difference. Rows without the score are left out;
    None where no row has it.
    """
    values = [(a.get(score), b.get(score)) for a, b in pairs]
    values = [(a, b) for a, b in values if a is not None and b is not None]
    if not values:
        return None
    n = len(values)
    differences = [b - a for a, b in values]
    gained, lost = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    difference = fmean(differences)
    is_binary = all(value in (0, 1) for pair in values for value in pair)
    if is_binary:
        centre = (gained - lost) / (n + 2)
        half = Z95 * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    else:
        squares = math.fsum((d - difference) ** 2 for d in differences)
        centre, half = difference, Z95 * math.sqrt(squares / (n - 1) / n) if n > 1 else 2.0
    interval = [max(-1.0, centre - half), min(1.0, centre + half)]
    p_value = mcnemar_exact(lost, gained)
    return {
        "n": n,
        "before": fmean(a for a, _ in values),
        "after": fmean(b for _, b in values),
        "difference": difference,
        "interval": interval,
        "gained": gained,
        "lost": lost,
        "p_value": p_value,
        "method": "McNemar exact" if is_binary else "sign test over rows, exact",
        "verdict": verdict(interval, p_value),
    }


def verdict(interval: Sequence[float], p_value: float) -> str:
    """Return "improved" or "got worse" only where interval and test both exclude no change."""
    low, high = interval
    if p_value < 0.05 and (low > 0 or high < 0):
        return "improved" if low > 0 else "got worse"
    return "no difference shown"


def changed_rows(pairs: list[tuple[dict, dict]]) -> list[dict]:
    """Return the paired rows whose format, process, outcome, code or majority score changed, of
    those that both sides have."""
    names = ("format", "process", "outcome", "code", "majority")
    rows = []
    for a, b in pairs:
        if all(a[name] == b[name] for name in names if name in a and name in b):
            continue
        row = {key: b[key] for key in ("id", "domain", "prompt")}
        for side, result in (("before", a), ("after", b)):
            row[side] = {name: result[name] for name in names if name in result}
            row[side]["completions"] = [sample["completion"] for sample in samples_of(result)]
        rows.append(row)
    return rows
