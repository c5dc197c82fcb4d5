"""Every setting of the program, in one place: model shapes, the run's settings, presets.

A flag's default and help text are the dataclass field below and nothing else (`settings` makes the
flags and checks them); a preset is a dict of overrides. Precision, in one paragraph: base weights
and activations are float32 on a CPU and bfloat16 on accelerators (`--dtype`); norms, softmax,
log-softmax, LoRA adapters, sums of gradients and optimiser state are float32 everywhere, and
adapters meet activations in the dtype of these; tests run in float32. No function hard-codes a
dtype for weights or activations.
"""

from dataclasses import dataclass, field
from pathlib import Path

from gemma_cot.hf_config import five_to_one, read_fields, write_fields

# --------------------------------------------------------------------------------------------
# Model shapes
# --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Gemma 3 text tower. Hashable: a static argument of every jitted function."""

    num_layers: int  # L
    embed_dim: int  # D
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    mlp_dim: int  # F
    vocab_size: int  # V
    window: int  # positions a local layer sees, self included
    global_layers: tuple[bool, ...]  # per layer: True sees everything, False sees `window`
    query_scalar: float = 256.0  # queries are multiplied by query_scalar ** -0.5
    rope_base_local: float = 10_000.0
    rope_base_global: float = 1_000_000.0
    rope_scale_global: float = 1.0  # positions are divided by this in global layers (8 from 4B)
    norm_eps: float = 1e-6
    max_positions: int = 32_768
    # not a shape, but what every function of the model must know: the code that does the work
    attention: str = "reference"  # or "pallas": `model.kernels` prefill and decode
    logprob: str = "reference"  # or "pallas": `model.kernels.logprob`

    @property
    def sizes(self) -> dict[str, int]:
        """Axis letter -> size, for `axes.shape_of`."""
        return {
            "L": self.num_layers,
            "D": self.embed_dim,
            "N": self.num_heads,
            "K": self.num_kv_heads,
            "Q": self.num_heads // self.num_kv_heads,
            "H": self.head_dim,
            "F": self.mlp_dim,
            "V": self.vocab_size,
        }

    @staticmethod
    def from_hf(hf: dict) -> "ModelConfig":
        """Read a Hugging Face `config.json`. Raises ValueError for what is not Gemma 3 text."""
        return ModelConfig(**read_fields(hf))

    def to_hf(self) -> dict:
        """Return the `config.json` that transformers reads."""
        return write_fields(self)


def _gemma3(L: int, D: int, N: int, K: int, H: int, F: int, **rest) -> ModelConfig:
    return ModelConfig(L, D, N, K, H, F, global_layers=five_to_one(L), **rest)


_LARGE = dict(vocab_size=262_208, window=1024, rope_scale_global=8.0, max_positions=131_072)
GEMMA3_270M = _gemma3(18, 640, 4, 1, 256, 2048, vocab_size=262_144, window=512)
GEMMA3_1B = _gemma3(26, 1152, 4, 1, 256, 6912, vocab_size=262_144, window=512)
GEMMA3_4B = _gemma3(34, 2560, 8, 4, 256, 10_240, **_LARGE)
GEMMA3_12B = _gemma3(48, 3840, 16, 8, 256, 15_360, **_LARGE)
GEMMA3_27B = _gemma3(62, 5376, 32, 16, 128, 21_504, query_scalar=168.0, **_LARGE)
# The embedded model: 6 layers so that one of them is global, as in the real family.
TINY = _gemma3(6, 128, 4, 1, 32, 256, query_scalar=32.0, vocab_size=768, window=512)


# --------------------------------------------------------------------------------------------
# A run: every flag of `python -m gemma_cot.train`, its default, its meaning
# --------------------------------------------------------------------------------------------


LEAST_TEMPERATURE = 1e-4  # what float32 rounds of a logit, divided by less, is no longer small


def setting(default, text: str):
    """Declare a field whose flag has this default and this help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class TrainConfig:
    """One training run. A flag per field; the help text is the documentation."""

    # what is trained on what, and where it goes
    model: str = setting("", "Hugging Face model folder; empty: the embedded tiny model.")
    train_data: str = setting("", "Training rows (JSONL); empty: the embedded ones.")
    eval_data: str = setting("", "Unseen evaluation rows (JSONL); empty: the embedded ones.")
    output_dir: str = setting("runs/tiny", "Folder of the run.")
    resume: bool = setting(False, "Go on with the run in output_dir.")
    overwrite: bool = setting(False, "Delete the run in output_dir and start anew.")
    seed: int = setting(0, "All randomness and data order are functions of (seed, step).")
    on_bad_row: str = setting("fail", "A row that breaks the schema: fail, or skip and count it.")
    instruction: str = setting("", "System text put before every question, in one user turn.")
    # lengths; longer samples are discarded and counted, never truncated
    max_prompt_tokens: int = setting(256, "Longest prompt, chat turns included.")
    max_completion_tokens: int = setting(512, "Longest completion, its stop token included.")
    # the adapter
    lora_rank: int = setting(32, "Rank r of the LoRA adapter.")
    lora_alpha: float = setting(16.0, "Adapter output is multiplied by lora_alpha / lora_rank.")
    # stage 1: supervised fine-tuning on the syntax
    sft_steps: int = setting(500, "SFT optimiser steps; 0 leaves the stage out.")
    sft_batch: int = setting(16, "Examples per SFT step, over all devices.")
    sft_micro_batches: int = setting(1, "Parts an SFT batch is cut into to save memory.")
    sft_learning_rate: float = setting(2e-4, "Peak learning rate of SFT.")
    # stage 2: GRPO
    grpo_steps: int = setting(1000, "GRPO optimiser steps; 0 leaves the stage out.")
    num_generations: int = setting(4, "G: completions per prompt, the group of GRPO.")
    rollout_slots: int = setting(
        0, "Completions a device decodes at a time, the others waiting in a queue; 0: all."
    )
    prompts_per_rollout: int = setting(32, "P: prompts sampled together; P / mini_batch updates.")
    mini_batch: int = setting(4, "Prompts per optimiser step, each with all its completions.")
    num_iterations: int = setting(1, "mu: passes over a rollout's mini-batches, with one pi_old.")
    dynamic_sampling: bool = setting(
        False, "Groups with equal rewards are replaced by sampling on until a mini-batch differs."
    )
    length_buckets: int = setting(
        1, "Widths of completions that updates are compiled for: each mini-batch takes the least "
        "that holds its longest; 1: always max_completion_tokens, as with dynamic sampling."
    )
    micro_batch: int = setting(1, "Completions a device runs forward and backward at a time.")
    learning_rate: float = setting(3e-6, "Peak learning rate of GRPO.")
    beta: float = setting(0.08, "Weight of the KL divergence from the reference (SFT) policy.")
    kl: str = setting(
        "ratio_k3", "KL estimator: ratio_k3 (exact gradient in the loss), k2, k3, k1."
    )
    kl_in: str = setting("loss", "Where it goes: loss, or reward (k1 is exact there).")
    objective: str = setting(
        "grpo", "Ratio of: a token (grpo, cispo), a completion's mean (gspo), all of it (rloo)."
    )
    epsilon: float = setting(0.2, "The probability ratio is clipped to 1 - epsilon ...")
    epsilon_high: float = setting(0.2, "... and to 1 + epsilon_high.")
    temperature: float = setting(1.0, "Sampling temperature; all log-probs are taken at it.")
    aggregation: str = setting(
        "grpo", "Token weights: grpo 1/(B n_i), dapo 1/sum n, dr_grpo 1/(B L)."
    )
    baseline: str = setting("mean", "A reward less: the group's mean, or leave_one_out (RLOO).")
    advantage_scale: str = setting(
        "group", "Advantages are divided by the std of: group, batch, none."
    )
    format_weight: float = setting(1.0, "Weight of the format reward (0 or 1).")
    process_weight: float = setting(
        1.0, "Weight of the process reward (0.2 a checkpoint, at most 1)."
    )
    outcome_weight: float = setting(1.0, "Weight of the outcome reward (0 or 1).")
    process_matcher: str = setting(
        "normalised", "How checkpoints are found: normalised or literal."
    )
    reward: tuple[str, ...] = setting(
        (), "A reward of your own, package.module:function=weight; may be given several times."
    )
    length_weight: float = setting(0.0, "Weight of the overlong penalty, 0 to -1; 0: off.")
    length_cache: int = setting(100, "It starts this many tokens before max_completion_tokens.")
    repetition_weight: float = setting(0.0, "Weight of minus the share of repeated 8-token runs.")
    math_verify: bool = setting(False, "Math-Verify (extra `math`) decides on equal formulas.")
    allow_code_execution: bool = setting(False, "Run code against metadata.tests in a sandbox.")
    code_weight: float = setting(1.0, "Weight of that reward (0 or 1).")
    max_reward_errors: int = setting(0, "Rows on which rewards may raise before the run stops.")
    # the optimiser of both stages: AdamW, linear warm-up, cosine to 0
    warmup_fraction: float = setting(0.1, "Share of a stage's steps over which the rate rises.")
    adam_b1: float = setting(0.9, "AdamW decay of the first moment.")
    adam_b2: float = setting(0.99, "AdamW decay of the second moment.")
    weight_decay: float = setting(0.1, "AdamW weight decay.")
    max_grad_norm: float = setting(0.1, "The gradient's global norm is clipped to this, once.")
    max_skipped: int = setting(5, "Updates in a row that may be skipped as not finite.")
    # the machine
    coordinator: str = setting(
        "", "Several hosts: HOST:PORT of process 0, auto (asks JAX); empty: one, or a TPU pod's."
    )
    num_processes: int = setting(1, "Several hosts: how many processes run this command.")
    process_id: int = setting(0, "Several hosts: which of them this one is, from 0.")
    mesh: str = setting("auto", "Devices as DATAxMODEL, e.g. 8x1; auto: suits model and batch.")
    dtype: str = setting("auto", "Weights and activations: float32, bfloat16; auto: by device.")
    remat: str = setting(
        "products", "What a backward pass computes again: none; all but matrix products; all."
    )
    attention: str = setting(
        "reference", "Attention by plain jnp: reference; by TPU kernels (elsewhere slow): pallas."
    )
    logprob: str = setting(
        "reference", "Unembedding and log-prob by chunks: reference; by a TPU kernel: pallas."
    )
    # seeing and keeping
    eval_limit: int = setting(0, "Evaluate on the first N rows only; 0: all of them.")
    eval_batch: int = setting(128, "Completions decoded together in evaluation, on all devices.")
    checkpoint_every: int = setting(
        100, "Steps between checkpoints (and one after each stage); 0: none between."
    )
    checkpoint_minutes: float = setting(0.0, "Minutes after which one is made anyway; 0: never.")
    keep_checkpoints: int = setting(
        2, "Latest checkpoints that are kept; from 2 on a damaged one loses little."
    )
    keep_best: str = setting(
        "", "Metric whose highest value's checkpoint is kept too, e.g. reward; -NAME: the lowest."
    )
    sample_every: int = setting(20, "GRPO steps between printed sample completions; 0: none.")
    trace_every: int = setting(20, "GRPO steps between traces, token by token; 0: none.")
    profile_steps: str = setting("", "GRPO steps a:b that write a JAX profiler trace to profile/.")
    session: str = setting(
        "", "Time limit (9h, 50m) or deadline (2026-11-26T18:00): training ends early enough for "
        "evaluation and export."
    )
    allow_changes: str = setting(
        "", "What may differ on --resume, as the refusal names it: flags' names, code, jax, dtype, "
        "reward, model, train_data, eval_data."
    )


# --preset: command, hardware -> overrides of the defaults above.
PRESETS: dict[str, dict] = {
    # python -m gemma_cot.train: 2 CPU cores, minutes; benchmarks/RESULTS.md has what it reached.
    "tiny": dict(
        max_prompt_tokens=64,
        max_completion_tokens=144,
        sft_batch=8,
        sft_learning_rate=2e-3,
        grpo_steps=60,
        prompts_per_rollout=16,
        mini_batch=16,
        micro_batch=16,
        learning_rate=1e-3,
        beta=0.02,
        max_grad_norm=1.0,
        weight_decay=0.0,
        eval_batch=64,
        checkpoint_every=100,
    ),
    # python -m gemma_cot.train --preset=gemma3_1b_v5e8 --model=DIR --train_data=F --eval_data=F
    # The recipe on a v5e-8 (8 chips of 16 GB), one session of 9 hours.
    "gemma3_1b_v5e8": dict(
        output_dir="runs/gemma3_1b",
        remat="all",
        length_buckets=4,
        session="9h",
        instruction=(
            "Think step by step, then answer. Write your thinking between <reasoning> and "
            "</reasoning> and only the final answer between <answer> and </answer>."
        ),
    ),
}


def embedded(name: str) -> str:
    """Return the path of a file or folder of the embedded default: tiny_model, train.jsonl, ...

    A wheel carries `data/` inside the package; a checkout has it beside the package.
    """
    package = Path(__file__).parent
    inside = package / "embedded"
    return str((inside if inside.is_dir() else package.parent / "data") / name)
