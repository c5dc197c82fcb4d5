"""Dynamic sampling against a queue in plain Python: which groups enter which update, and with what.

Every number of a group tells which one it is, so that no array can be mixed up unseen.
"""

import dataclasses

import jax
import numpy as np
import pytest
from grpo_reference import reference_advantages, reference_weights

from gemma_cot import axes, checkpoint
from gemma_cot.config import TrainConfig
from gemma_cot.data import Encoded, Example
from gemma_cot.grpo.reserve import MAX_ROLLOUTS, empty_reserve, fill_batches, pack, unpack
from gemma_cot.grpo.rollout import Rollout
from gemma_cot.grpo.step import mini_batches
from gemma_cot.model.sample import Samples
from gemma_cot.optim import split_batch

P, G, T, WIDTH = 4, 2, 7, 3
CFG = TrainConfig(
    num_generations=G, prompts_per_rollout=P, mini_batch=2, micro_batch=2, beta=0.1,
    max_completion_tokens=T - WIDTH, aggregation="dapo", dynamic_sampling=True,
)  # fmt: skip
REWARDS = [  # of rollout 0, 1, ...: which groups have signal is read off
    [[1, 0], [1, 1], [0, 0], [0, 0]],  # 0
    [[0, 0], [0, 0], [1, 1], [0, 0]],  # none
    [[0, 2], [1, 0], [1, 1], [3, 1]],  # 0, 1, 3
    [[0, 1], [1, 0], [2, 1], [0, 3]],  # all
    [[0, 0], [0, 0], [2, 2], [0, 1]],  # 3
    [[0, 0], [1, 2], [2, 1], [1, 1]],  # 1, 2
    [[0, 1], [1, 2], [2, 2], [1, 1]],  # 0, 1
]


@pytest.fixture(scope="module")
def mesh():
    return axes.make_mesh(devices=jax.devices()[:1])


def lengths(number: int) -> np.ndarray:
    """Return the completion tokens of every row of a rollout, 1 to 4."""
    return np.random.default_rng(number).integers(1, T - WIDTH + 1, P * G)


def rolled_out(number: int, mesh, cfg=CFG, rewards=REWARDS) -> tuple[list[dict], Rollout]:
    """Return (mini-batches, Rollout) of a rollout whose row b holds 100 * number + b everywhere."""
    name_B = (100 * number + np.arange(P * G)).astype(np.int32)
    name_BT = np.repeat(name_B[:, None], T, axis=1)
    column_T = np.arange(T)[None]
    mask_BT = (column_T >= WIDTH) & (column_T < WIDTH + lengths(number)[:, None])
    stopped_B, useful_B = np.ones(P * G, bool), np.ones(P * G, np.float32)
    sampler_BT = (name_BT / 8).astype(np.float32)
    samples = Samples(name_BT, mask_BT, sampler_BT, name_B, stopped_B, useful_B)
    rows = cfg.mini_batch * G
    batches = []
    for i, batch in enumerate(mini_batches(samples, cfg, mesh)):
        part_BT = name_BT[i * rows : (i + 1) * rows]
        known = {"logp_old_BT": -part_BT / 4, "logp_ref_BT": -part_BT / 2}
        known = {name: value.astype(np.float32) for name, value in known.items()}
        batches.append(batch | split_batch(known, cfg.micro_batch, mesh))
    scores = {"name": [float(name) for name in name_B], "none": [None] * P * G}
    asked = [Example(100 * number + p, "math", "", "", {}, {}) for p in range(P)]
    rollout = Rollout(
        name_BT, mask_BT, sampler_BT, name_B, stopped_B, useful_B, [""] * P * G, scores,
        np.array(rewards[number], np.float32), np.ones((P, G), bool), number=number,
        rows=tuple(Encoded(example, [], []) for example in asked),
    )  # fmt: skip
    return batches, rollout


def never() -> bool:
    return False


def fills(mesh, count: int, cfg=CFG, rewards=REWARDS) -> list[tuple]:
    """Return (batches, the groups of each, ...) that `fill_batches` gives, time after time."""
    reserve, found = empty_reserve(cfg, T, 2), []
    for _ in range(count):
        updates, *rest = fill_batches(
            reserve, lambda n: rolled_out(n, mesh, cfg, rewards), never, cfg, mesh
        )
        found.append(([batch for batch, _ in updates], [groups for _, groups in updates], *rest))
        reserve = unpack(pack(found[-1][-1], cfg.mini_batch))
    return found


def names(batch: dict) -> list[int]:
    """Return the groups of a batch as 100 * rollout + group."""
    first_B = np.asarray(batch["start_B"]).reshape(-1, G)[:, 0]
    return [int(name) // 100 * 100 + int(name) % 100 // G for name in first_B]


def queue_twin(rewards: list, mini_batch: int) -> list[tuple[list, int, list]]:
    """Return (groups of every update, rollouts that it took, what waits) of every fill."""
    waiting, found, used = [], [], 0
    for number, rollout in enumerate(rewards):
        waiting += [100 * number + p for p, group in enumerate(rollout) if len(set(group)) > 1]
        used += 1
        if len(waiting) >= mini_batch:
            updates = []
            while len(waiting) >= mini_batch:
                updates.append([waiting.pop(0) for _ in range(mini_batch)])
            found.append((updates, used, list(waiting)))
            used = 0
    return found


@pytest.mark.parametrize("mini_batch", [1, 2, 4])
def test_the_groups_of_every_update_are_those_of_a_queue(mesh, mini_batch):
    cfg = dataclasses.replace(CFG, mini_batch=mini_batch)
    twin = queue_twin(REWARDS, mini_batch)
    assert len(twin) == {1: 6, 2: 4, 4: 3}[mini_batch]
    for ours, (updates, rollouts, waiting) in zip(fills(mesh, len(twin), cfg), twin, strict=True):
        batches, groups, rolled, metrics, left = ours
        assert [names(batch) for batch in batches] == updates
        assert [part["row_P"].tolist() for part in groups] == updates
        assert len(rolled) == metrics["rollouts"] == rollouts
        assert metrics["reserve_groups"] == len(waiting) < mini_batch
        assert metrics["filled_groups"] == 0
        assert [name // 100 * 100 + name % 100 // G for name in left.groups["start_B"][:, 0]
                ] == waiting  # fmt: skip


def test_every_group_of_an_update_has_signal_and_its_own_numbers(mesh):
    for batches, *_ in fills(mesh, 4):
        for batch in batches:
            flat = {n: np.asarray(x).reshape(-1, *x.shape[2:]) for n, x in batch.items()}
            name_B = flat["start_B"]
            for name, factor in (("tokens_BT", 1), ("logp_sampler_BT", 1 / 8),
                                 ("logp_old_BT", -1 / 4), ("logp_ref_BT", -1 / 2)):  # fmt: skip
                wanted_BT = np.repeat(factor * name_B[:, None].astype(np.float32), T, axis=1)
                np.testing.assert_array_equal(flat[name], wanted_BT)
            of = [(int(name) // 100, int(name) % 100) for name in name_B]
            reward_PG = np.array([REWARDS[n][b // G][b % G] for n, b in of]).reshape(-1, G)
            assert (reward_PG[:, 0] != reward_PG[:, 1]).all()
            advantage_PG = reference_advantages(reward_PG, reward_PG > -1, "group", 1e-4)
            np.testing.assert_allclose(flat["advantage_B"], advantage_PG.reshape(-1), rtol=1e-5)
            n_B1 = np.array([lengths(n)[b] for n, b in of])[:, None]
            mask_BT = (np.arange(T) >= WIDTH) & (np.arange(T) < WIDTH + n_B1)
            weight_BT = reference_weights(mask_BT, "dapo", T - WIDTH)
            np.testing.assert_allclose(flat["weight_BT"], weight_BT, rtol=1e-6)


def test_where_a_group_is_from_and_its_scores_go_with_it(mesh):
    """Through the checkpoint, which `fills` packs and unpacks the reserve for."""
    found = fills(mesh, 4)
    assert sum(batch["rollout_P"].min() < batch["rollout_P"].max() for f in found for batch in f[1])
    for batches, groups, *_ in found:
        for batch, part in zip(batches, groups, strict=True):
            name_PG = np.asarray(batch["start_B"]).reshape(-1, G)
            np.testing.assert_array_equal(part["rollout_P"], name_PG[:, 0] // 100)
            np.testing.assert_array_equal(part["score_PKG"][:, 0], name_PG)
            assert np.isnan(part["score_PKG"][:, 1]).all(), "None stays None"


def test_one_std_is_taken_over_the_groups_of_the_update(mesh):
    cfg = dataclasses.replace(CFG, advantage_scale="batch")
    batch = fills(mesh, 4, cfg)[3][0][0]
    assert names(batch) == [502, 600]  # from two rollouts
    reward_PG = np.array([[2, 1], [0, 1]])
    advantage_PG = reference_advantages(reward_PG, reward_PG > -1, "batch", 1e-4)
    ours_B = np.asarray(batch["advantage_B"]).reshape(-1)
    np.testing.assert_allclose(ours_B, advantage_PG.reshape(-1), rtol=1e-5)


def test_wasted_tokens_are_those_of_groups_without_signal(mesh):
    first, second, *_ = fills(mesh, 4)
    n_PG = [lengths(number).reshape(P, G) for number in range(4)]
    used = n_PG[0][0].sum() + n_PG[2][[0, 1, 3]].sum()  # those that wait count as used
    sampled = sum(n.sum() for n in n_PG[:3])
    assert first[3]["wasted_tokens"] == pytest.approx(1 - used / sampled)
    assert second[3]["wasted_tokens"] == 0.0  # rollout 3: all have signal


def test_rollouts_without_signal_come_to_an_end(mesh):
    equal = [[[1, 1]] * P] * (MAX_ROLLOUTS - 1) + [[[0, 1]] + [[0, 0]] * (P - 1)]
    (batches, _, rollouts, metrics, left), = fills(mesh, 1, rewards=equal)
    last = 100 * (MAX_ROLLOUTS - 1)
    assert len(rollouts) == MAX_ROLLOUTS == left.rollouts
    assert [names(batch) for batch in batches] == [[last, last + 1]]  # one with signal, one not
    advantage_PG = np.asarray(batches[0]["advantage_B"]).reshape(-1, G)
    assert (advantage_PG[0] != 0).all() and (advantage_PG[1] == 0).all()
    assert metrics["filled_groups"] == 1 and metrics["reserve_groups"] == 0
    used = lengths(MAX_ROLLOUTS - 1)[: 2 * G].sum()
    sampled = sum(lengths(number).sum() for number in range(MAX_ROLLOUTS))
    assert metrics["wasted_tokens"] == pytest.approx(1 - used / sampled)


def test_a_stop_between_rollouts_leaves_the_reserve_as_it_was(mesh):
    cfg = dataclasses.replace(CFG, mini_batch=4)
    before = fills(mesh, 3, cfg)[2][-1]
    assert names(before.groups) == [601]  # one waits; rollout 0 would add one each time
    asked = iter((False, True))
    updates, rollouts, metrics, after = fill_batches(
        dataclasses.replace(before, rollouts=0), lambda n: rolled_out(0, mesh, cfg),
        lambda: next(asked), cfg, mesh,
    )  # fmt: skip
    assert (updates, len(rollouts), metrics) == ([], 2, {})
    assert after == dataclasses.replace(before, rollouts=0)


def test_a_checkpoint_holds_the_reserve_at_a_fixed_shape(mesh, tmp_path):
    reserves = [found[-1] for found in fills(mesh, 4)]
    assert [len(r.groups["start_B"]) for r in reserves] == [0, 0, 1, 1]
    like = pack(empty_reserve(CFG, T, 2), 4)
    for step, reserve in enumerate(reserves):
        packed = pack(reserve, 4)
        assert {n: x.shape for n, x in packed.items()} == {n: x.shape for n, x in like.items()}
        checkpoint.save(tmp_path, step, {"reserve": packed}, {})
        back = unpack(checkpoint.restore(tmp_path, {"reserve": like}, step)[0]["reserve"])
        assert back.rollouts == reserve.rollouts
        for name, value in reserve.groups.items():
            np.testing.assert_array_equal(back.groups[name], value)
            assert back.groups[name].dtype == value.dtype
