"""Dynamic sampling: every group of an update has signal (DAPO, arXiv:2503.14476, section 3.2).

A group whose rewards are equal has advantage 0. Rollouts go on until a mini-batch of other groups
is there; those left over wait in the reserve for the next update, the oldest first, with the
log-probs of the policy that sampled them. What goes to the devices has the shape of any other
mini-batch, so nothing is compiled anew. A group's origin and scores go with it. Host arrays.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.config import TrainConfig
from gemma_cot.grpo.rollout import Rollout, score_array, signal
from gemma_cot.grpo.step import add_advantages, weighted_batch

MAX_ROLLOUTS = 8  # for one update; a mini-batch that they do not fill is filled up without signal

# What an update needs of its groups, [P, G, ...], named as in a batch; and `origins`, [P, ...].
Groups = dict[str, np.ndarray]


@dataclass(frozen=True)
class Reserve:
    """What dynamic sampling carries from one update to the next, and into checkpoints."""

    groups: Groups  # with signal, oldest first, fewer than a mini-batch of them
    rollouts: int  # rollouts made: the number of the next one


def fill_batches(
    reserve: Reserve,
    roll_out: Callable[[int], tuple[list[dict], Rollout]],
    stop: Callable[[], bool],
    cfg: TrainConfig,
    mesh: Mesh,
) -> tuple[list[tuple[dict, Groups]], list[Rollout], dict[str, float], Reserve]:
    """Roll out until there are mini-batches of groups with signal.

    Returns (updates: each a batch and its groups, rollouts, metrics, what is left over).

    roll_out(number) -> (its mini-batches with old and reference log-probs, Rollout). After
    MAX_ROLLOUTS the mini-batch is filled up with groups of the last one that have no signal: what
    an update without dynamic sampling would hold, so that a run goes on, with an alarm, where
    nearly all prompts are too easy or too hard. No batches when stop() is true before one is full.
    """
    groups, rollouts = reserve.groups, []
    while num_groups(groups) < cfg.mini_batch and len(rollouts) < MAX_ROLLOUTS:
        if rollouts and stop():
            return [], rollouts, {}, reserve
        batches, rollout = roll_out(reserve.rollouts + len(rollouts))
        rollouts.append(rollout)
        fresh, signal_P = regroup(batches, rollout), signal(rollout)
        groups = join(groups, pick(fresh, signal_P))
    missing = max(0, cfg.mini_batch - num_groups(groups))
    groups = join(groups, pick(fresh, np.flatnonzero(~signal_P)[:missing]))
    parts = cut(groups, cfg.mini_batch)
    rest = parts.pop() if num_groups(groups) % cfg.mini_batch else pick(groups, slice(0))
    left = Reserve(rest, reserve.rollouts + len(rollouts))
    sampled = sum(int(rollout.mask_BT.sum()) for rollout in rollouts)
    kept = int(groups["mask_BT"].sum()) - int(reserve.groups["mask_BT"].sum())
    metrics = {
        "rollouts": len(rollouts),
        "wasted_tokens": 1 - kept / sampled,
        "reserve_groups": num_groups(left.groups),
        "filled_groups": missing,
    }
    return [(update_batch(part, cfg, mesh), part) for part in parts], rollouts, metrics, left


def regroup(batches: list[dict], rollout: Rollout) -> Groups:
    """Return the mini-batches of a rollout, and what it was scored, as groups."""
    P, G = rollout.reward_PG.shape

    def rows(name: str) -> np.ndarray:  # [M, rows, ...] of every batch -> [P, G, ...]
        parts = [hosts.fetch(batch[name]) for batch in batches]
        return np.concatenate([part.reshape(-1, G, *part.shape[2:]) for part in parts])

    return {name: rows(name) for name in batches[0] if name != "weight_BT"} | origins(rollout)


def origins(rollout: Rollout) -> Groups:
    """Return what is known of a rollout's groups beside what an update is given of them."""
    P, G = rollout.reward_PG.shape
    return {
        "mask_BT": rollout.mask_BT.reshape(P, G, -1),
        "reward_PG": rollout.reward_PG,
        "valid_PG": rollout.valid_PG,
        "score_PKG": score_array(rollout.scores, G).swapaxes(0, 1).astype(np.float32),
        "row_P": np.array([row.example.id for row in rollout.rows], np.int32),
        "rollout_P": np.full(P, rollout.number, np.int32),
    }


def update_batch(groups: Groups, cfg: TrainConfig, mesh: Mesh) -> dict:
    """Return the batch of an update on these groups; weights and advantages are taken over them."""
    rows = {name: value for name, value in groups.items() if name.endswith(("_B", "_BT"))}
    batch = {name: value.reshape(-1, *value.shape[2:]) for name, value in rows.items()}
    mask_BT = batch.pop("mask_BT")
    batch = weighted_batch(batch, mask_BT, cfg, mesh)
    return add_advantages([batch], groups["reward_PG"], groups["valid_PG"], cfg, mesh)[0]


def num_groups(groups: Groups) -> int:
    """Return how many groups there are."""
    return len(groups["reward_PG"])


def pick(groups: Groups, which) -> Groups:
    """Return some of the groups: a slice, a mask or numbers."""
    return {name: value[which] for name, value in groups.items()}


def cut(groups: Groups, size: int) -> list[Groups]:
    """Return the groups `size` at a time, perhaps fewer at last."""
    return [pick(groups, slice(i, i + size)) for i in range(0, num_groups(groups), size)]


def join(first: Groups, second: Groups) -> Groups:
    """Return the groups of both, in this order."""
    return {name: np.concatenate([value, second[name]]) for name, value in first.items()}


def empty_reserve(cfg: TrainConfig, T: int, K: int) -> Reserve:
    """Return the reserve before the first rollout; T: columns of prompt and completion, K: reward
    functions."""
    G = cfg.num_generations
    floats = ["logp_sampler_BT", "logp_old_BT"] + ["logp_ref_BT"] * bool(cfg.beta)
    groups = {name: np.zeros((0, G, T), np.float32) for name in floats}
    groups |= {
        "tokens_BT": np.zeros((0, G, T), np.int32),
        "start_B": np.zeros((0, G), np.int32),
        "mask_BT": np.zeros((0, G, T), bool),
        "reward_PG": np.zeros((0, G), np.float32),
        "valid_PG": np.zeros((0, G), bool),
        "score_PKG": np.zeros((0, K, G), np.float32),
        "row_P": np.zeros(0, np.int32),
        "rollout_P": np.zeros(0, np.int32),
    }
    return Reserve(groups, 0)


def pack(reserve: Reserve, slots: int) -> dict:
    """Return the reserve as arrays of fixed shape, for a checkpoint: `slots` groups, then zeros."""

    def padded(value: np.ndarray) -> np.ndarray:
        rest = np.zeros((slots - len(value), *value.shape[1:]), value.dtype)
        return np.concatenate([value, rest])

    numbers = {"count": num_groups(reserve.groups), "rollouts": reserve.rollouts}
    numbers = {name: np.array(number, np.int32) for name, number in numbers.items()}
    return {name: padded(value) for name, value in reserve.groups.items()} | numbers


def unpack(packed: dict) -> Reserve:
    """Return the reserve that `pack` packed."""
    groups = {name: value for name, value in packed.items() if name not in ("count", "rollouts")}
    return Reserve(pick(groups, slice(int(packed["count"]))), int(packed["rollouts"]))
