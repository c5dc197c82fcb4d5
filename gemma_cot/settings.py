"""From flags to a checked TrainConfig: a flag per field, a preset under them, one clear refusal.

No default lives here; see config.TrainConfig and config.PRESETS. Called by the command lines.
"""

import dataclasses

from absl import flags

from gemma_cot.axes import round_up
from gemma_cot.config import PRESETS, TrainConfig

_CHOICES = {
    "on_bad_row": ("fail", "skip"),
    "kl": ("ratio_k3", "k2", "k3", "k1"),
    "aggregation": ("grpo", "dapo", "dr_grpo"),
    "advantage_scale": ("group", "batch", "none"),
    "process_matcher": ("normalised", "literal"),
    "dtype": ("auto", "float32", "bfloat16"),
    "attention": ("reference", "pallas"),
    "logprob": ("reference", "pallas"),
}
_AT_LEAST = {
    "sft_steps": 0, "grpo_steps": 0, "eval_limit": 0, "sample_every": 0, "seed": 0,
    "max_prompt_tokens": 1, "max_completion_tokens": 1, "lora_rank": 1, "sft_batch": 1,
    "sft_micro_batches": 1,
    "num_generations": 2, "prompts_per_rollout": 1, "mini_batch": 1, "micro_batch": 1,
    "eval_batch": 1, "rollout_slots": 0, "checkpoint_every": 1, "keep_checkpoints": 1,
    "beta": 0, "learning_rate": 0, "sft_learning_rate": 0,
    "weight_decay": 0, "warmup_fraction": 0, "format_weight": 0, "process_weight": 0,
    "outcome_weight": 0, "length_weight": 0, "repetition_weight": 0, "code_weight": 0,
    "length_cache": 1, "max_reward_errors": 0,
}  # fmt: skip
_ABOVE_ZERO = ("temperature", "max_grad_norm", "lora_alpha", "epsilon", "epsilon_high")
_BELOW_ONE = ("adam_b1", "adam_b2")


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define --preset and one absl flag per field of TrainConfig on `values`."""
    flags.DEFINE_enum(
        "preset", "tiny", sorted(PRESETS), "Named set of defaults; flags win over it.", values
    )
    define = {
        bool: flags.DEFINE_bool,
        int: flags.DEFINE_integer,
        float: flags.DEFINE_float,
        str: flags.DEFINE_string,
        tuple[str, ...]: flags.DEFINE_multi_string,
    }
    for item in dataclasses.fields(TrainConfig):
        default = list(item.default) if isinstance(item.default, tuple) else item.default
        define[item.type](item.name, default, item.metadata["help"], flag_values=values)


def config_from_flags(values: flags.FlagValues) -> TrainConfig:
    """Return the run's settings: a flag that was given, else the preset, else the field's default.

    Raises ValueError, one line, for values that are out of range or contradict each other.
    """
    chosen = {}
    for item in dataclasses.fields(TrainConfig):
        if values[item.name].present:
            given = values[item.name].value
            chosen[item.name] = tuple(given) if isinstance(given, list) else given
    cfg = TrainConfig(**(PRESETS[values.preset] | chosen))
    check_config(cfg)
    return cfg


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
    for name in _BELOW_ONE:
        if not 0 <= getattr(cfg, name) < 1:
            raise refuse(name, "must be at least 0 and below 1", f"set --{name}=0.9")
    if cfg.warmup_fraction > 1:
        raise refuse("warmup_fraction", "must be at most 1", "set --warmup_fraction=0.1")
    if cfg.length_weight and cfg.length_cache > cfg.max_completion_tokens:
        raise refuse("length_cache", f"must be at most max_completion_tokens "
                     f"{cfg.max_completion_tokens}", "lower it")  # fmt: skip
    if cfg.resume and cfg.overwrite:
        raise ValueError("--resume and --overwrite: at most one may be set, got both; drop one")
    if cfg.prompts_per_rollout % cfg.mini_batch:
        raise ValueError(
            f"--mini_batch: must divide prompts_per_rollout {cfg.prompts_per_rollout}, got "
            f"{cfg.mini_batch}; set --mini_batch to one of {_divisors(cfg.prompts_per_rollout)}"
        )
    session_seconds(cfg.session)


def cut_batches(cfg: TrainConfig) -> tuple[int, ...]:
    """Return the numbers of rows that are cut over the mesh's data devices."""
    micro_rows = cfg.mini_batch * cfg.num_generations // cfg.micro_batch
    return micro_rows, cfg.sft_batch // cfg.sft_micro_batches, cfg.prompts_per_rollout


def check_batches(cfg: TrainConfig, data_devices: int) -> None:
    """Raise ValueError unless every batch divides over the mesh's `data_devices`."""
    rows = cfg.mini_batch * cfg.num_generations
    if rows % (data_devices * cfg.micro_batch):
        fits = [d for d in range(1, rows + 1) if rows % (data_devices * d) == 0]
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


def session_seconds(text: str) -> float:
    """Return the seconds of --session ("9h", "50m", "30s"), infinity when it is empty."""
    if not text:
        return float("inf")
    number, unit = text[:-1], {"h": 3600, "m": 60, "s": 1}.get(text[-1])
    try:
        seconds = float(number) * unit if unit else -1.0
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise ValueError(
            f"--session: must be a time such as 9h, 50m or 30s, got {text!r}; set --session=9h"
        )
    return seconds


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
