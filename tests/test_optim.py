"""Schedule, AdamW and accumulation against NumPy loops; how a batch is cut over a mesh."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gemma_cot import axes
from gemma_cot.config import TrainConfig
from gemma_cot.optim import (
    accumulate_gradients,
    apply_gradients,
    init_state,
    make_optimizer,
    make_schedule,
    split_batch,
)

CFG = TrainConfig(adam_b1=0.8, adam_b2=0.95, weight_decay=0.3, max_grad_norm=0.5)


def reference_rate(step: int, peak: float, total: int, warmup: int) -> float:
    """Return the learning rate of optimiser step 1, 2, ...: linear, then half a cosine to 0."""
    if step <= warmup:
        return peak * step / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def reference_adamw(grads: list[dict], start: dict, rates: list[float], cfg: TrainConfig) -> dict:
    """Return the parameters after AdamW (arXiv:1711.05101, algorithm 2) with one clip a step."""
    values = {name: np.asarray(v, np.float64) for name, v in start.items()}
    m = {name: np.zeros_like(v) for name, v in values.items()}
    v = {name: np.zeros_like(x) for name, x in values.items()}
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        norm = math.sqrt(sum(float((np.asarray(g, np.float64) ** 2).sum()) for g in grad.values()))
        for name, g in grad.items():
            g = np.asarray(g, np.float64) * min(1.0, cfg.max_grad_norm / norm)
            m[name] = cfg.adam_b1 * m[name] + (1 - cfg.adam_b1) * g
            v[name] = cfg.adam_b2 * v[name] + (1 - cfg.adam_b2) * g * g
            m_hat = m[name] / (1 - cfg.adam_b1**t)
            v_hat = v[name] / (1 - cfg.adam_b2**t)
            step = m_hat / (np.sqrt(v_hat) + 1e-8) + cfg.weight_decay * values[name]
            values[name] = values[name] - rate * step
    return values


# ---- schedule -----------------------------------------------------------------------------------


def test_schedule_rises_to_the_peak_and_falls_to_zero():
    schedule = make_schedule(3.0, 39, 0.1)  # warm-up of 4 steps; 0 at step 40, after the last
    rates = [float(schedule(step)) for step in range(41)]
    assert rates[0] == 0.0 and rates[1] == pytest.approx(0.75)  # 3 * 1/4
    assert max(rates) == rates[4] == pytest.approx(3.0)
    assert rates[22] == pytest.approx(1.5)  # half way down: 3 * (1 + cos(pi/2)) / 2
    assert rates[40] == pytest.approx(0.0, abs=1e-6)  # cos(pi) in float32 beside a peak of 3
    assert (np.diff(rates[:5]) > 0).all() and (np.diff(rates[4:]) < 0).all()
    twin = [reference_rate(step, 3.0, 40, 4) for step in range(1, 41)]
    np.testing.assert_allclose(rates[1:], twin, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("total", "warmup_fraction"), [(0, 0.1), (1, 0.1), (1, 1.0), (3, 0.0)])
def test_schedule_of_a_very_short_stage_begins_at_the_peak(total, warmup_fraction):
    assert float(make_schedule(2.0, total, warmup_fraction)(1)) == pytest.approx(2.0)


def test_schedule_that_only_warms_up_ends_at_the_peak():
    schedule = make_schedule(2.0, 5, 1.0)
    rates = [float(schedule(step)) for step in range(1, 6)]
    np.testing.assert_allclose(rates, [0.4, 0.8, 1.2, 1.6, 2.0], rtol=1e-6)


def test_the_first_update_already_moves():
    schedule = make_schedule(0.1, 20, 0.5)
    optimizer = make_optimizer(CFG, schedule)
    state = init_state(optimizer, {"w": jnp.ones(3)})
    assert int(state.step) == 0
    state, _ = apply_gradients(optimizer, state, {"w": jnp.ones(3)})
    # Adam's first step is the sign of the gradient: rate 0.1 * 1/10 times (1 + weight decay 0.3)
    np.testing.assert_allclose(state.lora["w"], 1 - 0.01 * 1.3, rtol=1e-5)
    assert int(state.step) == 1


# ---- AdamW --------------------------------------------------------------------------------------


def draw_grads(sizes: tuple[float, ...]) -> list[dict]:
    """Return one float32 gradient tree per step, of the given sizes."""
    rng = np.random.default_rng(0)
    shapes = {"a": (3, 2), "b": (4,)}
    return [
        {name: (s * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}
        for s in sizes
    ]


def test_three_steps_of_adamw_equal_the_loop():
    grads = draw_grads((10.0, 0.01, 1.0))  # clipped, not clipped, clipped
    start = draw_grads((1.0,))[0]
    schedule = make_schedule(0.05, 6, 0.34)  # warm-up of 2
    optimizer = make_optimizer(CFG, schedule)
    state = init_state(optimizer, jax.tree.map(jnp.asarray, start))
    for grad in grads:
        state, update = apply_gradients(optimizer, state, jax.tree.map(jnp.asarray, grad))
        whole = np.concatenate([g.ravel() for g in grad.values()]).astype(np.float64)
        size = float(np.linalg.norm(whole))
        assert float(update["grad_norm"]) == pytest.approx(size, rel=1e-6)  # unclipped
    rates = [reference_rate(step, 0.05, 7, 2) for step in (1, 2, 3)]  # 0 at step 6 + 1
    twin = reference_adamw(grads, start, rates, CFG)
    for name, value in twin.items():
        # steps of 0.05 known to 6e-8 of numbers near 1
        np.testing.assert_allclose(state.lora[name], value, atol=5e-7)
        assert np.abs(value - start[name]).max() > 0.02


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_an_update_that_is_not_finite_leaves_all_but_the_counters(bad):
    """Adapter and moments stay to the bit, and the next update is one as any other."""
    grads = [jax.tree.map(jnp.asarray, grad) for grad in draw_grads((10.0, 0.01, 1.0))]
    start = jax.tree.map(jnp.asarray, draw_grads((1.0,))[0])
    optimizer = make_optimizer(CFG, make_schedule(0.05, 6, 0.34))
    before, _ = apply_gradients(optimizer, init_state(optimizer, start), grads[0])
    planted = grads[1] | ({"b": grads[1]["b"].at[2].set(jnp.nan)} if bad == "gradient" else {})
    loss = jnp.float32(jnp.inf if bad == "loss" else 1.0)
    after, update = jax.jit(partial(apply_gradients, optimizer))(before, planted, loss)
    assert float(update["skipped"]) == 1.0
    assert int(after.step) == 2 == int(before.step) + 1
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    counters = 0
    for old, new in pairs:
        if jnp.issubdtype(old.dtype, jnp.floating):
            np.testing.assert_array_equal(old, new)
        else:
            counters += 1
            assert int(new) == int(old) + 1
    assert counters == 3  # steps, Adam's and the schedule's
    last, update = apply_gradients(optimizer, after, grads[2], jnp.float32(1.0))
    assert float(update["skipped"]) == 0.0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(last))
    assert float(jnp.abs(last.lora["a"] - before.lora["a"]).max()) > 0.01


# ---- accumulation -------------------------------------------------------------------------------


def squares_loss(lora, micro):
    """Return a loss that is a plain sum over rows, a summed metric and a negative `_max` metric."""
    error_B = micro["x_BT"] @ lora["w"] - micro["y_B"]
    return jnp.square(error_B).sum(), {
        "rows": jnp.float32(error_B.shape[0]),
        "error_max": error_B.max(),
    }


def squares_batch() -> dict[str, np.ndarray]:
    """Return 8 rows of three numbers and targets that every prediction stays below."""
    rng = np.random.default_rng(1)
    x_BT = rng.normal(size=(8, 3)).astype(np.float32)
    return {"x_BT": x_BT, "y_B": rng.uniform(5, 9, 8).astype(np.float32)}


@pytest.mark.parametrize(("rows", "devices"), [(1, 1), (2, 1), (4, 1), (8, 1), (4, 4), (8, 4)])
def test_accumulation_equals_the_whole_batch(rows, devices):
    batch, w = squares_batch(), np.array([0.5, -0.2, 0.1], np.float32)
    mesh = axes.make_mesh(devices=jax.devices()[:devices])
    cut = split_batch(batch, rows, mesh)
    grads, metrics = accumulate_gradients(squares_loss, {"w": jnp.asarray(w)}, cut)
    error_B = batch["x_BT"].astype(np.float64) @ w - batch["y_B"]
    np.testing.assert_allclose(grads["w"], 2 * error_B @ batch["x_BT"], rtol=1e-5)
    assert float(metrics["rows"]) == 8.0
    assert error_B.max() < 0  # the largest of negative numbers is not 0
    assert float(metrics["error_max"]) == pytest.approx(error_B.max(), rel=1e-6)


def test_the_clip_comes_once_after_accumulation():
    """Micro-gradients far above the limit nearly cancel: their sum is below it and stays whole."""

    def linear_loss(lora, micro):
        return (micro["x_BT"] @ lora["w"]).sum(), {}

    x_BT = np.array([[10.0, 0.0], [-10.0, 0.25], [3.0, 4.0], [-3.0, -4.0]], np.float32)
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    lora = {"w": jnp.zeros(2)}
    grads, _ = accumulate_gradients(linear_loss, lora, split_batch({"x_BT": x_BT}, 1, mesh))
    np.testing.assert_array_equal(grads["w"], [0.0, 0.25])
    # After clipping each row to 0.5 first, the sum would be
    clipped = sum(x * min(1.0, 0.5 / np.linalg.norm(x)) for x in x_BT)
    assert np.abs(clipped - [0.0, 0.25]).max() > 0.2
    optimizer = optax.chain(optax.clip_by_global_norm(CFG.max_grad_norm), optax.sgd(1.0))
    state, update = apply_gradients(optimizer, init_state(optimizer, lora), grads)
    np.testing.assert_array_equal(state.lora["w"], [0.0, -0.25])
    assert float(update["grad_norm"]) == 0.25


# ---- layout -------------------------------------------------------------------------------------


def test_split_batch_keeps_the_order_of_rows():
    batch = {
        "tokens_BT": np.arange(12, dtype=np.int32).reshape(6, 2),
        "start_B": np.arange(6, dtype=np.int32),
    }
    cut = split_batch(batch, 2, axes.make_mesh(devices=jax.devices()[:2]))
    assert cut["start_B"].tolist() == [[0, 1], [2, 3], [4, 5]]
    assert cut["tokens_BT"].tolist() == [
        [[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [10, 11]]
    ]  # fmt: skip
    assert cut["tokens_BT"].dtype == jnp.int32


def test_split_batch_puts_each_micro_batch_over_all_devices():
    mesh = axes.make_mesh()
    cut = split_batch({"tokens_BT": np.arange(48).reshape(8, 6).astype(np.int32)}, 4, mesh)
    shards = cut["tokens_BT"].addressable_shards
    assert sorted(shard.data.shape for shard in shards) == [(2, 1, 6)] * 4
    for shard in shards:  # device d runs row d of micro-batch 0, then row d of micro-batch 1
        d = list(mesh.devices.flat).index(shard.device)
        assert np.asarray(shard.data)[:, 0, 0].tolist() == [6 * d, 6 * (4 + d)]
