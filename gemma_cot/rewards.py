"""Which rewards a run gives and with what weight, from its settings. Called by run and evaluate."""

import warnings
from functools import partial

from gemma_cot.config import TrainConfig
from gemma_cot.grpo.reward import (
    format_reward,
    length_penalty,
    outcome_reward,
    process_reward,
    repetition_penalty,
)
from gemma_cot.guard import sandbox, symbolic
from gemma_cot.guard.user import load_reward


def read_rewards(cfg: TrainConfig) -> list[tuple]:
    """Return (name, function, weight) of the built-in rewards that the settings ask for, and of the
    user's own."""
    rewards = [
        ("format", format_reward, cfg.format_weight),
        ("process", partial(process_reward, matcher=cfg.process_matcher), cfg.process_weight),
        ("outcome", read_outcome(cfg.math_verify), cfg.outcome_weight),
    ]
    if cfg.length_weight:
        length = partial(length_penalty, limit=cfg.max_completion_tokens, cache=cfg.length_cache)
        rewards.append(("length", length, cfg.length_weight))
    if cfg.repetition_weight:
        rewards.append(("repetition", repetition_penalty, cfg.repetition_weight))
    if cfg.allow_code_execution:
        for line in sandbox.check():
            warnings.warn(line, stacklevel=2)
        run_code = partial(sandbox.code_reward, allow_code_execution=True)
        rewards.append(("code", run_code, cfg.code_weight))
    rewards += map(load_reward, cfg.reward)
    if cfg.grpo_steps and not any(weight for _, _, weight in rewards):
        raise ValueError(
            "--outcome_weight: at least one reward must have a weight other than 0, got none; "
            "raise one, or set --grpo_steps=0"
        )
    names = [name for name, _, _ in rewards]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"--reward: function names must differ from each other and from format, process, "
            f"outcome and code, got {', '.join(twice)} twice; rename a function"
        )
    best = cfg.keep_best.removeprefix("-")
    if best.startswith("reward_") and best.removeprefix("reward_") not in ("std", *names):
        raise ValueError(
            f"--keep_best: reward_NAME must be of a reward of this run ({', '.join(names)}), got "
            f"{cfg.keep_best!r}; set --keep_best=reward"
        )
    return rewards


def read_outcome(math_verify: bool):
    """Return the outcome reward. Raises ValueError, one line, without the extra it needs."""
    if not math_verify:
        return outcome_reward
    symbolic.require()
    return partial(outcome_reward, matches=symbolic.answers_match_symbolic)
