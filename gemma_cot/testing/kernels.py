"""A bench for kernels, ours or yours: a callable is run against the reference on a grid of cases.

    >>> import jax
    >>> from gemma_cot.testing import check_kernel, report
    >>> def my_logprob(x_CD, embed_VD, target_C, temperature):  # forgets the temperature
    ...     logits_CV = (x_CD @ embed_VD.T).astype("float32")
    ...     logp_CV = jax.nn.log_softmax(logits_CV)
    ...     chosen_C1 = jax.numpy.take_along_axis(logp_CV, target_C[:, None], axis=1)
    ...     return chosen_C1[:, 0], -(jax.numpy.exp(logp_CV) * logp_CV).sum(axis=1)
    >>> outcomes = check_kernel("chosen_logprob", my_logprob)
    >>> print(report(outcomes))                                        # doctest: +ELLIPSIS
    shape                             dtype     what          max error     limit  verdict
    C 7  D 20  V 50  temperature 0.7  float32   value ...  failed
    ...

Signatures are those of `gemma_cot.model.kernels.reference`. The truth is the reference in float32
at highest precision on the same values (bfloat16 ones widened), so a limit is about the kernel's
rounding only, to what the reference gives: float32 or bfloat16; a kernel that multiplies float32 in
fewer bits fails. An error is max |got - want| / max |want| over the outputs that count: what
attention returns for padding queries is free, as long as it is finite. A kernel that works in tiles
should be tried with small ones, of 16 say: the last case of each operation alone spans several of
128, log-probs of 2,048. Knows no model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.model.kernels import reference
from gemma_cot.testing.outcome import Outcome, compare, one_line, partial_outcome

LIMITS = {"float32": 2e-5, "bfloat16": 2e-2}  # rounding of 24 and of 8 bits


@dataclass(frozen=True)
class Case:
    """One problem: the sizes of its axes, one start per row, and the static argument."""

    sizes: tuple[tuple[str, int], ...]  # (("B", 2), ...): letters of `gemma_cot.axes`
    static: int | float | None  # window or temperature
    starts: tuple[int, ...] = ()  # first real column of each row or prompt
    step: int | None = None  # clock of a decode step
    began: tuple[int, ...] = ()  # clock at which each prompt's completions began, if not at 0

    def __str__(self) -> str:
        parts = [f"{letter} {size}" for letter, size in self.sizes]
        parts += [f"start {','.join(map(str, self.starts))}"] if self.starts else []
        parts += [f"step {self.step}"] if self.step is not None else []
        parts += [f"began {','.join(map(str, self.began))}"] if self.began else []
        kind = "temperature" if isinstance(self.static, float) else "window"
        return "  ".join([*parts, f"{kind} {self.static}"])


@dataclass(frozen=True)
class Operation:
    """A reference with its grid. Arrays are drawn per case; the case's `static` comes last."""

    reference: Callable
    draw: Callable  # (case, rng) -> (dict of arrays in order of the arguments, counted_... mask)
    cases: tuple[Case, ...]
    differentiable: tuple[str, ...]  # arguments whose gradient is checked


def check_kernel(
    name: str, function: Callable, gradients: bool = True, cases: Sequence[Case] | None = None
) -> list[Outcome]:
    """Run `function` against OPERATIONS[name] on every case, in float32 and bfloat16.

    function: traceable by JAX, arguments as the reference's in its order: the arrays, then the
    window or temperature (static), then began_P in the cases of `decode_attention` that have one.
    cases: others than those of OPERATIONS[name].
    gradients: also compare the gradients (of the operations that have any) for a random cotangent.
    Raises KeyError for an unknown name; whatever `function` raises becomes a failed row.
    """
    if name not in OPERATIONS:
        raise KeyError(f"operation must be one of {', '.join(OPERATIONS)}, got {name!r}")
    outcomes = []
    for case in OPERATIONS[name].cases if cases is None else cases:
        for dtype in LIMITS:
            arguments, counted, want, dtypes = _truth(name, case, dtype, gradients)
            limits = {what: LIMITS[given] for what, given in dtypes.items()}
            row = partial_outcome(str(case), dtype, limits)
            try:
                got = _run(OPERATIONS[name], function, arguments, case, counted, gradients)
            except Exception as error:  # whatever a stranger's kernel raises is its result
                outcomes.append(row("value", float("nan"), one_line(error)))
                continue
            outcomes += compare(row, got, want, dtypes)
    return outcomes


# ------------------------------------------------------------------------- running one case


@cache
def _truth(name: str, case: Case, dtype: str, gradients: bool):
    """Return (arguments in `dtype`, counted mask, the reference's {what: (array, mask)} of the same
    values in float32, {what: dtype that the reference gives for arguments in `dtype`})."""
    operation = OPERATIONS[name]
    drawn, counted = operation.draw(case, np.random.default_rng(0))
    arguments = {
        key: jnp.asarray(x, dtype if x.dtype == np.float64 else None) for key, x in drawn.items()
    }
    wide = {
        key: x.astype(jnp.float32) if x.dtype == jnp.dtype(dtype) else x
        for key, x in arguments.items()
    }

    def run(arguments):
        return _run(operation, operation.reference, arguments, case, counted, gradients)

    with jax.default_matmul_precision("highest"):
        want = run(wide)
    shapes = jax.eval_shape(lambda: run(arguments))
    return arguments, counted, want, {what: str(x.dtype) for what, (x, _) in shapes.items()}


def _run(operation, function, arguments: dict, case: Case, counted, gradients: bool) -> dict:
    """Return {what: (array, counted mask)}: every value, then every gradient, compiled as one."""
    names = operation.differentiable if gradients else ()
    order = tuple(arguments)  # jit sorts the keys of a dict
    began = [jnp.asarray(case.began, jnp.int32)] if case.began else []

    def values_of(wanted: dict, arguments: dict):
        inputs = arguments | wanted
        out = function(*(inputs[key] for key in order), case.static, *began)
        return tuple(out) if isinstance(out, tuple | list) else (out,)

    @jax.jit
    def values_and_gradients(arguments):
        wanted = {key: arguments[key] for key in names}
        if not names:
            return values_of(wanted, arguments), {}
        values, pull_back = jax.vjp(lambda wanted: values_of(wanted, arguments), wanted)
        return values, pull_back(tuple(_cotangent(x, counted) for x in values))[0]

    values, grads = values_and_gradients(arguments)
    named = {f"value {i}" if i > 1 else "value": (x, counted) for i, x in enumerate(values, 1)}
    return named | {f"d {key}": (grads[key], np.True_) for key in names}


def _cotangent(value: jax.Array, counted: np.ndarray) -> jax.Array:
    """Return a fixed random cotangent of a value, 0 where the value does not count."""
    drawn = np.random.default_rng(value.ndim).normal(size=value.shape)
    return jnp.asarray(np.where(counted, drawn, 0.0), jnp.bfloat16).astype(value.dtype)


# ------------------------------------------------------------------------- the operations


def _draw_prefill(case: Case, rng):
    size = dict(case.sizes)
    B, T, N, K, H = (size[letter] for letter in "BTNKH")
    start_B = np.asarray(case.starts, np.int32)
    arrays = {
        "q_BTNH": rng.normal(size=(B, T, N, H)) * 2 / H**0.5,
        "k_BSKH": rng.normal(size=(B, T, K, H)),
        "v_BSKH": rng.normal(size=(B, T, K, H)),
        "start_B": start_B,
    }
    return arrays, (np.arange(T) >= start_B[:, None])[:, :, None, None]


def _draw_decode(case: Case, rng):
    size = dict(case.sizes)
    P, G, S, T, N, K, H = (size[letter] for letter in "PGSTNKH")
    arrays = {
        "q_BNH": rng.normal(size=(P * G, N, H)) * 2 / H**0.5,
        "prompt_k_PSKH": rng.normal(size=(P, S, K, H)),
        "prompt_v_PSKH": rng.normal(size=(P, S, K, H)),
        "tail_k_BSKH": rng.normal(size=(P * G, T, K, H)),
        "tail_v_BSKH": rng.normal(size=(P * G, T, K, H)),
        "start_P": np.asarray(case.starts, np.int32),
        "step": np.int32(case.step),
    }
    return arrays, np.True_


def _draw_logprob(case: Case, rng):
    C, D, V = (size for _, size in case.sizes)
    arrays = {
        "x_CD": rng.normal(size=(C, D)) * 3 / D**0.5,
        "embed_VD": rng.normal(size=(V, D)),
        "target_C": rng.integers(0, V, C).astype(np.int32),
    }
    return arrays, np.True_


def _sizes(letters: str, *sizes: int) -> tuple[tuple[str, int], ...]:
    return tuple(zip(letters, sizes, strict=True))


OPERATIONS = {
    "prefill_attention": Operation(
        reference.prefill_attention,
        _draw_prefill,
        (
            Case(_sizes("BTNKH", 2, 16, 4, 1, 8), None, (0, 5)),
            Case(_sizes("BTNKH", 3, 37, 6, 2, 8), 5, (0, 7, 37)),  # the last row is all padding
            Case(_sizes("BTNKH", 1, 45, 2, 2, 16), 16, (18,)),  # a window that is a whole tile
            Case(_sizes("BTNKH", 2, 33, 2, 1, 8), 33, (0, 32)),  # a window that hides nothing
            Case(_sizes("BTNKH", 1, 17, 2, 1, 8), 1, (3,)),  # each position sees itself
            Case(_sizes("BTNKH", 1, 300, 2, 1, 128), 200, (37,)),
        ),
        ("q_BTNH", "k_BSKH", "v_BSKH"),
    ),
    "decode_attention": Operation(
        reference.decode_attention,
        _draw_decode,
        (
            Case(_sizes("PGSTNKH", 2, 3, 13, 9, 4, 1, 8), None, (0, 6), 0),
            Case(_sizes("PGSTNKH", 2, 2, 37, 21, 6, 2, 8), None, (5, 37), 20),  # an empty prompt
            Case(_sizes("PGSTNKH", 1, 4, 33, 18, 2, 2, 16), 20, (4,), 17),  # both parts in sight
            Case(_sizes("PGSTNKH", 2, 1, 16, 24, 2, 1, 8), 8, (0, 9), 19),  # the prompt is out
            # Begun later, as rows that take a finished one's place: the ring goes round.
            Case(_sizes("PGSTNKH", 2, 2, 9, 7, 4, 2, 8), None, (0, 3), 11, (6, 9)),
            Case(_sizes("PGSTNKH", 3, 1, 12, 8, 4, 1, 8), 5, (2, 0, 11), 13, (13, 7, 10)),
            Case(_sizes("PGSTNKH", 1, 2, 300, 280, 2, 1, 128), None, (37,), 270),
        ),
        (),
    ),
    "chosen_logprob": Operation(
        reference.chosen_logprob,
        _draw_logprob,
        (
            Case(_sizes("CDV", 7, 20, 50), 0.7),
            Case(_sizes("CDV", 16, 24, 64), 1.0),
            Case(_sizes("CDV", 37, 16, 131), 1.3),
            Case(_sizes("CDV", 1, 8, 33), 0.25),
            Case(_sizes("CDV", 5, 16, 4500), 0.9),
        ),
        ("x_CD", "embed_VD"),
    ),
}  # fmt: skip
