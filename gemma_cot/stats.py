"""Intervals and tests for the rates that an evaluation reports. Plain Python, host only.

Called by evaluate, report and the benchmarks; knows nothing of what was counted. All intervals
default to 95 % (z = 1.959964, the 97.5 % point of the standard normal).
"""

import math
from collections.abc import Sequence

Z95 = 1.959964


def wilson(successes: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Return the Wilson score interval (low, high) of a rate of `successes` out of `n`.

    (p + z²/2n ± z·sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n), E. B. Wilson, "Probable inference, the
    law of succession, and statistical inference", JASA 22 (1927) 209-212. n = 0 gives (0, 1):
    nothing is known. Counts may be effective ones, no whole numbers. Raises ValueError unless
    0 <= successes <= n.
    """
    if not 0 <= successes <= n:
        raise ValueError(
            f"wilson: successes must lie between 0 and n, got {successes} of {n}; pass counts"
        )
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # At p = 0 and p = 1 centre and half cancel exactly on paper, not in floating point.
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == n else (centre + half) / scale
    return low, high


def mcnemar_exact(b: int, c: int) -> float:
    """Return the two-sided exact p-value that two systems are equally often right.

    Of the examples that only one of them gets right, `b` fell to the first and `c` to the second;
    under the null b ~ Binomial(b + c, 1/2), and p = min(1, 2·P[X <= min(b, c)]). Q. McNemar, "Note
    on the sampling error of the difference between correlated proportions", Psychometrika 12
    (1947) 153-157, in its exact binomial form. Summed in integers, so no n over- or underflows
    before the one division. Raises ValueError for negative counts.
    """
    if b < 0 or c < 0:
        raise ValueError(f"mcnemar_exact: counts must be 0 or more, got {b} and {c}; pass counts")
    n = b + c
    ways, tail = 1, 0  # ways = C(n, i)
    for i in range(min(b, c) + 1):
        tail += ways
        ways = ways * (n - i) // (i + 1)
    return min(1.0, 2 * tail / 2**n)


def mean_interval(values: Sequence[float], z: float = Z95) -> tuple[float, float, float]:
    """Return (mean, low, high) of scores in [0, 1]: mean ± z·s/sqrt(n), cut to [0, 1].

    s has n - 1 in the denominator. The normal approximation (central limit theorem) is poor for a
    few values and has width 0 when all values are equal; for pure 0/1 scores use `wilson`. One
    value has no spread to estimate: (value, 0, 1). None at all: (0, 0, 1). Raises ValueError for a
    value outside [0, 1] or not a number.
    """
    bad = [value for value in values if not 0 <= value <= 1]
    if bad:
        raise ValueError(
            f"mean_interval: values must lie in [0, 1], got {bad[0]}; rescale the scores"
        )
    n = len(values)
    if n == 0:
        return 0.0, 0.0, 1.0
    mean = math.fsum(values) / n
    if n == 1:
        return mean, 0.0, 1.0
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    half = z * math.sqrt(variance / n)
    return mean, max(0.0, mean - half), min(1.0, mean + half)
