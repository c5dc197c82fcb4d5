"""A rollout: sample G completions of every prompt, read them, score them.

The record in between sampling and learning is `Rollout`, host arrays and texts. Rewards see text
only; the arrays keep the sampled ids, which are never re-tokenised.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gemma_cot import hosts
from gemma_cot.axes import sharding_of
from gemma_cot.config import ModelConfig
from gemma_cot.data import Encoded, left_pad
from gemma_cot.grpo.loss import has_signal
from gemma_cot.grpo.reward import repeated_share
from gemma_cot.model.params import Params
from gemma_cot.model.sample import Samples, sample
from gemma_cot.tokenizer import Tokenizer, decode

OTHER_PARAMETERS = {"prompts", "completions", "matcher", "matches", "limit", "limits", "cache",
                    "allow_code_execution"}  # fmt: skip


@dataclass(frozen=True)
class Rollout:
    """Completions of one rollout with their scores; row p * G + g is completion g of prompt p."""

    tokens_BT: np.ndarray  # int32, prompt and completion
    mask_BT: np.ndarray  # bool, completion tokens up to and including the stop token
    logp_BT: np.ndarray  # float32, the sampler's log-probs
    start_B: np.ndarray  # int32, first real column
    stopped_B: np.ndarray  # bool, False = truncated
    useful_B: np.ndarray  # float32, share of decode steps that went into unfinished rows
    completions: list[str]  # text without the stop token
    scores: dict[str, list]  # reward function -> a score or None for every completion
    reward_PG: np.ndarray  # float32, weighted sum
    valid_PG: np.ndarray  # bool, False where no total can be given
    seconds: tuple[float, float] = (0.0, 0.0)  # that sampling and scoring took
    rows: tuple[Encoded, ...] = ()  # what was asked, by prompt
    number: int = 0  # of the rollout, from 0


def sample_prompts(
    params: Params,
    cfg: ModelConfig,
    lora,
    prompts: list[list[int]],
    width: int,
    key: jax.Array,
    mesh: Mesh,
    *,
    prompt_ids: list[int],
    num_completions: int,
    max_new_tokens: int,
    temperature: float,
    stop_ids: tuple[int, ...],
    slots: int = 0,
) -> Samples:
    """Left-pad, place and sample a batch of prompts. Returns device arrays at once (asynchronous).

    prompt_ids: the number that keys each prompt's draws. The number of prompts must be divisible by
    the mesh's data devices. slots: completions that a device decodes at a time, 0: all of its rows.
    """
    tokens_PT, start_P = left_pad(prompts, width)
    with jax.set_mesh(mesh):
        return sample(
            params,
            cfg,
            hosts.place(tokens_PT, sharding_of("PT", mesh)),
            hosts.place(start_P, sharding_of("P", mesh)),
            key,
            num_completions=num_completions,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            stop_ids=stop_ids,
            lora=lora,
            prompt_id_P=hosts.place(np.asarray(prompt_ids, np.int32), sharding_of("P", mesh)),
            slots=slots or None,
        )


def completion_texts(
    tokenizer: Tokenizer, tokens_BT: np.ndarray, mask_BT: np.ndarray, stopped_B: np.ndarray
) -> list[str]:
    """Return the text of every completion, its stop token left out."""
    texts = []
    for tokens_T, mask_T, stopped in zip(tokens_BT, mask_BT, stopped_B, strict=True):
        ids = tokens_T[mask_T]
        texts.append(decode(tokenizer, ids[:-1] if stopped else ids))
    return texts


def completion_ids(tokens_BT: np.ndarray, mask_BT: np.ndarray) -> list[list[int]]:
    """Return the sampled ids of every completion, its stop token included."""
    return [ids_T[mask_T].tolist() for ids_T, mask_T in zip(tokens_BT, mask_BT, strict=True)]


def reward_columns(rows: list[Encoded], repeats: int) -> tuple[list[str], dict[str, list]]:
    """Return (prompts, dataset columns), every row `repeats` times: what reward functions see.

    Columns: domain, metadata, further keys (None where a row lacks one) except OTHER_PARAMETERS.
    """
    examples = [row.example for row in rows for _ in range(repeats)]
    names = sorted({name for example in examples for name in example.extra} - OTHER_PARAMETERS)
    columns = {name: [example.extra.get(name) for example in examples] for name in names}
    columns["domain"] = [example.domain for example in examples]
    columns["metadata"] = [example.metadata for example in examples]
    return [example.prompt for example in examples], columns


def score_array(scores: dict[str, list], group: int) -> np.ndarray:
    """Return `score_KPG` of K reward functions, NaN for None."""
    value = np.array([[np.nan if s is None else s for s in values] for values in scores.values()])
    return value.reshape(len(scores), -1, group)


def combine_rewards(
    scores: dict[str, list], weights: dict[str, float], group: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (reward_PG, valid_PG): the weighted sum of the scores of every completion.

    A score of None is never 0: a reward that applies to no completion of a group is left out of
    that group's sums; where it applies to some only, the others have no comparable total and are
    not valid. A completion without any score is not valid either; one of weight 0 does not count.
    """
    value_KPG = score_array(scores, group)
    weight_K11 = np.array([weights[name] for name in scores])[:, None, None]
    given_KPG = ~np.isnan(value_KPG) & ((weight_K11 != 0) | ~weight_K11.any())
    used_KP1 = given_KPG.any(axis=2, keepdims=True)
    reward_PG = np.where(given_KPG, weight_K11 * value_KPG, 0.0).sum(axis=0)
    valid_PG = (given_KPG | ~used_KP1).all(axis=0) & given_KPG.any(axis=0)
    return np.where(valid_PG, reward_PG, 0.0).astype(np.float32), valid_PG


def score_samples(
    samples: Samples,
    rows: list[Encoded],
    tokenizer: Tokenizer,
    rewards: list[tuple],
    group: int,
) -> Rollout:
    """Read and score the samples of `rows` (host arrays); each process does its share of them.

    rewards: (name, function, weight) tuples. They also get the column `completion_ids`, as in TRL:
    the sampled ids, the stop token included.
    """
    host = jax.device_get(samples)
    own_P, own_B = hosts.share(len(rows)), hosts.share(len(rows) * group)

    def read_and_score() -> tuple[list[str], dict[str, list]]:
        tokens_BT, mask_BT = host.tokens_BT[own_B], host.completion_mask_BT[own_B]
        texts = completion_texts(tokenizer, tokens_BT, mask_BT, host.stopped_B[own_B])
        prompts, columns = reward_columns(rows[own_P], group)
        columns["completion_ids"] = completion_ids(tokens_BT, mask_BT)
        return texts, {name: function(prompts, texts, **columns) for name, function, _ in rewards}

    shares = hosts.gather(read_and_score)
    texts = [text for texts, _ in shares for text in texts]
    scores = {name: [s for _, own in shares for s in own[name]] for name, _, _ in rewards}
    weights = {name: weight for name, _, weight in rewards}
    reward_PG, valid_PG = combine_rewards(scores, weights, group)
    return Rollout(
        tokens_BT=host.tokens_BT,
        mask_BT=host.completion_mask_BT,
        logp_BT=host.logp_BT,
        start_B=host.start_B,
        stopped_B=host.stopped_B,
        useful_B=host.useful_B,
        completions=texts,
        scores=scores,
        reward_PG=reward_PG,
        valid_PG=valid_PG,
        rows=tuple(rows),
    )


def mean_metrics(rollouts: list[Rollout]) -> dict[str, float]:
    """Return the mean over rollouts of each metric, NaN where none of them has a number for it."""
    measured = [rollout_metrics(rollout) for rollout in rollouts]
    means = {}
    for name in dict.fromkeys(name for metrics in measured for name in metrics):
        values = [metrics.get(name, 0.0) for metrics in measured]  # none_* is left out at 0
        values = [value for value in values if not math.isnan(value)]
        means[name] = sum(values) / len(values) if values else math.nan
    return means


def signal(rollout: Rollout) -> np.ndarray:
    """Return `signal_P` of a rollout: whether the rewards of a group differ."""
    return np.asarray(has_signal(jnp.asarray(rollout.reward_PG), jnp.asarray(rollout.valid_PG)))


def rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Return the metrics of a rollout that need no model: rewards by part, lengths, signal."""
    reward_PG, valid_PG = rollout.reward_PG, rollout.valid_PG
    ids_B = completion_ids(rollout.tokens_BT, rollout.mask_BT)
    groups = [row[ok] for row, ok in zip(reward_PG, valid_PG, strict=True)]
    spread_P = [group.std(ddof=1) if len(group) > 1 else 0.0 for group in groups]
    metrics = {
        "reward": float(reward_PG[valid_PG].mean()) if valid_PG.any() else float("nan"),
        "reward_std": float(np.mean(spread_P)),
        "signal_share": float(np.mean(signal(rollout))),
        "completion_tokens": float(rollout.mask_BT.sum(axis=1).mean()),
        "decode_useful": float(rollout.useful_B.mean()),
        "truncated_rate": float(1 - rollout.stopped_B.mean()),
        "repetition": float(np.mean([repeated_share(ids) for ids in ids_B])),
    }
    for name, values in rollout.scores.items():
        given = [value for value in values if value is not None]
        metrics[f"reward_{name}"] = float(np.mean(given)) if given else float("nan")
        if len(given) < len(values):
            metrics[f"none_{name}"] = 1 - len(given) / len(values)
    return metrics
