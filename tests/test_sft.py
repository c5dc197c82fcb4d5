"""SFT: the loss is minus the mean log-prob of target tokens, however the batch is cut; it falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_cot import axes
from gemma_cot.data import Encoded, Example
from gemma_cot.lora import init_lora
from gemma_cot.model.logprob import token_logprobs
from gemma_cot.optim import init_state, split_batch
from gemma_cot.sft import make_sft_step, sft_batch, sft_loss

WIDTH, TARGET_WIDTH = 6, 7
STOP = 49
PROMPT_LENGTHS = (6, 2, 4, 3)
TARGET_LENGTHS = (7, 1, 3, 5)  # stop token included; row 1 is a stop token alone
SGD = optax.sgd(0.1)


@pytest.fixture(scope="module")
def rows() -> list[Encoded]:
    """Four rows of random tokens, prompts and targets of uneven lengths."""
    rng = np.random.default_rng(0)
    example = Example(1, "math", "", "", {}, {})
    return [
        Encoded(example, rng.integers(3, 49, p).tolist(), [*rng.integers(3, 49, n - 1), STOP])
        for p, n in zip(PROMPT_LENGTHS, TARGET_LENGTHS, strict=True)
    ]


@pytest.fixture(scope="module")
def lora(shallow):
    """An adapter of rank 2 whose b is not 0."""
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32),
        init_lora(jax.random.key(1), shallow, 2, 3.0),
    )


@pytest.fixture(scope="module")
def loss_and_slope(shallow, weights, lora, rows):
    """Return (loss, d loss / d weight_BT) of the batch of all rows."""
    micro = jax.tree.map(jnp.asarray, sft_batch(rows, WIDTH, TARGET_WIDTH))

    def loss_of(weight_BT):
        return sft_loss(lora, weights, shallow, micro | {"weight_BT": weight_BT}, WIDTH, False)

    (loss, metrics), slope_BT = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(
        micro["weight_BT"]
    )
    assert float(metrics["loss"]) == float(loss)
    return float(loss), np.asarray(slope_BT)


def test_batch_as_a_picture(rows):
    batch = sft_batch(rows, WIDTH, TARGET_WIDTH)
    assert set(batch) == {"tokens_BT", "start_B", "weight_BT"}
    assert batch["start_B"].tolist() == [0, 4, 2, 3]
    w = np.float32(1 / 16)  # 7 + 1 + 3 + 5 target tokens
    expected = [
        [0, 0, 0, 0, 0, 0, w, w, w, w, w, w, w],
        [0, 0, 0, 0, 0, 0, w, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, w, w, w, 0, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, w, w, w, w, w, 0, 0],
    ]
    np.testing.assert_array_equal(batch["weight_BT"], np.array(expected, np.float32))
    last = np.array(TARGET_LENGTHS) - 1 + WIDTH
    assert (batch["tokens_BT"][np.arange(4), last] == STOP).all()  # the stop token is learnt


def test_loss_is_minus_the_mean_over_target_tokens(shallow, weights, lora, rows, loss_and_slope):
    """The target tokens, their stop token among them, picked one by one."""
    batch = sft_batch(rows, WIDTH, TARGET_WIDTH)
    logprobs_of = jax.jit(token_logprobs, static_argnames="cfg")
    logp_BT = np.asarray(
        logprobs_of(weights, shallow, batch["tokens_BT"], batch["start_B"], lora), np.float64
    )
    picked = [
        logp_BT[b, WIDTH + i] for b, row in enumerate(rows) for i in range(len(row.target_ids))
    ]
    assert len(picked) == sum(TARGET_LENGTHS)
    # 16 float32 terms near 4
    assert loss_and_slope[0] == pytest.approx(-sum(picked) / len(picked), rel=1e-5)


def test_the_prompt_is_never_a_target(rows, loss_and_slope):
    """d loss / d w_bt = -log p(token_bt): 0 in every column of the prompt, so that no weight there
    could bring a prompt token in; above 0 on every target token."""
    weight_BT = sft_batch(rows, WIDTH, TARGET_WIDTH)["weight_BT"]
    slope_BT = loss_and_slope[1]
    assert (weight_BT[:, :WIDTH] == 0).all() and (slope_BT[:, :WIDTH] == 0).all()
    assert (slope_BT[weight_BT > 0] > 0).all()


@functools.cache
def compiled(cfg, devices: int):
    """Return (mesh, step) over the first host devices, by gradient descent with rate 0.1."""
    mesh = axes.make_mesh(devices=jax.devices()[:devices])
    return mesh, make_sft_step(cfg, SGD, mesh, WIDTH, remat="none")


def run_steps(shallow, weights, lora, rows, rows_per_micro=4, devices=1, steps=1):
    """Return (adapter, metrics of every step) after `steps` on the same four rows."""
    mesh, step = compiled(shallow, devices)
    state, history = init_state(SGD, jax.tree.map(jnp.copy, lora)), []
    for _ in range(steps):
        batch = split_batch(sft_batch(rows, WIDTH, TARGET_WIDTH), rows_per_micro, mesh)
        state, metrics = step(state, weights, batch)
        history.append({name: float(value) for name, value in metrics.items()})
    return jax.device_get(state.lora), history


def test_cutting_the_batch_or_adding_devices_changes_nothing(shallow, weights, lora, rows):
    whole, (metrics,) = run_steps(shallow, weights, lora, rows)
    assert metrics["tokens"] == 16 and metrics["grad_norm"] > 0.1
    for rows_per_micro, devices in ((1, 1), (4, 4)):
        other, (cut,) = run_steps(shallow, weights, lora, rows, rows_per_micro, devices)
        gaps = jax.tree.map(lambda x, y: np.abs(x - y).max(), whole, other)
        # the order of float32 sums alone; a mean of micro-batch means is off by per cents
        assert max(jax.tree.leaves(gaps)) < 1e-5
        assert cut == pytest.approx(metrics, rel=1e-5)


def test_a_few_steps_lower_the_loss(shallow, weights, lora, rows):
    before = jax.tree.map(jnp.copy, weights)
    adapter, history = run_steps(shallow, weights, lora, rows, steps=6)
    losses = [metrics["loss"] for metrics in history]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] - 0.3
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), adapter, lora)
    assert all(jax.tree.leaves(moved))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), weights, before)
    assert all(jax.tree.leaves(same))


@pytest.mark.parametrize("devices", [1, 4])
def test_a_nan_in_one_row_skips_the_update(shallow, weights, lora, rows, devices):
    """Whichever device meets it, all of them keep the adapter that they had."""
    mesh, step = compiled(shallow, devices)
    batch = sft_batch(rows, WIDTH, TARGET_WIDTH)
    batch["weight_BT"][2, WIDTH] = np.nan
    state = init_state(SGD, jax.tree.map(jnp.copy, lora))
    state, metrics = step(state, weights, split_batch(batch, 4, mesh))
    assert float(metrics["skipped"]) == 1.0 and np.isnan(float(metrics["loss"]))
    assert int(state.step) == 1
    for new, old in zip(jax.tree.leaves(state.lora), jax.tree.leaves(lora), strict=True):
        np.testing.assert_array_equal(new, old)
    good = split_batch(sft_batch(rows, WIDTH, TARGET_WIDTH), 4, mesh)
    state, metrics = step(state, weights, good)
    assert float(metrics["skipped"]) == 0.0 and np.isfinite(float(metrics["loss"]))
