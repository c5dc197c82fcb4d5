"""One rollout to updates on a tiny model: how the batch is cut, and over what, changes nothing.

Most tests update by plain gradient descent with rate 1, so that new - old adapter is the gradient
itself: Adam would divide it by its own size and turn float noise near 0 into whole steps.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from grpo_reference import reference_advantages, reference_kl_penalty, reference_weights

from gemma_cot import axes
from gemma_cot.config import TrainConfig
from gemma_cot.grpo.loss import grpo_loss
from gemma_cot.grpo.rollout import Rollout
from gemma_cot.grpo.step import (
    add_advantages,
    add_logprobs,
    columns_of,
    make_grpo_step,
    make_logprobs,
    mini_batches,
    needs_old,
    shared_rows,
)
from gemma_cot.lora import init_lora
from gemma_cot.model.logprob import token_logprobs
from gemma_cot.model.params import param_shardings
from gemma_cot.model.sample import Samples
from gemma_cot.optim import init_state, make_optimizer

WIDTH, LONGEST = 6, 5
P, G = 4, 2
N_B = [5, 1, 3, 5, 2, 4, 1, 3]  # completion tokens: uneven, two stop tokens alone
START_B = [0, 0, 2, 2, 4, 4, 1, 1]
REWARD_PG = [[1.0, 0.0], [0.2, 2.0], [0.5, 0.5], [0.0, 1.2]]  # group 2 has no signal
CFG = TrainConfig(
    num_generations=G, prompts_per_rollout=P, mini_batch=2, micro_batch=1, beta=0.5,
    max_completion_tokens=LONGEST, temperature=0.7, aggregation="grpo",
)  # fmt: skip
SGD = optax.sgd(1.0)

logprobs_of = jax.jit(token_logprobs, static_argnames=("cfg", "temperature"))


def draw_lora(cfg, seed: int):
    """Return an adapter of rank 2 whose b is not 0."""
    lora = init_lora(jax.random.key(seed), cfg, 2, 3.0)
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), jnp.float32), lora
    )


@pytest.fixture(scope="module")
def policy(shallow):
    return draw_lora(shallow, 3)


@pytest.fixture(scope="module")
def reference(shallow):
    return draw_lora(shallow, 4)


@pytest.fixture(scope="module")
def rollout(shallow, weights, policy) -> Rollout:
    """Eight completions of random tokens, with the log-probs a sampler would have recorded."""
    rng = np.random.default_rng(0)
    B, T = P * G, WIDTH + LONGEST
    column_T, n_B1 = np.arange(T)[None, :], np.array(N_B)[:, None]
    mask_BT = (column_T >= WIDTH) & (column_T < WIDTH + n_B1)
    real_BT = (column_T >= np.array(START_B)[:, None]) & (column_T < WIDTH + n_B1)
    tokens_BT = np.where(real_BT, rng.integers(3, 50, (B, T)), 0).astype(np.int32)
    tokens_BT[:, :WIDTH] = np.repeat(tokens_BT[::G, :WIDTH], G, axis=0)  # a group has one prompt
    start_B = np.array(START_B, np.int32)
    logp_BT = logprobs_of(weights, shallow, tokens_BT, start_B, policy, CFG.temperature)
    return Rollout(
        tokens_BT=tokens_BT,
        mask_BT=mask_BT,
        logp_BT=np.where(mask_BT, logp_BT, np.float32(0)),
        start_B=start_B,
        stopped_B=np.array(N_B) < LONGEST,
        useful_B=np.full(4, 0.75, np.float32),
        completions=[""] * B,
        scores={},
        reward_PG=np.array(REWARD_PG, np.float32),
        valid_PG=np.ones((P, G), bool),
    )


def scored_batches(rollout: Rollout, cfg: TrainConfig, mesh) -> list[dict]:
    """Return the mini-batches of a rollout with their advantages."""
    samples = Samples(
        rollout.tokens_BT, rollout.mask_BT, rollout.logp_BT, rollout.start_B, rollout.stopped_B,
        rollout.useful_B,
    )  # fmt: skip
    batches = mini_batches(samples, cfg, mesh)
    return add_advantages(batches, rollout.reward_PG, rollout.valid_PG, cfg, mesh)


@functools.cache
def compiled(model_cfg, cfg: TrainConfig, data: int = 1, model: int = 1, optimizer=SGD):
    """Return (mesh, step, logprobs) over the first host devices; compiled once."""
    mesh = axes.make_mesh(f"{data}x{model}", jax.devices()[: data * model])
    step = make_grpo_step(model_cfg, cfg, optimizer, mesh, WIDTH)
    return mesh, step, make_logprobs(model_cfg, cfg, mesh, WIDTH)


def copy(tree):
    """Return a copy that a donating step may eat."""
    return jax.tree.map(jnp.copy, tree)


def distance(tree, other) -> float:
    """Return the largest difference of any number of two adapters."""
    gaps = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), tree, other)
    return max(jax.tree.leaves(gaps))


def updates(model_cfg, params, rollout, policy, reference, data=1, model=1, **changes):
    """Return (adapter after every update of the rollout, metrics of every update)."""
    cfg = dataclasses.replace(CFG, **changes)
    mesh, step, logprobs = compiled(model_cfg, cfg, data, model)
    params = jax.device_put(params, param_shardings(mesh))
    batches = scored_batches(rollout, cfg, mesh)
    batches = add_logprobs(logprobs, params, batches, policy, reference, cfg)
    assert all({"logp_old_BT", "logp_ref_BT"} < set(batch) for batch in batches)
    state = jax.device_put(init_state(SGD, copy(policy)), axes.replicated(mesh))
    adapters, metrics = [], []
    for batch in batches:
        state, measured = step(state, params, batch)
        adapters.append(jax.device_get(state.lora))
        metrics.append({name: float(value) for name, value in measured.items()})
    return adapters, metrics


@pytest.fixture(scope="module")
def one_by_one(shallow, weights, rollout, policy, reference):
    """Both updates of the rollout with micro-batches of one row on one device."""
    return updates(shallow, weights, rollout, policy, reference)


def test_mini_batches_are_a_picture_of_the_rollout(rollout):
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    first, second = scored_batches(rollout, CFG, mesh)
    # 2 prompts x 2 completions a mini-batch, cut into 4 micro-batches of 1 row
    assert first["tokens_BT"].shape == (4, 1, WIDTH + LONGEST)
    np.testing.assert_array_equal(second["tokens_BT"][:, 0], rollout.tokens_BT[4:])
    np.testing.assert_array_equal(second["start_B"][:, 0], START_B[4:])
    np.testing.assert_array_equal(second["logp_sampler_BT"][:, 0], rollout.logp_BT[4:])
    # Advantages are taken over the whole rollout, weights over each mini-batch: 1/(4 n_i).
    twin_PG = reference_advantages(REWARD_PG, rollout.valid_PG, "group", 1e-4)
    ours = np.concatenate([first["advantage_B"][:, 0], second["advantage_B"][:, 0]])
    np.testing.assert_allclose(ours, twin_PG.reshape(-1), rtol=1e-5)
    for batch, part in ((first, slice(0, 4)), (second, slice(4, 8))):
        twin_BT = reference_weights(rollout.mask_BT[part], "grpo", LONGEST)
        np.testing.assert_allclose(batch["weight_BT"][:, 0], twin_BT, rtol=1e-6)


def test_the_update_is_the_gradient_of_the_loss_written_out(
    shallow, weights, rollout, policy, reference, one_by_one
):
    """A twin of stops 6 to 9: NumPy weights, one jax.grad over the whole uncut batch."""
    part = slice(0, 4)
    tokens_BT, start_B = rollout.tokens_BT[part], rollout.start_B[part]
    weight_BT = jnp.asarray(
        reference_weights(rollout.mask_BT[part], "grpo", LONGEST).astype(np.float32)
    )
    advantage_PG = reference_advantages(REWARD_PG, rollout.valid_PG, "group", 1e-4)
    advantage_B = jnp.asarray(advantage_PG.reshape(-1)[part].astype(np.float32))
    ref_BT = logprobs_of(
        weights, shallow, rollout.tokens_BT, rollout.start_B, reference, CFG.temperature
    )[part]

    def loss(lora):
        logp_BT = token_logprobs(weights, shallow, tokens_BT, start_B, lora, CFG.temperature)
        return grpo_loss(logp_BT, None, ref_BT, advantage_B, weight_BT, beta=CFG.beta)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(policy)
    expected = jax.tree.map(lambda x, g: x - g, policy, gradient)  # descent, rate 1
    adapters, metrics = one_by_one
    # float32 sums in another order: 1e-5 of the largest entry of a gradient near 1
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    assert size > 0.05 and distance(adapters[0], expected) < 1e-5 * max(size, 1.0)
    assert metrics[0]["loss"] == pytest.approx(float(value), rel=2e-5)
    norm = np.sqrt(sum(float((np.asarray(g) ** 2).sum()) for g in jax.tree.leaves(gradient)))
    assert metrics[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_prompt_is_shared_where_a_micro_batch_holds_whole_groups(shallow):
    shared = [
        shared_rows(shallow, dataclasses.replace(CFG, micro_batch=m, num_generations=4))
        for m in (1, 2, 4, 6, 8)
    ]
    assert shared == [1, 1, 4, 1, 4]
    with_kernels = dataclasses.replace(shallow, attention="pallas")
    assert shared_rows(with_kernels, dataclasses.replace(CFG, micro_batch=2)) == 1


@pytest.mark.parametrize(
    ("micro_batch", "data", "model"), [(2, 1, 1), (4, 1, 1), (1, 4, 1), (2, 2, 1), (2, 2, 2)]
)
def test_cutting_the_batch_or_adding_devices_changes_nothing(
    shallow, weights, rollout, policy, reference, one_by_one, micro_batch, data, model
):
    """Both updates, the second with pi_old from before the first, on rows of uneven length.

    With micro-batches of 2 and 4 rows each prompt is run once for its group of 2."""
    adapters, metrics = updates(
        shallow, weights, rollout, policy, reference, data, model, micro_batch=micro_batch
    )
    for ours, alone in zip(adapters, one_by_one[0], strict=True):
        # Only the order of float32 sums differs: about 1e-6 of gradients near 1. A mean of
        # micro-batch means would be off by several per cent.
        assert distance(ours, alone) < 2e-5
    assert distance(adapters[0], policy) > 0.05
    for ours, alone in zip(metrics, one_by_one[1], strict=True):
        assert ours == pytest.approx(alone, rel=1e-4, abs=2e-5)


def test_every_adapter_leaf_moves_and_the_base_does_not(
    shallow, weights, rollout, policy, reference, one_by_one
):
    before = copy(weights)
    adapters, _ = one_by_one
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), *adapters)
    assert all(jax.tree.leaves(moved)) and len(jax.tree.leaves(moved)) == 14
    mesh, step, logprobs = compiled(shallow, CFG)
    state = init_state(SGD, copy(policy))
    batches = scored_batches(rollout, CFG, mesh)
    batches = add_logprobs(logprobs, weights, batches, policy, reference, CFG)
    new, _ = step(state, weights, batches[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))  # donated
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    same = jax.tree.map(lambda x, y: bool((x == y).all()), weights, before)
    assert all(jax.tree.leaves(same))
    assert int(new.step) == 1


@pytest.mark.parametrize(
    ("buckets", "longest", "width"),
    [(1, 3, 5), (5, 3, 3), (2, 3, 3), (2, 4, 5), (2, 1, 3), (9, 5, 5)],
)
def test_an_update_takes_the_least_width_that_holds_its_longest_completion(buckets, longest, width):
    """5 in 2 widths: 3 and 5."""
    mask_BT = np.arange(WIDTH + LONGEST)[None] < WIDTH + np.array([[1], [longest]])
    mask_BT &= np.arange(WIDTH + LONGEST) >= WIDTH
    cfg = dataclasses.replace(CFG, length_buckets=buckets)
    assert columns_of(mask_BT, cfg) == WIDTH + width
    waits = dataclasses.replace(cfg, dynamic_sampling=True)
    assert columns_of(mask_BT, waits) == WIDTH + LONGEST


def test_widths_of_updates_change_nothing(shallow, weights, rollout, policy, reference):
    short = dataclasses.replace(rollout, mask_BT=rollout.mask_BT.copy())
    short.mask_BT[:4, WIDTH + 3 :] = False  # the first mini-batch: at most 3 tokens
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    cut = dataclasses.replace(CFG, length_buckets=2)
    widths = [batch["tokens_BT"].shape[-1] for batch in scored_batches(short, cut, mesh)]
    assert widths == [WIDTH + 3, WIDTH + 5]
    got = updates(shallow, weights, short, policy, reference, length_buckets=2)
    want = updates(shallow, weights, short, policy, reference)
    for ours, whole in zip(got[0], want[0], strict=True):
        assert distance(ours, whole) < 1e-5
    for ours, whole in zip(got[1], want[1], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4, abs=1e-5)


def test_the_first_update_is_on_policy(one_by_one):
    _, (first, second) = one_by_one
    assert first["ratio_max"] == pytest.approx(1.0, abs=1e-5)  # e^x of a log-prob error of 1e-6
    assert first["clip_share"] == 0.0
    assert first["logp_drift_max"] < 1e-5  # sampler and trainer see the same network
    assert second["logp_drift_max"] < 1e-5  # pi_old is the sampler's policy, not the updated one
    assert abs(second["ratio_max"] - 1.0) > 1e-3


@pytest.mark.parametrize("remat", ["none", "products", "all"])
def test_the_first_update_is_on_policy_in_bfloat16_to_the_bit(
    shallow, weights, rollout, policy, reference, remat
):
    narrow = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights)
    _, (first, _) = updates(shallow, narrow, rollout, policy, reference, remat=remat,
                            epsilon=1e-7, epsilon_high=1e-7)  # fmt: skip
    assert (first["ratio_max"], first["clip_share"]) == (1.0, 0.0)


def test_pi_old_is_the_policy_before_the_first_update(
    shallow, weights, rollout, policy, one_by_one
):
    mesh, _, logprobs = compiled(shallow, CFG)
    batches = scored_batches(rollout, CFG, mesh)
    no_kl = dataclasses.replace(CFG, beta=0.0)
    batches = add_logprobs(logprobs, weights, batches, policy, None, no_kl)
    old_BT = np.concatenate([np.asarray(batch["logp_old_BT"])[:, 0] for batch in batches])
    mask_BT = rollout.mask_BT
    np.testing.assert_allclose(old_BT[mask_BT], rollout.logp_BT[mask_BT], atol=1e-5)
    # The second update's ratio: the adapter after the first update against that policy.
    adapters, (_, second) = one_by_one
    now_BT = logprobs_of(
        weights, shallow, rollout.tokens_BT, rollout.start_B, adapters[0], CFG.temperature
    )
    ratio_BT = np.exp(np.asarray(now_BT) - rollout.logp_BT)[4:][mask_BT[4:]]
    assert second["ratio_max"] == pytest.approx(max(ratio_BT.max(), 1.0), rel=1e-4)


def test_the_reference_is_an_adapter_or_the_base(shallow, weights, rollout, policy, reference):
    mesh, _, logprobs = compiled(shallow, CFG)
    batches = scored_batches(rollout, CFG, mesh)
    layers = {name: ab | {"b": jnp.zeros_like(ab["b"])} for name, ab in policy.layers.items()}
    nothing = policy.replace(layers=layers)  # b = 0: the base model
    for adapter, twin in ((reference, reference), (None, nothing)):
        added = add_logprobs(logprobs, weights, batches, policy, adapter, CFG)
        ours = np.concatenate([np.asarray(batch["logp_ref_BT"])[:, 0] for batch in added])
        twin_BT = logprobs_of(
            weights, shallow, rollout.tokens_BT, rollout.start_B, twin, CFG.temperature
        )
        mask_BT = rollout.mask_BT
        np.testing.assert_allclose(ours[mask_BT], np.asarray(twin_BT)[mask_BT], atol=1e-5)


def test_a_reward_beyond_float32_skips_its_update_alone(
    shallow, weights, rollout, policy, reference
):
    """1e39 is a finite score and no float32: the group's advantages are NaN, the update is left
    out, and the other update of the rollout is the one that it always was."""
    reward_PG = np.array(REWARD_PG)
    with np.errstate(over="ignore"):
        reward_PG[0, 1] = np.float32(1e39)
    planted = dataclasses.replace(rollout, reward_PG=reward_PG.astype(np.float32))
    adapters, metrics = updates(shallow, weights, planted, policy, reference)
    assert [m["skipped"] for m in metrics] == [1.0, 0.0] and np.isnan(metrics[0]["loss"])
    assert distance(adapters[0], policy) == 0.0
    mesh, step, logprobs = compiled(shallow, CFG)
    second = scored_batches(rollout, CFG, mesh)
    second = add_logprobs(logprobs, weights, second, policy, reference, CFG)[1]
    alone, _ = step(init_state(SGD, copy(policy)), weights, second)
    assert distance(adapters[1], alone.lora) == 0.0 < distance(alone.lora, policy)


# ---- by flag ------------------------------------------------------------------------------------

RLOO = dataclasses.replace(
    CFG, objective="rloo", baseline="leave_one_out", advantage_scale="none", kl="k1",
    kl_in="reward", mini_batch=P, micro_batch=2 * G,
)  # fmt: skip


def test_rloo_with_its_kl_in_the_reward_is_reinforce_written_out(
    shallow, weights, rollout, policy, reference
):
    """sum_i -A_i log pi(o_i) / B, A_i against the other rewards less beta times their KL."""
    mesh, step, logprobs = compiled(shallow, RLOO)
    samples = Samples(
        rollout.tokens_BT, rollout.mask_BT, rollout.logp_BT, rollout.start_B, rollout.stopped_B,
        rollout.useful_B,
    )  # fmt: skip
    batches = mini_batches(samples, RLOO, mesh)
    batches = add_logprobs(logprobs, weights, batches, policy, reference, RLOO)
    batches = add_advantages(batches, rollout.reward_PG, rollout.valid_PG, RLOO, mesh)
    places = (rollout.tokens_BT, rollout.start_B)
    ref_BT = logprobs_of(weights, shallow, *places, reference, RLOO.temperature)
    penalty_B = reference_kl_penalty(rollout.logp_BT, ref_BT, rollout.mask_BT, "k1")
    reward_PG = rollout.reward_PG - RLOO.beta * penalty_B.reshape(P, G)
    twin_PG = reference_advantages(reward_PG, rollout.valid_PG, "none", 1e-4, "leave_one_out")
    ours_B = np.asarray(batches[0]["advantage_B"]).reshape(-1)
    np.testing.assert_allclose(ours_B, twin_PG.reshape(-1), rtol=1e-4, atol=1e-4)
    # KL gives a group whose rewards are equal something to learn
    assert np.abs(twin_PG[2]).min() > 1e-3

    def loss(lora):
        logp_BT = token_logprobs(weights, shallow, *places, lora, RLOO.temperature)
        logp_B = jnp.where(rollout.mask_BT, logp_BT, 0.0).sum(axis=1)
        return -(ours_B * logp_B).mean()

    gradient = jax.jit(jax.grad(loss))(policy)
    expected = jax.tree.map(lambda x, g: x - g, policy, gradient)  # descent, rate 1
    state, metrics = step(init_state(SGD, copy(policy)), weights, batches[0])
    size = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient))
    assert size > 0.05 and distance(state.lora, expected) < 5e-5 * max(size, 1.0)
    assert float(metrics["kl"]) > 0.0  # measured, though not in the loss


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({}, False),
        (dict(mini_batch=2), True),  # the second update is off-policy
        (dict(num_iterations=2), True),
        (dict(dynamic_sampling=True), True),  # a row may wait for a later update
        (dict(beta=0.1), False),
        (dict(beta=0.1, kl_in="reward", kl="k1"), True),
    ],
)
def test_when_the_log_probs_of_the_rollout_are_needed(changes, needed):
    assert needs_old(dataclasses.replace(ALONE, **changes)) is needed


# ---- one update a rollout, without KL -----------------------------------------------------------

ALONE = TrainConfig(
    num_generations=G, prompts_per_rollout=P, mini_batch=P, micro_batch=P * G, beta=0.0,
    max_completion_tokens=LONGEST, temperature=0.7, learning_rate=0.01, weight_decay=0.0,
    max_grad_norm=1.0, aggregation="dapo",
)  # fmt: skip
ADAM = make_optimizer(ALONE, optax.constant_schedule(ALONE.learning_rate))


def test_without_beta_and_with_one_update_no_logprobs_are_computed(rollout, policy):
    mesh = axes.make_mesh(devices=jax.devices()[:1])
    batches = scored_batches(rollout, ALONE, mesh)
    assert len(batches) == 1
    # No function and no parameters to compute them with: nothing may be called.
    same = add_logprobs(None, None, batches, policy, None, ALONE)
    assert same is batches and set(same[0]) == {
        "tokens_BT", "start_B", "logp_sampler_BT", "advantage_B", "weight_BT"
    }  # fmt: skip


def test_updates_make_rewarded_completions_likelier(shallow, weights, rollout, policy):
    """Policy gradient works: ten updates raise what was rewarded and lower its alternative."""
    mesh, step, _ = compiled(shallow, ALONE, optimizer=ADAM)
    (batch,) = scored_batches(rollout, ALONE, mesh)
    state = init_state(ADAM, copy(policy))

    def logp_PG(lora):
        logp_BT = logprobs_of(
            weights, shallow, rollout.tokens_BT, rollout.start_B, lora, ALONE.temperature
        )
        return np.where(rollout.mask_BT, logp_BT, 0.0).sum(axis=1).reshape(P, G)

    before_PG, norms = logp_PG(state.lora), []
    for _ in range(10):
        state, metrics = step(state, weights, batch)
        norms.append(float(metrics["grad_norm"]))
        assert float(metrics["ratio_max"]) == 1.0  # pi_old is pi itself, to the bit
    gain_PG = logp_PG(state.lora) - before_PG
    best_P = np.argmax(REWARD_PG, axis=1)
    for p in (0, 1, 3):  # group 2 has no signal
        assert gain_PG[p, best_P[p]] > 0.1 and gain_PG[p, 1 - best_P[p]] < -0.1
    assert all(norm > 0 for norm in norms) and int(state.step) == 10
