"""A user's own reward function: found by its name, and called with every promise of it checked.

Called by run, the canaries and the linter.
"""

import importlib
import inspect
import math
import numbers
from collections.abc import Callable

from gemma_cot.grpo.reward import RewardError, RewardFunction, completion_text


def load_reward(spec: str) -> tuple[str, RewardFunction, float]:
    """Return name, function and weight of `package.module:function=weight`.

    The weight is 1.0 if left out. Raises ValueError, one line, when any part cannot be had.
    """
    def refuse(rule: str, got: object, change: str) -> ValueError:
        return ValueError(_one_line(f"--reward {spec!r} - {rule} - got {got} - {change}"))

    path, equals, weight_text = spec.strip().partition("=")
    module_name, colon, name = (part.strip() for part in path.partition(":"))
    if not (module_name and colon and name):
        raise refuse("must read package.module:function=weight", repr(path),
                     "name a module, a colon and a function")
    try:
        weight = float(weight_text) if equals else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight):
        raise refuse("the weight must be a finite number", repr(weight_text), "write e.g. =0.5")
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise refuse("the module must be importable", f"{type(error).__name__}: {error}",
                     "correct the name or set PYTHONPATH") from error
    function = getattr(module, name, None)
    if not callable(function):
        got = f"type {type(function).__name__}" if hasattr(module, name) else "no such name"
        raise refuse(f"{name} must be a function in {module_name}", got, "correct the name")
    return name, function, weight


def checked(
    name: str, function: RewardFunction, errors: list[dict] | None = None
) -> RewardFunction:
    """Return a reward function that gives what `function` gives, as floats and Nones.

    It raises RewardError, one line, naming the function that failed, how, and on which completion.
    Where `errors` is a list, a row on which `function` raises gets None, and its input goes there.
    """
    function = _as_trl_calls(function)

    def call(prompts: list, completions: list, **columns) -> list[float | None]:
        try:
            values = function(prompts, completions, **columns)
        except Exception as error:
            values, failures = _one_by_one(name, function, prompts, completions, columns)
            if errors is None or not failures:
                texts = [row["completion"] for row in failures] or map(completion_text, completions)
                raise RewardError(
                    _one_line(f"reward function {name} - must not raise - got "
                              f"{type(error).__name__}: {error}")
                    + f" on completion {next(iter(texts), '')[:200]!r} - correct the function"
                ) from error
            errors.extend(failures)
        return _scores(name, values, len(completions))

    return call


def _as_trl_calls(function: Callable) -> RewardFunction:
    """Return f(prompts, completions, **columns) that gives all by name, as TRL does, where the
    function takes them so, else prompts and completions by place."""
    try:
        signature = inspect.signature(function, follow_wrapped=False)
        if _takes_any(signature):  # a wrapper: what it wraps is asked
            signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a builtin
        return function
    if _takes_any(signature):
        return function

    def call(prompts: list, completions: list, **columns) -> list:
        given = {"prompts": prompts, "completions": completions, **columns}
        try:
            signature.bind(**given)
        except TypeError:
            if next(iter(signature.parameters), "") != "completions":
                return function(prompts, completions, **columns)
        return function(**given)

    return call


def _takes_any(signature: inspect.Signature) -> bool:
    """Whether a function takes any number of arguments by place."""
    return any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())


def _one_by_one(
    name: str, function: RewardFunction, prompts: list, completions: list, columns: dict
) -> tuple[list, list[dict]]:
    """Return (scores, failures) of a function that raised on a batch, called for each row alone."""
    values, failures = [], []
    for row in range(len(completions)):
        part = slice(row, row + 1)
        try:
            one = function(prompts[part], completions[part],
                           **{key: column[part] for key, column in columns.items()})
        except Exception as error:
            one = [None]
            text = completion_text(completions[row])
            failures.append({"reward": name, "error": f"{type(error).__name__}: {error}",
                             "prompt": prompts[row], "completion": text})
        values += _scores(name, one, 1)
    return values, failures


def _scores(name: str, values: object, count: int) -> list[float | None]:
    """Return the scores as floats and Nones; raise RewardError unless they are `count` of those."""
    def refuse(rule: str, got: str, change: str) -> RewardError:
        return RewardError(_one_line(f"reward function {name} - {rule} - got {got} - {change}"))

    if not isinstance(values, list):
        raise refuse("must return a list", f"type {type(values).__name__}", "return a list")
    if len(values) != count:
        raise refuse("must return one score a completion", f"{len(values)} scores for {count}",
                     "return None where the reward does not apply")
    scores = []
    for row, value in enumerate(values):
        number = _as_float(value)
        if number is not None and not math.isfinite(number):
            raise refuse("every score must be a finite number or None",
                         f"{value!r:.80} at row {row}", "return a number, or None")
        scores.append(number)
    return scores


def _as_float(value: object) -> float | None:
    """Return a number, bool or array scalar as float, None as None, anything else as NaN."""
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        value = value.item()
    try:
        return float(value) if isinstance(value, numbers.Real) else math.nan
    except OverflowError:
        return math.inf


def _one_line(text: str) -> str:
    """Return `text` with line breaks and runs of white space as one space."""
    return " ".join(text.split())
