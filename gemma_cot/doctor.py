"""Self-test of this installation and of a model folder, in about a minute on a CPU.

    python -m gemma_cot.doctor                  # the embedded model
    python -m gemma_cot.doctor --model=DIR      # also: every tensor present, shaped and finite
    python -m gemma_cot.doctor --reward=package.module:function   # a reward function, seconds

Prints a line per check, what was measured and its limit; exit code 0 when all pass, else 1. Every
check of a model runs in float32 at the highest matmul precision.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gemma_cot import cli
from gemma_cot.config import ModelConfig, embedded
from gemma_cot.guard.lint import lines, lint_reward
from gemma_cot.guard.user import load_reward
from gemma_cot.hf_config import read_json
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained
from gemma_cot.model.logprob import token_logprobs
from gemma_cot.model.params import Params, num_params
from gemma_cot.model.sample import Samples, sample
from gemma_cot.tokenizer import (
    BOS,
    EOS,
    Tokenizer,
    decode,
    encode,
    encode_prompt,
    load_tokenizer,
    render_turns,
)

FLAGS = flags.FLAGS
LIMIT = 1e-4  # of a log-prob or logit in float32: two orders of additions differ by about 1e-5
QUESTION = "What does this print?\nx = 12 * 34\nprint(x)"


@dataclass(frozen=True)
class Check:
    """The outcome of one check."""

    name: str
    passed: bool
    detail: str


def check_tensors(cfg: ModelConfig, params: Params) -> Check:
    """Are all values finite? (Presence, names and shapes are checked by loading.)"""
    paths = jax.tree.leaves_with_path(params)
    bad = [jax.tree_util.keystr(path) for path, x in paths if not np.isfinite(np.asarray(x)).all()]
    detail = f"{num_params(cfg):,} parameters, all finite"
    return Check("tensors", not bad, detail if not bad else f"not finite: {', '.join(bad)}")


def check_golden() -> Check:
    """Do the embedded model's logits equal those that transformers computed for it?"""
    cfg, params = load_pretrained(embedded("tiny_model"), "float32")
    golden = np.load(embedded("golden.npz"))
    ours_BTV = logits(params, cfg, jnp.asarray(golden["tokens_BT"]), jnp.asarray(golden["start_B"]))
    real_BT = np.arange(ours_BTV.shape[1]) >= golden["start_B"][:, None]
    worst = float(np.abs(np.asarray(ours_BTV) - golden["logits_BTV"])[real_BT].max())
    return Check("golden logits", worst < LIMIT, f"max |ours - transformers| {worst:.1e}")


def check_tokenizer(cfg: ModelConfig, tokenizer: Tokenizer) -> list[Check]:
    """One <bos>, both stop ids, a template that survives the round trip, sizes that agree."""
    ids = encode_prompt(tokenizer, QUESTION, "Think.")
    text = render_turns(QUESTION, "Think.")
    back = decode(tokenizer, encode(tokenizer, text))
    stops = {EOS, tokenizer.end_of_turn}
    size = tokenizer.vocab_size
    return [
        Check("one <bos>", ids[0] == BOS and ids.count(BOS) == 1, f"{ids.count(BOS)} in a prompt"),
        Check("stop ids", stops <= set(tokenizer.stop_ids), f"{tokenizer.stop_ids}"),
        Check("template", back == text, f"{len(ids)} tokens, decoded to {back!r:.60}"),
        Check("sizes", size <= cfg.vocab_size, f"{size} pieces, {cfg.vocab_size} embedding rows"),
    ]


def sample_some(
    cfg: ModelConfig, params: Params, tokenizer: Tokenizer, stop_ids: tuple[int, ...]
) -> Samples:
    """Return two completions of 24 tokens for two left-padded prompts, by the cached sampler."""
    prompts = [encode_prompt(tokenizer, QUESTION), encode_prompt(tokenizer, "7 + 8")]
    width = max(map(len, prompts))
    tokens_PT = np.array([[0] * (width - len(ids)) + ids for ids in prompts], np.int32)
    start_P = np.array([width - len(ids) for ids in prompts], np.int32)
    return sample(
        params, cfg, jnp.asarray(tokens_PT), jnp.asarray(start_P), jax.random.key(0),
        num_completions=2, max_new_tokens=24, temperature=1.0, stop_ids=stop_ids,
    )  # fmt: skip


def check_sampler(cfg: ModelConfig, params: Params, tokenizer: Tokenizer) -> list[Check]:
    """Does cached decoding see the network that training sees, and stop where it should?"""
    out = sample_some(cfg, params, tokenizer, tokenizer.stop_ids)
    third = int(np.asarray(out.tokens_BT)[0, np.asarray(out.completion_mask_BT)[0].argmax() + 2])
    stop_ids = (*tokenizer.stop_ids, third)  # so that one row stops, whatever the model writes
    out = sample_some(cfg, params, tokenizer, stop_ids)
    trainer_BT = token_logprobs(params, cfg, out.tokens_BT, out.start_B)
    mask_BT = np.asarray(out.completion_mask_BT)
    drift = np.abs(np.asarray(trainer_BT) - np.asarray(out.logp_BT))[mask_BT].max()
    is_stop_BT = np.isin(np.asarray(out.tokens_BT), stop_ids) & mask_BT
    last_B = mask_BT.shape[1] - 1 - mask_BT[:, ::-1].argmax(axis=1)
    rows = zip(is_stop_BT, last_B, strict=True)
    only_last = all(set(np.flatnonzero(row)) <= {last} for row, last in rows)
    return [
        Check("sampler = trainer", bool(drift < LIMIT), f"max |log-prob difference| {drift:.1e}"),
        Check("stop token in mask", only_last, f"{int(is_stop_BT.sum())} of 4 rows stopped"),
    ]


def examine(model_dir: str) -> list[Check]:
    """Run every check on a model folder; a folder that cannot be loaded is one failed check."""
    checks = [check_golden()]
    try:
        cfg = ModelConfig.from_hf(read_json(Path(model_dir) / "config.json"))
        tokenizer = load_tokenizer(model_dir, cfg.vocab_size)
        cfg, params = load_pretrained(model_dir, "float32")
    except ValueError as error:
        return [*checks, Check("model folder", False, str(error))]
    checks += [Check("model folder", True, model_dir), check_tensors(cfg, params)]
    return [*checks, *check_tokenizer(cfg, tokenizer), *check_sampler(cfg, params, tokenizer)]


def main_reward(spec: str) -> None:
    """Print what a reward function wrongly pays and refuses; exit with 1 when it does."""
    name, function, _ = load_reward(spec)
    print(f"reward     {name}", flush=True)
    report = lint_reward(function)
    print("\n".join(lines(report)))
    sys.exit(0 if report.passed else 1)


def main() -> None:
    """Print the table; exit with 1 when a check failed."""
    if FLAGS.reward:
        main_reward(FLAGS.reward)
    jax.config.update("jax_default_matmul_precision", "highest")
    checks = examine(FLAGS.model or embedded("tiny_model"))
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:20s} {check.detail}")
    failed = [check.name for check in checks if not check.passed]
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(checks)} checks passed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    flags.DEFINE_string("model", "", "Hugging Face model folder; empty: the embedded tiny model.")
    flags.DEFINE_string("reward", "", "package.module:function to test in place of a model.")
    cli.run(main)
