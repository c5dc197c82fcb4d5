"""What `python -m gemma_cot.train` leaves behind, used by transformers and PEFT: merged/, adapter/.

A shortened run of the embedded default; the prompts are evaluation questions in the chat template.
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gemma_cot.config import embedded
from gemma_cot.data import left_pad, read_jsonl
from gemma_cot.lora import load_peft
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained
from gemma_cot.model.sample import sample
from gemma_cot.tokenizer import encode_prompt, load_tokenizer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytestmark = pytest.mark.interop

# Two orders of summation in float32 on logits of size up to 30; measured below 3e-5.
LOGIT_ATOL = 1e-4
NUM_PROMPTS, MAX_NEW_TOKENS = 12, 144


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """The folder of a short run: 20 SFT steps and 2 of GRPO, on one CPU device.

    The low learning rate leaves the model able to answer; at the default one it must learn longer.
    """
    folder = tmp_path_factory.mktemp("run") / "short"
    steps = ("--sft_steps=20", "--sft_learning_rate=6e-4", "--grpo_steps=2", "--eval_limit=8")
    arguments = (*steps, f"--output_dir={folder}")
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "gemma_cot.train", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Questions of the evaluation set, of different lengths."""
    return [row.prompt for row in read_jsonl(embedded("eval.jsonl"))[0][:NUM_PROMPTS]]


def ours(params, cfg, tokenizer, prompts, lora=None):
    """Return (completions as token lists, whole rows [B, T], first real columns), greedy."""
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    tokens, start = left_pad(rows, max(map(len, rows)))
    out = sample(
        params, cfg, tokens, start, jax.random.key(0), num_completions=1, temperature=0.0,
        max_new_tokens=MAX_NEW_TOKENS, stop_ids=tokenizer.stop_ids, lora=lora,
    )  # fmt: skip
    whole, mask = np.asarray(out.tokens_BT), np.asarray(out.completion_mask_BT)
    return [row[m].tolist() for row, m in zip(whole, mask, strict=True)], whole, start


def theirs(model, tokenizer, prompts, stop_ids):
    """Return the completions of `generate` as token lists, the stop token included, greedy."""
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    rows = model.generate(**batch, do_sample=False, max_new_tokens=MAX_NEW_TOKENS)
    completions = rows[:, batch["input_ids"].shape[1] :].tolist()
    ends = [next((i + 1 for i, t in enumerate(row) if t in stop_ids), None) for row in completions]
    return [row[:end] for row, end in zip(completions, ends, strict=True)]


def assert_same_answers(ours, theirs, stop_ids):
    assert ours == theirs
    for row in ours:
        assert len(row) >= 64 or row[-1] in stop_ids
    assert sum(map(len, ours)) > 64 * len(ours) / 2  # the comparison means something:
    assert len({tuple(row) for row in ours}) == len(ours)  # every prompt has its own answer,
    assert all(len(set(row)) > 10 for row in ours)  # and none is a token over and over


def largest_difference(ours, theirs, tokens, start):
    real = np.arange(tokens.shape[1])[None, :] >= start[:, None]
    return np.abs(np.asarray(ours) - theirs.detach().numpy())[real].max()


def test_merged_generates_the_same_in_transformers(run_dir, prompts, reload_gemma, their_logits):
    folder = run_dir / "merged"
    cfg, params = load_pretrained(folder, "float32")
    tokenizer = load_tokenizer(folder)
    answers, tokens, start = ours(params, cfg, tokenizer, prompts)
    model = reload_gemma(folder)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    # generation_config.json, which travelled along, says where to stop
    assert sorted(model.generation_config.eos_token_id) == list(tokenizer.stop_ids)
    generated = theirs(model, their_tokenizer, prompts, tokenizer.stop_ids)
    assert_same_answers(answers, generated, tokenizer.stop_ids)
    off = largest_difference(
        logits(params, cfg, tokens, start), their_logits(model, tokens, start), tokens, start
    )
    print(f"\nmerged/ of a run: {sum(map(len, answers))} tokens the same, logits {off:.1e}")
    assert off < LOGIT_ATOL


def test_adapter_generates_the_same_in_peft(run_dir, prompts, their_logits):
    """On the base model whose folder adapter_config.json names."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(
        run_dir / "adapter", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    base = model.peft_config["default"].base_model_name_or_path
    cfg, params = load_pretrained(base, "float32")
    lora, tokenizer = load_peft(run_dir / "adapter", cfg), load_tokenizer(base)
    answers, tokens, start = ours(params, cfg, tokenizer, prompts, lora)
    their_tokenizer = transformers.AutoTokenizer.from_pretrained(base, padding_side="left")
    generated = theirs(model, their_tokenizer, prompts, tokenizer.stop_ids)
    assert_same_answers(answers, generated, tokenizer.stop_ids)
    run = their_logits(model, tokens, start)
    off = largest_difference(logits(params, cfg, tokens, start, lora), run, tokens, start)
    print(f"\nadapter/ of a run: {sum(map(len, answers))} tokens the same, logits {off:.1e}")
    assert off < LOGIT_ATOL
    with model.disable_adapter():  # and the adapter does something
        untrained = their_logits(model, tokens, start)
    assert largest_difference(run.detach(), untrained, tokens, start) > 1000 * LOGIT_ATOL
