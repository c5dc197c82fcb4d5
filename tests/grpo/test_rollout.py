"""What a rollout reads and scores: texts, dataset columns, weighted rewards, and its metrics."""

import dataclasses
import math

import numpy as np
import pytest

from gemma_cot.config import embedded
from gemma_cot.data import Encoded, Example
from gemma_cot.grpo.reward import RewardError
from gemma_cot.grpo.rollout import (
    Rollout,
    combine_rewards,
    completion_texts,
    mean_metrics,
    reward_columns,
    rollout_metrics,
    score_samples,
)
from gemma_cot.guard.user import checked
from gemma_cot.model.sample import Samples
from gemma_cot.tokenizer import EOS, encode, load_tokenizer

WIDTH, LONGEST = 3, 24
TEXTS = ("All: 3 + 4 = 7.", "cut off in the mid", "", "<reasoning>7</reasoning>")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(embedded("tiny_model"))


def encoded(number: int, prompt: str, **extra) -> Encoded:
    """Return a row whose tokens do not matter here."""
    metadata = {"checkpoints": [], "final_answer": str(number)}
    return Encoded(Example(number, "math", prompt, "chosen", metadata, extra), [2], [1])


@pytest.fixture(scope="module")
def samples(tokenizer) -> Samples:
    """Four completions after a prompt of three tokens: two end in <end_of_turn>, row 1 is cut off
    by the length limit, row 2 is a stop token alone (<eos>)."""
    ends = ([tokenizer.end_of_turn], [], [EOS], [tokenizer.end_of_turn])
    tokens_BT = np.zeros((4, WIDTH + LONGEST), np.int32)
    mask_BT = np.zeros(tokens_BT.shape, bool)
    tokens_BT[:, :WIDTH] = 7
    for b, (text, end) in enumerate(zip(TEXTS, ends, strict=True)):
        ids = encode(tokenizer, text) + end
        tokens_BT[b, WIDTH : WIDTH + len(ids)] = ids
        mask_BT[b, WIDTH : WIDTH + len(ids)] = True
    return Samples(
        tokens_BT=tokens_BT,
        completion_mask_BT=mask_BT,
        logp_BT=np.where(mask_BT, np.float32(-0.5), np.float32(0)),
        start_B=np.array([0, 1, 2, 0], np.int32),
        stopped_B=np.array([True, False, True, True]),
        useful_B=np.full(4, 0.75, np.float32),
    )


# ---- texts and columns --------------------------------------------------------------------------


def test_texts_leave_the_stop_token_out_and_keep_a_truncated_row_whole(tokenizer, samples):
    assert (samples.tokens_BT[1][samples.completion_mask_BT[1]] != tokenizer.end_of_turn).all()
    texts = completion_texts(
        tokenizer, samples.tokens_BT, samples.completion_mask_BT, samples.stopped_B
    )
    assert texts == list(TEXTS)


def test_columns_repeat_every_row_and_fill_gaps_with_none():
    rows = [encoded(1, "a", level=3), encoded(2, "b", source="x", level=None)]
    prompts, columns = reward_columns(rows, 2)
    assert prompts == ["a", "a", "b", "b"]
    first, second = rows[0].example.metadata, rows[1].example.metadata
    assert columns == {
        "level": [3, 3, None, None],
        "source": [None, None, "x", "x"],
        "domain": ["math"] * 4,
        "metadata": [first, first, second, second],
    }


def test_a_key_that_is_a_parameter_of_the_rewards_is_no_column():
    rows = [encoded(1, "a", completions="x", prompts="y", matcher="z", matches="m", level=1)]
    _, columns = reward_columns(rows, 1)
    assert columns.keys() == {"level", "domain", "metadata"}


# ---- weighted rewards ---------------------------------------------------------------------------


def combined(scores: dict, group: int, **weights):
    """Return (rewards, valid) as nested lists."""
    reward_PG, valid_PG = combine_rewards(scores, weights or dict.fromkeys(scores, 1.0), group)
    assert reward_PG.dtype == np.float32 and valid_PG.dtype == bool
    return reward_PG.tolist(), valid_PG.tolist()


def test_a_reward_of_weight_0_only_watches():
    scores = {"format": [1.0, 0.0], "mine": [None, 1.0]}
    assert combined(scores, 2, format=1.0, mine=0.0) == ([[1.0, 0.0]], [[True, True]])
    assert combined(scores, 2, format=0.0, mine=0.0) == ([[0.0, 0.0]], [[False, True]])


def test_rewards_are_weighted_sums_in_row_order():
    scores = {"format": [1.0, 0.0, 1.0, 0.0], "outcome": [1.0, 1.0, 0.0, 0.0]}
    # 0.5 f + 2 o; row p * G + g is completion g of prompt p
    rewards, valid = combined(scores, 2, format=0.5, outcome=2.0)
    assert rewards == [[2.5, 2.0], [0.5, 0.0]]
    assert valid == [[True, True], [True, True]]


def test_a_reward_that_never_applies_in_a_group_is_left_out_of_it():
    scores = {"format": [1.0, 0.0, 1.0, 0.0], "process": [None, None, 0.2, 0.0]}
    rewards, valid = combined(scores, 2)
    assert rewards[0] == [1.0, 0.0]
    assert rewards[1] == [pytest.approx(1.2), 0.0]
    assert valid == [[True, True], [True, True]]


def test_where_it_applies_to_some_only_the_others_are_not_valid():
    """Among scores (1, 1), (1, None), (0, 0) the middle one has no total to compare: not 1 + 0."""
    scores = {"format": [1.0, 1.0, 0.0], "process": [1.0, None, 0.0]}
    rewards, valid = combined(scores, 3)
    assert rewards == [[2.0, 0.0, 0.0]]
    assert valid == [[True, False, True]]


def test_a_completion_without_any_score_is_not_valid():
    rewards, valid = combined({"mine": [None, None, 0.0, None]}, 2)
    assert rewards == [[0.0, 0.0], [0.0, 0.0]]
    assert valid == [[False, False], [True, False]]


# ---- metrics ------------------------------------------------------------------------------------


def make_rollout(reward_PG, valid_PG, scores) -> Rollout:
    """Return a rollout of rows with 1, 2, 3, ... tokens, every second one cut off."""
    reward_PG, valid_PG = np.array(reward_PG, np.float32), np.array(valid_PG, bool)
    B = reward_PG.size
    mask_BT = np.arange(B)[None, :] <= np.arange(B)[:, None]
    zeros_BT = np.zeros((B, B), np.int32)
    stopped_B = np.arange(B) % 2 == 0
    return Rollout(
        zeros_BT, mask_BT, zeros_BT.astype(np.float32), np.zeros(B, np.int32), stopped_B,
        np.full(B, 0.6, np.float32), [""] * B, scores, reward_PG, valid_PG,
    )  # fmt: skip


def test_metrics_of_a_rollout():
    scores = {"format": [1.0, 0.0, 1.0, 1.0], "process": [None, 0.5, 1.0, None], "own": [None] * 4}
    rollout = make_rollout([[2.0, 0.0], [1.0, 9.0]], [[1, 1], [1, 0]], scores)
    metrics = rollout_metrics(rollout)
    assert math.isnan(metrics.pop("reward_own"))
    # reward: (2 + 0 + 1)/3 over the valid ones. std of 2, 0 with n - 1 is sqrt(2), a single valid
    # reward has none; their mean is sqrt(2)/2. Only the first group differs. Tokens 1, 2, 3, 4.
    assert metrics == pytest.approx(
        {
            "reward": 1.0,
            "reward_std": math.sqrt(2) / 2,
            "signal_share": 0.5,
            "completion_tokens": 2.5,
            "decode_useful": 0.6,
            "truncated_rate": 0.5,
            "repetition": 0.0,  # four tokens hold no run of eight
            "reward_format": 0.75,
            "reward_process": 0.75,
            "none_process": 0.5,
            "none_own": 1.0,
        }
    )


def test_a_reward_that_applied_to_all_of_a_rollout_counts_as_none_missing():
    some, all_ = ({"format": [1.0, 1.0], "process": scores} for scores in ([None, 1.0], [0.0, 0.0]))
    rollouts = [make_rollout([[1.0, 1.0]], [[1, 1]], scores) for scores in (some, all_)]
    means = mean_metrics(rollouts)
    assert means["none_process"] == 0.25  # of 0.5 and 0
    assert means["reward_process"] == 0.5 and "none_format" not in means


def test_metrics_when_no_completion_has_a_reward():
    metrics = rollout_metrics(make_rollout([[0.0, 0.0]], [[0, 0]], {"own": [None, None]}))
    assert math.isnan(metrics["reward"]) and math.isnan(metrics["reward_own"])
    assert metrics["reward_std"] == 0.0 and metrics["signal_share"] == 0.0


# ---- all of it ----------------------------------------------------------------------------------


def count_sevens(prompts, completions, **columns):
    """A user's reward: sevens in the text; does not apply to rows of level 2."""
    return [
        None if level == 2 else float(text.count("7"))
        for text, level in zip(completions, columns["level"], strict=True)
    ]


def give_length(prompts, completions, **columns):
    """A user's reward: characters of prompt and completion."""
    return [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]


def test_score_samples_reads_and_scores(tokenizer, samples):
    rows = [encoded(1, "ab", level=1), encoded(2, "abcd", level=2)]
    rewards = [("count_sevens", count_sevens, 10.0), ("give_length", give_length, 1.0)]
    rollout = score_samples(samples, rows, tokenizer, rewards, group=2)
    assert rollout.completions == list(TEXTS)
    lengths = [2 + 15, 2 + 18, 4 + 0, 4 + 24]
    assert rollout.scores == {"count_sevens": [1.0, 0.0, None, None], "give_length": lengths}
    assert rollout.reward_PG.tolist() == [[27.0, 20.0], [4.0, 28.0]]
    assert rollout.valid_PG.all()
    np.testing.assert_array_equal(rollout.tokens_BT, samples.tokens_BT)  # never re-tokenised
    np.testing.assert_array_equal(rollout.mask_BT, samples.completion_mask_BT)
    np.testing.assert_array_equal(rollout.logp_BT, samples.logp_BT)
    assert rollout.start_B.tolist() == [0, 1, 2, 0]


def test_rewards_get_the_sampled_ids_with_their_stop_token(tokenizer, samples):
    seen = {}

    def spy(prompts, completions, **columns):
        seen.update(columns)
        return [len(ids) for ids in columns["completion_ids"]]

    rollout = score_samples(samples, [encoded(1, "a")] * 2, tokenizer, [("spy", spy, 1.0)], group=2)
    ends = ([tokenizer.end_of_turn], [], [EOS], [tokenizer.end_of_turn])
    ids = [encode(tokenizer, text) + end for text, end in zip(TEXTS, ends, strict=True)]
    assert seen["completion_ids"] == ids
    assert rollout.reward_PG.ravel().tolist() == [len(row) for row in ids]
    again = dataclasses.replace(rollout, tokens_BT=np.zeros_like(rollout.tokens_BT))
    lengths = [max(len(row) - 7, 0) for row in ids]
    shares = [1 - 1 / n if n else 0.0 for n in lengths]  # one token over and over: one distinct run
    assert rollout_metrics(again)["repetition"] == pytest.approx(np.mean(shares))
    assert 0 < np.mean(shares) < 1


def test_a_failing_reward_stops_the_rollout(tokenizer, samples):
    def fails(prompts, completions, **columns):
        raise KeyError("level")

    with pytest.raises(RewardError, match="reward function fails .* KeyError"):
        score_samples(samples, [encoded(1, "a")] * 2, tokenizer,
                      [("fails", checked("fails", fails), 1.0)], group=2)  # fmt: skip
