"""Make the embedded default from a seed: datasets, SentencePiece tokenizer, tiny base model.

    python -m gemma_cot.tasks.pretrain --output=data

"Pretraining" is next-token loss on plain worked solutions in chat turns, without any tag, all
parameters trained. data/README.md says how long it takes and what comes out.
"""

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece
from absl import app, flags

from gemma_cot.axes import round_up
from gemma_cot.config import TINY
from gemma_cot.model.load import save_pretrained, write_json
from gemma_cot.model.logprob import logprobs_and_entropy
from gemma_cot.model.params import init_params, num_params
from gemma_cot.tasks.dataset import pretraining_pairs, unique_rows
from gemma_cot.tokenizer import (
    CHAT_TEMPLATE,
    END_OF_TURN,
    START_OF_TURN,
    Tokenizer,
    encode_prompt,
    encode_target,
    load_tokenizer,
)

FLAGS = flags.FLAGS
TRAIN_ROWS, EVAL_ROWS = 4000, 849
BATCH_TOKENS = 4096
BUFFER_PAIRS = 4096
# The first pieces, in the order of their ids as in Gemma 3. Other tokenizers (transformers,
# llama.cpp) cannot read from tokenizer.model that these are never split; they are told below.
CONTROL = ("<pad>", "<eos>", "<bos>", "<unk>")
SYMBOLS = ("<mask>", "[multimodal]", *(f"<unused{i}>" for i in range(99)), START_OF_TURN,
           END_OF_TURN, "\n", "\n\n")  # fmt: skip


def write_datasets(out_dir: Path, seed: int) -> set[str]:
    """Write train.jsonl and eval.jsonl; return their questions, which pretraining leaves out."""
    taken: set[str] = set()
    for name, count, row_seed in (("eval", EVAL_ROWS, seed + 1), ("train", TRAIN_ROWS, seed + 2)):
        rows = unique_rows(row_seed, count, taken)
        with open(out_dir / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row) + "\n")
    return taken


def train_tokenizer(model_dir: Path, seed: int, taken: set[str]) -> None:
    """Train a BPE tokenizer to Gemma 3's conventions on pretraining text; write its HF files."""
    pairs = pretraining_pairs(seed, taken)
    texts = [text for _ in range(20_000) for text in next(pairs)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(model_dir / "tokenizer"),
        model_type="bpe",
        vocab_size=TINY.vocab_size,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=list(SYMBOLS),
        byte_fallback=True,
        split_digits=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        allow_whitespace_only_pieces=True,
        required_chars="<>/=_",
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    (model_dir / "tokenizer.vocab").unlink()
    write_json(model_dir / "tokenizer_config.json", tokenizer_config())


def tokenizer_config() -> dict:
    """Return what transformers and llama.cpp need to know beside tokenizer.model."""
    special = {*CONTROL, START_OF_TURN, END_OF_TURN}
    added = {
        str(i): {"content": piece, "normalized": False, "special": piece in special}
        for i, piece in enumerate(CONTROL + SYMBOLS)
    }
    return {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "added_tokens_decoder": added,
        "chat_template": CHAT_TEMPLATE,
    }


def batches(tokenizer: Tokenizer, seed: int, taken: set[str]) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (tokens_BT, start_B, mask_BT) of like-length pairs, about BATCH_TOKENS tokens each.

    mask is True on the solution and its stop token: the random numbers of a question are noise.
    """
    pairs = pretraining_pairs(seed, taken)
    rng = random.Random(seed)
    while True:
        rows = []
        for _ in range(BUFFER_PAIRS):
            question, solution = next(pairs)
            rows.append((encode_prompt(tokenizer, question), encode_target(tokenizer, solution)))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        groups, at = [], 0
        while at < len(rows):
            # the width of the longest row among those that would fit at the first row's width
            width = round_up(len(rows[at][0]) + len(rows[at][1]), 16)
            count = BATCH_TOKENS // width
            last = rows[min(at + count, len(rows)) - 1]
            width = round_up(len(last[0]) + len(last[1]), 16)
            count = BATCH_TOKENS // width
            if at + count <= len(rows):
                groups.append((width, rows[at : at + count]))
            at += count
        rng.shuffle(groups)
        for width, group in groups:
            tokens = np.zeros((len(group), width), np.int32)
            mask = np.zeros((len(group), width), bool)
            start = np.zeros((len(group),), np.int32)
            for b, (prompt, solution) in enumerate(group):
                start[b] = width - len(prompt) - len(solution)
                tokens[b, start[b] :] = prompt + solution
                mask[b, width - len(solution) :] = True
            yield tokens, start, mask


def make_step(optimizer: optax.GradientTransformation):
    """Return the jitted step (params, opt_state, batch) -> (params, opt_state, loss in nats)."""

    def loss_fn(params, tokens_BT, start_B, mask_BT):
        logp_BT, _ = logprobs_and_entropy(params, TINY, tokens_BT, start_B)
        return -jnp.where(mask_BT, logp_BT, 0.0).sum() / mask_BT.sum()

    def step(params, opt_state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, *batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def main(_) -> None:
    """Write the datasets, train the tokenizer, train the model."""
    out_dir = Path(FLAGS.output)
    model_dir = out_dir / "tiny_model"
    model_dir.mkdir(parents=True, exist_ok=True)
    taken = write_datasets(out_dir, FLAGS.seed)
    train_tokenizer(model_dir, FLAGS.seed, taken)
    tokenizer = load_tokenizer(model_dir, TINY.vocab_size)
    params = init_params(jax.random.key(FLAGS.seed), TINY)
    print(f"{num_params(TINY):,} parameters, {len(taken)} questions held out", flush=True)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, FLAGS.learning_rate, 200, FLAGS.decay_steps, FLAGS.learning_rate / 30
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b1=0.9, b2=0.98, weight_decay=0.01)
    )
    opt_state = optimizer.init(params)
    step = make_step(optimizer)
    began, tokens_seen = time.time(), 0
    source = batches(tokenizer, FLAGS.seed + 3, taken)
    for n in range(1, FLAGS.steps + 1):
        batch = next(source)
        params, opt_state, loss = step(params, opt_state, batch)
        tokens_seen += batch[0].size
        if n % 100 == 0 or n == FLAGS.steps:
            rate = tokens_seen / (time.time() - began)
            print(
                f"step {n:6d}/{FLAGS.steps}  loss {float(loss):.4f} nats a token  "
                f"{rate:,.0f} tokens/s  {time.time() - began:.0f} s",
                flush=True,
            )
        if n % 1000 == 0 or n == FLAGS.steps:
            stored = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
            save_pretrained(model_dir, TINY, stored)


if __name__ == "__main__":
    flags.DEFINE_string("output", None, "folder that receives tiny_model/ and the two datasets")
    flags.DEFINE_integer("seed", 0, "seed of datasets, tokenizer text, weights and batches")
    flags.DEFINE_integer("steps", 3000, "optimiser steps")
    flags.DEFINE_integer("decay_steps", 6000, "steps of the learning rate's warm-up and decay")
    flags.DEFINE_float("learning_rate", 3e-3, "peak learning rate")
    flags.mark_flag_as_required("output")
    app.run(main)
