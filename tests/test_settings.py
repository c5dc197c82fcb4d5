"""Every setting is a documented flag; presets hold; every refusal is one line that names its flag.

The flags are defined on a value set of their own, so that no test sees another's.
"""

import dataclasses
import re
from pathlib import Path

import pytest
from absl import flags

from gemma_cot.config import LEAST_TEMPERATURE, PRESETS, TrainConfig
from gemma_cot.settings import (
    check_batches,
    check_config,
    config_from_flags,
    define_flags,
    session_seconds,
)

FIELDS = dataclasses.fields(TrainConfig)
NAN, INF = float("nan"), float("inf")


def parse(*arguments: str) -> TrainConfig:
    """Return the configuration that a command line with these arguments has."""
    return config_from_flags(parsed(*arguments))


def parsed(*arguments: str) -> flags.FlagValues:
    """Return a fresh set of flags that has read these arguments."""
    values = flags.FlagValues()
    define_flags(values)
    values(["train", *arguments])
    return values


# ---- flags --------------------------------------------------------------------------------------


def test_there_is_a_documented_flag_for_every_field_and_no_other():
    values = parsed()
    assert set(values) - {"preset"} == {field.name for field in FIELDS}
    for field in FIELDS:
        flag = values[field.name]
        # absl adds a hint to flags that may be repeated
        assert flag.help.startswith(field.metadata["help"]) and len(field.metadata["help"]) > 10
        default = tuple(flag.default) if isinstance(flag.default, list) else flag.default
        assert default == field.default and type(default) is type(field.default)
    assert len(values["preset"].help) > 10


def test_flags_of_the_contract_stay():
    contract = """preset model train_data eval_data output_dir resume overwrite seed sft_steps
        grpo_steps num_generations prompts_per_rollout micro_batch mini_batch max_prompt_tokens
        max_completion_tokens lora_rank lora_alpha beta epsilon learning_rate temperature
        checkpoint_every eval_limit reward mesh session"""
    assert set(contract.split()) <= set(parsed())


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_presets_are_valid_and_complete_defaults(preset):
    cfg = parse(f"--preset={preset}")
    assert cfg == TrainConfig(**PRESETS[preset])
    check_config(cfg)


def test_a_preset_fits_the_machine_it_is_named_after():
    check_batches(parse("--preset=gemma3_1b_v5e8"), 8)
    check_batches(parse("--preset=tiny"), 1)
    with pytest.raises(ValueError, match="micro_batch"):
        check_batches(parse("--preset=gemma3_1b_v5e8"), 7)


def test_no_preset_is_the_tiny_one():
    assert parse() == parse("--preset=tiny") == TrainConfig(**PRESETS["tiny"])


def test_a_flag_wins_over_the_preset_and_the_preset_over_the_default():
    field = {field.name: field.default for field in FIELDS}
    assert PRESETS["tiny"]["beta"] != field["beta"]
    assert parse().beta == PRESETS["tiny"]["beta"]
    assert parse("--beta=0.5").beta == 0.5
    # a flag given with the default's value is given all the same
    assert parse(f"--beta={field['beta']}").beta == field["beta"]
    assert parse("--preset=gemma3_1b_v5e8").beta == field["beta"]
    assert parse("--preset=gemma3_1b_v5e8", "--remat=none").remat == "none"


def test_flags_are_read_with_their_types():
    cfg = parse(
        "--model=m", "--seed=7", "--resume", "--lora_alpha=8", "--reward=a:b=2", "--reward=c:d"
    )
    assert (cfg.model, cfg.seed, cfg.resume, cfg.lora_alpha) == ("m", 7, True, 8.0)
    assert cfg.reward == ("a:b=2", "c:d")
    assert parse().reward == ()


@pytest.mark.parametrize(
    "argument", ["--preset=huge", "--sft_step=3", "--seed=x", "--beta=much", "--resume=perhaps"]
)
def test_malformed_flags_are_refused_by_absl(argument):
    with pytest.raises(flags.Error):
        parsed(argument)


# ---- refusals -----------------------------------------------------------------------------------

AT_LEAST = {
    0: """rollout_slots sft_steps grpo_steps eval_limit sample_every seed beta learning_rate
        sft_learning_rate weight_decay warmup_fraction format_weight process_weight
        outcome_weight length_weight repetition_weight code_weight max_reward_errors
        checkpoint_every checkpoint_minutes trace_every max_skipped process_id""",
    1: """max_prompt_tokens max_completion_tokens lora_rank sft_batch sft_micro_batches
        prompts_per_rollout mini_batch num_iterations length_buckets micro_batch eval_batch
        keep_checkpoints length_cache num_processes""",
    2: "num_generations",
    LEAST_TEMPERATURE: "temperature",
}
BOUNDS = [(name, least) for least, names in AT_LEAST.items() for name in names.split()]
CHOICES = ["on_bad_row", "kl", "kl_in", "objective", "aggregation", "baseline", "advantage_scale",
           "process_matcher", "dtype", "remat", "attention", "logprob"]  # fmt: skip
ABOVE_ZERO = ["max_grad_norm", "lora_alpha", "epsilon", "epsilon_high"]
BELOW_ONE = ["adam_b1", "adam_b2"]


@pytest.mark.parametrize(("name", "least"), BOUNDS)
def test_a_lower_bound_is_kept(name, least):
    check_config(dataclasses.replace(TrainConfig(mini_batch=1), **{name: least}))
    for low in (least - 1, NAN):
        with pytest.raises(ValueError, match=f"^--{name}: must be at least {least}, got {low}; "):
            check_config(dataclasses.replace(TrainConfig(), **{name: low}))


@pytest.mark.parametrize("name", ABOVE_ZERO)
def test_zero_is_too_little(name):
    for low in (0.0, -1.0, NAN):
        with pytest.raises(ValueError, match=f"^--{name}: must be above 0, got {low}; "):
            check_config(dataclasses.replace(TrainConfig(), **{name: low}))


@pytest.mark.parametrize("name", BELOW_ONE)
def test_a_decay_is_below_one(name):
    check_config(dataclasses.replace(TrainConfig(), **{name: 0.0}))
    for bad in (1.0, -0.1, NAN):
        with pytest.raises(ValueError, match=f"^--{name}: must be at least 0 and below 1, got "):
            check_config(dataclasses.replace(TrainConfig(), **{name: bad}))


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_the_listed(name):
    with pytest.raises(ValueError, match=f"^--{name}: must be one of .*, got 'mine'; set --{name}"):
        check_config(dataclasses.replace(TrainConfig(), **{name: "mine"}))


@pytest.mark.parametrize("name", ["epsilon", "epsilon_high", "max_grad_norm"])
def test_what_clips_may_be_infinite(name):
    assert check_config(dataclasses.replace(TrainConfig(), **{name: INF})) is None


def test_every_number_has_a_bound():
    bounded = {name for name, _ in BOUNDS} | set(ABOVE_ZERO) | set(BELOW_ONE)
    numbers = {field.name for field in FIELDS if field.type in (int, float)}
    assert numbers == bounded


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(warmup_fraction=1.1), "--warmup_fraction: must be at most 1, got 1.1"),
        (dict(resume=True, overwrite=True), "--resume and --overwrite: at most one may be set"),
        (
            dict(prompts_per_rollout=6, mini_batch=4),
            r"--mini_batch: must divide prompts_per_rollout 6, got 4; .* one of \[1, 2, 3, 6\]",
        ),
        (dict(session="9"), "--session: must be a time"),
        (dict(temperature=INF), "--temperature: must be finite, got inf; lower --temperature"),
        (dict(beta=INF), "--beta: must be finite, got inf; lower --beta"),
        (dict(sft_learning_rate=INF), "--sft_learning_rate: must be finite, got inf"),
        (dict(seed=2**32), r"--seed: must be below 2\*\*32, .* got 4294967296; lower it"),
        (dict(output_dir=""), "--output_dir: must name a folder, got ''"),
        (dict(keep_best="-"), "--keep_best: must be a metric or -metric, got '-'"),
        (dict(keep_best="rewards"), "--keep_best: must be a metric or -metric, got 'rewards'"),
        (dict(profile_steps="5"), "--profile_steps: must be FIRST:LAST, GRPO steps from 1 on"),
        (dict(profile_steps="5:4"), "--profile_steps: must be FIRST:LAST, .* got '5:4'"),
        (dict(profile_steps="0:4"), "--profile_steps: must be FIRST:LAST, .* got '0:4'"),
    ],
)
def test_contradictions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check_config(dataclasses.replace(TrainConfig(), **changes))


def test_a_refusal_reaches_the_command_line():
    with pytest.raises(ValueError, match="--temperature: must be at least 0.0001, got 0.0"):
        parse("--temperature=0")


@pytest.mark.parametrize(
    ("devices", "changes", "message"),
    [
        # 6 prompts x 4 = 24 rows over 2 devices: 1, 2, 3, 4, 6 or 12 rows a device at a time
        (
            2,
            dict(mini_batch=6, prompts_per_rollout=6, micro_batch=5),
            r"--micro_batch: rows of a mini-batch 24 \(prompts 6 x group 4\) must be divisible by "
            r"devices 2 x micro_batch, got 5; set --micro_batch to one of \[1, 2, 3, 4, 6, 12\]",
        ),
        (8, dict(mini_batch=1), "--micro_batch: .* got 1; raise --mini_batch"),
        (4, dict(sft_batch=10), r"--sft_batch: must be divisible by 4 .*; set --sft_batch=12"),
        (4, dict(sft_micro_batches=3), r"--sft_batch: .* by 12 .*sft_micro_batches\).*=24"),
        (
            8,
            dict(prompts_per_rollout=12),
            r"--prompts_per_rollout: must be divisible by 8 .*, got 12; .*=16",
        ),
    ],
)
def test_batches_that_do_not_divide_are_refused(devices, changes, message):
    with pytest.raises(ValueError, match=message):
        check_batches(dataclasses.replace(TrainConfig(), **changes), devices)


# ---- session ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9h", 32_400), ("50m", 3000), ("30s", 30), ("1.5h", 5400), ("0.5s", 0.5), ("", INF)],
)
def test_session_is_a_time(text, seconds):
    assert session_seconds(text) == seconds


@pytest.mark.parametrize("text", ["9", "h", "9d", "9 hours", "-1h", "0s", "nanh", "infh", "x9h"])
def test_session_that_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match="--session: must be a time such as 9h, 50m or 30s, or"):
        session_seconds(text)


def test_the_kl_in_the_reward_wants_an_estimator_of_its_own():
    # ratio_k3 is the default and would be k3 there, which drives the policy away: docs/kl.md
    with pytest.raises(ValueError, match="^--kl: must be k1, k2 or k3 with kl_in reward"):
        check_config(TrainConfig(kl_in="reward"))
    for kind in ("k1", "k2", "k3"):
        check_config(TrainConfig(kl_in="reward", kl=kind))


@pytest.mark.parametrize("objective", ["gspo", "rloo"])
def test_objectives_of_whole_completions_want_the_mean_of_completions(objective):
    check_config(TrainConfig(objective=objective))
    for aggregation in ("dapo", "dr_grpo"):
        with pytest.raises(ValueError, match=f"^--aggregation: must be grpo with .* {objective}"):
            check_config(TrainConfig(objective=objective, aggregation=aggregation))


def test_every_paper_in_the_table_is_a_set_of_flags():
    text = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
    rows = [line for line in text.splitlines() if "](https://arxiv.org" in line]
    names = [line.split(",")[0].strip("| ") for line in rows]
    assert names == ["GRPO", "Dr. GRPO", "DAPO", "GSPO", "CISPO", "RLOO"]
    configs = {}
    for name, line in zip(names, rows, strict=True):
        flags_of_row = re.findall(r"`(--[^`]+)`", line)[0].split()
        configs[name] = parse("--preset=gemma3_1b_v5e8", *flags_of_row)
        check_config(configs[name])
    assert len(set(configs.values())) == 6
    assert {configs[name].objective for name in ("GSPO", "CISPO", "RLOO")} == {
        "gspo", "cispo", "rloo"
    }  # fmt: skip
    assert configs["RLOO"].mini_batch == configs["RLOO"].prompts_per_rollout
