"""What a bench reports: an outcome per quantity compared, and the table of them."""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

SMALLEST = 1e-3  # errors of a quantity that is 0 throughout are measured against this


@dataclass(frozen=True)
class Outcome:
    """One row of the report."""

    case: str
    dtype: str
    what: str  # "value", "value 2", or "d name"
    error: float  # NaN when the callable raised or returned another shape
    limit: float
    message: str = field(default="")

    @property
    def passed(self) -> bool:
        return self.error <= self.limit  # False for NaN


def partial_outcome(case: str, dtype: str, limits: dict[str, float]) -> Callable:
    """Return f(what, error, message) -> Outcome of one case; limits: of each quantity."""
    return lambda what, error, message="": Outcome(
        case, dtype, what, error, limits[what], message
    )


def compare(row: Callable, got: dict, want: dict, dtypes: dict | None = None) -> list[Outcome]:
    """Return one outcome per value and gradient in `want`, both {what: (array, counted mask)}.

    dtypes: what -> the floating dtype that `got` must have, or a wider one.
    """
    outcomes, dtypes = [], dtypes or {}
    for what, (truth, counted) in want.items():
        array = np.asarray(got[what][0], np.float32) if what in got else None
        if array is None or array.shape != truth.shape:
            shape = "nothing" if array is None else array.shape
            outcomes.append(row(what, float("nan"), f"must be {truth.shape}, got {shape}"))
        elif not jnp.issubdtype(got[what][0].dtype, jnp.floating):
            outcomes.append(row(what, float("nan"), f"must be floating, got {got[what][0].dtype}"))
        elif jnp.finfo(got[what][0].dtype).bits < jnp.finfo(dtypes.get(what, jnp.bfloat16)).bits:
            message = f"must be {dtypes[what]}, got {got[what][0].dtype}"
            outcomes.append(row(what, float("nan"), message))
        elif not np.isfinite(array).all():
            outcomes.append(row(what, float("nan"), "not finite everywhere"))
        else:
            error = np.where(counted, np.abs(array - truth), 0.0).max()
            size = np.where(counted, np.abs(truth), 0.0).max()
            outcomes.append(row(what, float(error / max(size, SMALLEST))))
    return outcomes


def report(outcomes: list[Outcome]) -> str:
    """Return the outcomes as a table, one line each, and a last line that counts them."""
    width = max((len(outcome.case) for outcome in outcomes), default=5)
    form = "{:<" + str(width) + "}  {:<8}  {:<12}  {:>9}  {:>8}  {}"
    lines = [form.format("shape", "dtype", "what", "max error", "limit", "verdict")]
    for o in outcomes:
        verdict = "ok" if o.passed else f"failed {o.message}".rstrip()
        error, limit = f"{o.error:.1e}", f"{o.limit:.0e}"
        lines.append(form.format(o.case, o.dtype, o.what, error, limit, verdict))
    passed = sum(outcome.passed for outcome in outcomes)
    return "\n".join([*lines, f"{passed} of {len(outcomes)} within their limits"])


def one_line(error: Exception) -> str:
    """Return what was raised, cut to a line of the table."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first[:160]}"
