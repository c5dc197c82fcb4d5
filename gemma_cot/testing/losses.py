"""A bench for losses, ours or yours: what a batch means must not depend on how it is run.

    >>> from gemma_cot.testing import check_loss, report
    >>> def mean_of_means(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT):
    ...     mask_BT = (weight_BT > 0).astype("float32")
    ...     return -(mask_BT * logp_BT * advantage_B[:, None]).sum() / mask_BT.sum()
    >>> print(report(check_loss(mean_of_means)))                          # doctest: +ELLIPSIS
    shape                        dtype     what          max error     limit  verdict
    the whole batch at once      float32   value           0.0e+00     1e-05  ok
    the whole batch at once      float32   gradient        0.0e+00     1e-05  ok
    micro-batches of 1 row       float32   value               nan ...  failed not finite everywhere
    micro-batches of 1 row       float32   gradient ...  failed
    ...

A small policy (a table of bigram logits) is differentiated through the trainer's own
`optim.accumulate_gradients`; each case runs the same eight completions, of 0 to 6 tokens, another
way, and must give the value and the gradient of the whole batch at once on one device.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from gemma_cot.axes import make_mesh, replicated
from gemma_cot.grpo.loss import token_weights
from gemma_cot.optim import accumulate_gradients, split_batch
from gemma_cot.testing.outcome import Outcome, compare, one_line, partial_outcome

LIMIT = 1e-5  # float32 sums of 27 terms in another order
LENGTHS = (6, 1, 4, 0, 3, 6, 2, 5)  # completion tokens of each row: B 8
V, WIDTH = 11, 3  # vocabulary, columns of the prompt


def check_loss(loss: Callable, weights: Callable = token_weights) -> list[Outcome]:
    """Run a loss in every way that must not matter, and compare values and gradients.

    loss(logp_BT, logp_old_BT, logp_ref_BT, advantage_B, weight_BT) -> scalar, or (scalar, metrics):
    float32, of the rows it is given, the sum over micro-batches being the batch's (as
    `grpo.loss.grpo_loss`, with its options bound). weights(mask_BT) -> weight_BT of a whole batch,
    0 outside the mask. Cases: micro-batches, order of the rows, padding on either side, rubbish
    outside the mask, and 2, 4 and 8 devices if there are as many (on a CPU
    XLA_FLAGS=--xla_force_host_platform_device_count=4 makes four). Whatever `loss` raises becomes a
    failed row.
    """
    batch, run = _draw(weights), _gradient_of(loss)
    want, outcomes = None, []
    for case, other, rows_per_micro, devices in _cases(batch):
        row = partial_outcome(case, "float32", dict(value=LIMIT, gradient=LIMIT))
        try:
            got = _run(run, other, rows_per_micro, devices)
        except Exception as error:  # whatever a stranger's loss raises is its result
            outcomes.append(row("gradient", float("nan"), one_line(error)))
            continue
        if want is None:
            want = got
            if not got["gradient"][0].any():
                outcomes.append(row("gradient", float("nan"), "is 0 everywhere"))
        outcomes += compare(row, got, want)
    return outcomes


def _cases(batch: dict) -> list[tuple]:
    """Return (case, batch, rows of a micro-batch, devices); the first is what the others equal."""
    B = len(LENGTHS)
    order = np.random.default_rng(1).permutation(B)
    hidden_BT = batch["weight_BT"] == 0
    rubbish = {k: np.where(hidden_BT, np.float32(-1e30), batch[k]) for k in ("old_BT", "ref_BT")}
    return [
        ("the whole batch at once", batch, B, 1),
        *((f"micro-batches of {n} row{'s' * (n > 1)}", batch, n, 1) for n in (1, 2, 4)),
        ("rows in another order", {name: x[order] for name, x in batch.items()}, B, 1),
        ("3 more columns on the left", _pad(batch, (3, 0)), B, 1),
        ("2 more columns on the right", _pad(batch, (0, 2)), B, 1),
        ("rubbish outside the mask", batch | rubbish, B, 1),
        *((f"{n} devices", batch, B, n) for n in (2, 4, 8) if n <= jax.local_device_count()),
    ]


def _gradient_of(loss: Callable) -> Callable:
    """Return the jitted f(table_VV, micro-batches) -> (gradient, {"value"})."""

    def loss_fn(table_VV, micro):
        tokens_BT = micro["tokens_BT"]
        logp_BTV = jax.nn.log_softmax(table_VV)[tokens_BT[:, :-1]]
        logp_BT = jnp.take_along_axis(logp_BTV, tokens_BT[:, 1:, None], axis=-1)[..., 0]
        logp_BT = jnp.pad(logp_BT, ((0, 0), (1, 0)))
        names = ("old_BT", "ref_BT", "advantage_B", "weight_BT")
        value = loss(logp_BT, *(micro[name] for name in names))
        value = value[0] if isinstance(value, tuple) else value
        return value, {"value": value}

    return jax.jit(lambda table_VV, micros: accumulate_gradients(loss_fn, table_VV, micros))


def _run(run: Callable, batch: dict, rows_per_micro: int, devices: int) -> dict:
    """Return {"value", "gradient"}: (array, everything counts) of a batch run in this way."""
    mesh = make_mesh("auto", jax.local_devices()[:devices])
    table_VV = np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)
    micros = split_batch(batch, rows_per_micro, mesh)
    gradient, metrics = run(jax.device_put(table_VV, replicated(mesh)), micros)
    arrays = {"value": metrics["value"], "gradient": gradient}
    return {what: (np.asarray(array), np.True_) for what, array in arrays.items()}


def _draw(weights: Callable) -> dict[str, np.ndarray]:
    """Return eight completions behind prompts of 3 tokens, log-probs about 0.3 apart."""
    rng = np.random.default_rng(2)
    B, T = len(LENGTHS), WIDTH + max(LENGTHS)
    mask_BT = (np.arange(T) >= WIDTH) & (np.arange(T) < WIDTH + np.asarray(LENGTHS)[:, None])
    old_BT = -rng.gamma(2.0, 1.0, (B, T))
    return {
        "tokens_BT": rng.integers(0, V, (B, T)).astype(np.int32),
        "old_BT": old_BT.astype(np.float32),
        "ref_BT": (old_BT + rng.normal(0.0, 0.3, (B, T))).astype(np.float32),
        "advantage_B": rng.normal(size=B).astype(np.float32),
        "weight_BT": np.asarray(weights(jnp.asarray(mask_BT)), np.float32),
    }


def _pad(batch: dict, columns: tuple[int, int]) -> dict[str, np.ndarray]:
    """Return the batch with columns of zeros before and behind; their weight is 0."""
    return {
        name: np.pad(x, ((0, 0), columns)) if name.endswith("BT") else x
        for name, x in batch.items()
    }
