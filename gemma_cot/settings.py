"""From flags to a checked TrainConfig: a flag per field, a preset under them, one clear refusal.

No default but that of --preset lives here; see config.TrainConfig and config.PRESETS. Called by the
command lines.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from absl import flags

from gemma_cot.axes import round_up
from gemma_cot.config import LEAST_TEMPERATURE, PRESETS, TrainConfig
from gemma_cot.metrics import METRICS

HOST_FLAGS = ("coordinator", "num_processes", "process_id")  # each process has its own
_CHOICES = {
    "on_bad_row": ("fail", "skip"),
    "kl": ("ratio_k3", "k2", "k3", "k1"),
    "kl_in": ("loss", "reward"),
    "objective": ("grpo", "gspo", "cispo", "rloo"),
    "aggregation": ("grpo", "dapo", "dr_grpo"),
    "baseline": ("mean", "leave_one_out"),
    "advantage_scale": ("group", "batch", "none"),
    "process_matcher": ("normalised", "literal"),
    "dtype": ("auto", "float32", "bfloat16"),
    "remat": ("none", "products", "all"),
    "attention": ("reference", "pallas"),
    "logprob": ("reference", "pallas"),
}
_AT_LEAST = {
    "num_processes": 1, "process_id": 0, "sft_steps": 0, "grpo_steps": 0, "eval_limit": 0,
    "sample_every": 0, "trace_every": 0, "seed": 0,
    "max_prompt_tokens": 1, "max_completion_tokens": 1, "lora_rank": 1, "sft_batch": 1,
    "sft_micro_batches": 1,
    "num_generations": 2, "prompts_per_rollout": 1, "mini_batch": 1, "micro_batch": 1,
    "num_iterations": 1, "length_buckets": 1,
    "eval_batch": 1, "rollout_slots": 0, "checkpoint_every": 0, "checkpoint_minutes": 0,
    "keep_checkpoints": 1,
    "beta": 0, "learning_rate": 0, "sft_learning_rate": 0,
    "weight_decay": 0, "warmup_fraction": 0, "format_weight": 0, "process_weight": 0,
    "outcome_weight": 0, "length_weight": 0, "repetition_weight": 0, "code_weight": 0,
    "length_cache": 1, "max_reward_errors": 0, "max_skipped": 0,
    "temperature": LEAST_TEMPERATURE,
}  # fmt: skip
_ABOVE_ZERO = ("max_grad_norm", "lora_alpha", "epsilon", "epsilon_high")
_MAY_BE_INFINITE = ("max_grad_norm", "epsilon", "epsilon_high")  # no clipping
_BELOW_ONE = ("adam_b1", "adam_b2")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --preset and one absl flag per field of TrainConfig on `values`."""
    flags.DEFINE_enum(
        "preset", "tiny", sorted(PRESETS), "Named set of defaults, in force before those listed "
        "with the flags; flags win over it.", values
    )
    _define(values, [item.name for item in dataclasses.fields(TrainConfig)])


def define_host_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define the flags of HOST_FLAGS, for another command than train."""
    _define(values, HOST_FLAGS)


def _define(values: flags.FlagValues, names: Sequence[str]) -> None:
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple[str, ...]: flags.DEFINE_multi_string,
    }
    for item in dataclasses.fields(TrainConfig):
        if item.name in names:
            default = list(item.default) if isinstance(item.default, tuple) else item.default
            presets = {name: below.get(item.name, default) for name, below in PRESETS.items()}
            told = ", ".join(f"{name}: {x}" for name, x in presets.items() if x != default)
            text = item.metadata["help"] + f" ({told})" * bool(told)
            define[item.type](item.name, default, text, flag_values=values)


def config_from_flags(values: flags.FlagValues) -> TrainConfig:
    """Return the run's settings: a flag that was given, else the preset, else the field's default.

    With --resume and no --preset those of the run in --output_dir stand in the preset's place.
    Raises ValueError, one line, for values that are out of range or contradict each other.
    """
    chosen = {}
    for item in dataclasses.fields(TrainConfig):
        if values[item.name].present:
            given = values[item.name].value
            chosen[item.name] = tuple(given) if isinstance(given, list) else given
    below = PRESETS[values.preset]
    if values.resume and not values["preset"].present:
        below = stored_settings(values.output_dir) or below
    cfg = TrainConfig(**(below | chosen))
    check_config(cfg)
    return cfg


def stored_settings(folder: str) -> dict:
    """Return the settings that a run was begun with, {} where there is none to be read."""
    try:
        stored = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    names = {item.name for item in dataclasses.fields(TrainConfig)} & set(stored)
    names -= {"output_dir", "resume", "overwrite", "allow_changes", *HOST_FLAGS}
    return {n: tuple(stored[n]) if isinstance(stored[n], list) else stored[n] for n in names}


def check_config(cfg: TrainConfig) -> None:
    """Raise ValueError naming the first setting that is out of range or contradicts another."""

    def refuse(name: str, rule: str, change: str):
        return ValueError(f"--{name}: {rule}, got {getattr(cfg, name)!r}; {change}")

    for name, choices in _CHOICES.items():
        if getattr(cfg, name) not in choices:
            raise refuse(name, f"must be one of {', '.join(choices)}", f"set --{name}={choices[0]}")
    for name, least in _AT_LEAST.items():
        if not getattr(cfg, name) >= least:
            raise refuse(name, f"must be at least {least}", f"raise --{name}")
    for name in _ABOVE_ZERO:
        if not getattr(cfg, name) > 0:
            raise refuse(name, "must be above 0", f"raise --{name}")
    if cfg.seed >= 2**32:
        raise refuse("seed", "must be below 2**32, from where on keys repeat", "lower it")
    if not cfg.output_dir:
        raise refuse("output_dir", "must name a folder", "set --output_dir=runs/default")
    for name in _BELOW_ONE:
        if not 0 <= getattr(cfg, name) < 1:
            raise refuse(name, "must be at least 0 and below 1", f"set --{name}=0.9")
    if cfg.warmup_fraction > 1:
        raise refuse("warmup_fraction", "must be at most 1", "set --warmup_fraction=0.1")
    if cfg.length_weight and cfg.length_cache > cfg.max_completion_tokens:
        raise refuse("length_cache", f"must be at most max_completion_tokens "
                     f"{cfg.max_completion_tokens}", "lower it")  # fmt: skip
    if cfg.kl_in == "reward" and cfg.kl == "ratio_k3":
        raise refuse("kl", "must be k1, k2 or k3 with kl_in reward, where the ratio is 1",
                     "set --kl=k1")  # fmt: skip
    if cfg.objective in ("gspo", "rloo") and cfg.aggregation != "grpo":
        raise refuse("aggregation", f"must be grpo with objective {cfg.objective}, which weighs "
                     "whole completions", "set --aggregation=grpo")  # fmt: skip
    metric = cfg.keep_best.removeprefix("-")
    if cfg.keep_best and metric not in METRICS and not metric.startswith("reward_"):
        raise refuse("keep_best", "must be a metric or -metric", "set --keep_best=reward")
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume and --overwrite: at most one may be set, got both; drop one")
    if cfg.prompts_per_rollout % cfg.mini_batch:
        raise ValueError(
            f"--mini_batch: must divide prompts_per_rollout {cfg.prompts_per_rollout}, got "
            f"{cfg.mini_batch}; set --mini_batch to one of {_divisors(cfg.prompts_per_rollout)}"
        )
    for item in dataclasses.fields(cfg):
        value = getattr(cfg, item.name)
        if item.type is float and not math.isfinite(value) and item.name not in _MAY_BE_INFINITE:
            raise refuse(item.name, "must be finite", f"lower --{item.name}")
    session_seconds(cfg.session)
    profile_range(cfg.profile_steps)


def cut_batches(cfg: TrainConfig) -> tuple[int, ...]:
    """Return the numbers of rows that are cut over the mesh's data devices."""
    micro_rows = cfg.mini_batch * cfg.num_generations // cfg.micro_batch
    return micro_rows, cfg.sft_batch // cfg.sft_micro_batches, cfg.prompts_per_rollout


def check_batches(cfg: TrainConfig, data_devices: int) -> None:
    """Raise ValueError unless every batch divides over the mesh's `data_devices`."""
    rows = cfg.mini_batch * cfg.num_generations
    if rows % (data_devices * cfg.micro_batch):
        fits = [d for d in _divisors(rows) if rows % (data_devices * d) == 0]
        change = f"set --micro_batch to one of {fits}" if fits else "raise --mini_batch"
        raise ValueError(
            f"--micro_batch: rows of a mini-batch {rows} (prompts {cfg.mini_batch} x group "
            f"{cfg.num_generations}) must be divisible by devices {data_devices} x micro_batch, "
            f"got {cfg.micro_batch}; {change}"
        )
    parts = {"sft_batch": data_devices * cfg.sft_micro_batches, "prompts_per_rollout": data_devices}
    for name, part in parts.items():
        if getattr(cfg, name) % part:
            raise ValueError(
                f"--{name}: must be divisible by {part} (the mesh's {data_devices} data devices"
                f"{' x sft_micro_batches' if name == 'sft_batch' else ''}), got "
                f"{getattr(cfg, name)}; set --{name}={round_up(getattr(cfg, name), part)}"
            )


def profile_range(text: str) -> tuple[int, int]:
    """Return the first and last step of --profile_steps ("20:25"), (0, 0) when it is empty."""
    first, colon, last = text.partition(":")
    if not text:
        return 0, 0
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ValueError(
            f"--profile_steps: must be FIRST:LAST, GRPO steps from 1 on, got {text!r}; set "
            "--profile_steps=20:21"
        )
    return int(first), int(last)


def session_seconds(text: str) -> float:
    """Return the seconds of --session from now, infinity when it is empty.

    text: a time ("9h", "50m", "30s") or a deadline ("2026-11-26T18:00", local without a zone).
    """
    if not text:
        return float("inf")
    number, unit = text[:-1], {"h": 3600, "m": 60, "s": 1}.get(text[-1])
    try:
        if "T" in text:
            deadline = datetime.fromisoformat(text).astimezone()
            seconds = (deadline - datetime.now(UTC)).total_seconds()
        else:
            seconds = float(number) * unit if unit else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"--session: must be a time such as 9h, 50m or 30s, or a deadline ahead "
            f"(2026-11-26T18:00), got {text!r}; set --session=9h"
        )
    return seconds


def _divisors(n: int) -> list[int]:
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})
