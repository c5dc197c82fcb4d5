"""Time one piece of transformers, PEFT or TRL: python benchmarks/torch_peer.py --work=update

In an environment of its own: `pip install torch transformers trl peft datasets`. Same shapes, LoRA
rank, group and lengths as `ours.py`. `update` is a GRPO-shaped step by hand on transformers and
PEFT (TRL has no public single step), `iteration` is TRL's GRPOTrainer. Prints one JSON line.
"""

import os
import tempfile
import time

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"

import numpy as np
import shapes
import torch
from peft import LoraConfig, get_peft_model
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

flags = shapes.parse("transformers, PEFT, TRL")
size = shapes.SHAPES[flags.shape]
V = size["vocab_size"]
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = getattr(torch, flags.dtype)
tokens_BT = shapes.tokens(flags)
ids = torch.from_numpy(tokens_BT.astype(np.int64)).to(device)
torch.manual_seed(0)
torch.set_default_device(device)  # where random weights are drawn
model = Gemma3ForCausalLM(
    Gemma3TextConfig(
        vocab_size=V, hidden_size=size["embed_dim"], intermediate_size=size["mlp_dim"],
        num_hidden_layers=size["num_layers"], num_attention_heads=size["num_heads"],
        num_key_value_heads=size["num_kv_heads"], head_dim=size["head_dim"],
        query_pre_attn_scalar=size["head_dim"], sliding_window=shapes.WINDOW,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=2, eos_token_id=1,
    )
).eval().to(dtype)  # fmt: skip
torch.set_default_device("cpu")
lora = LoraConfig(
    r=shapes.RANK, lora_alpha=shapes.RANK // 2, task_type="CAUSAL_LM",
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
)  # fmt: skip


def forget_peak() -> None:
    """Let the peak of this process's memory, and of a GPU's, begin anew."""
    shapes.forget_peak()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def seconds(work) -> dict:
    """Return `shapes.seconds` of work that a GPU may still be busy with when it returns."""

    def done():
        work()
        if device == "cuda":
            torch.cuda.synchronize()

    forget_peak()
    return shapes.seconds(done, flags.repeats)


@torch.inference_mode()
def forward() -> dict:
    """Full logits of all rows."""
    return seconds(lambda: model(input_ids=ids))


@torch.inference_mode()
def sample() -> dict:
    """`generate`, rows never stopping early."""
    prompt = ids[:, : flags.prompt]

    def once():
        out = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), min_new_tokens=flags.new,
            max_new_tokens=flags.new, do_sample=True, temperature=shapes.TEMPERATURE, top_k=50,
            top_p=1.0, use_cache=True,
        )  # fmt: skip
        assert out.shape == (flags.rows, flags.prompt + flags.new)

    return seconds(once)


def completion_logprobs(model) -> torch.Tensor:
    """Return the log-probs of the completion tokens, the unembedding at those positions only."""
    logits = model(input_ids=ids, logits_to_keep=flags.new + 1).logits[:, :-1].float()
    chosen = torch.gather(logits, 2, ids[:, flags.prompt :, None])[..., 0]
    return chosen - torch.logsumexp(logits, -1)


@torch.inference_mode()
def logprobs() -> dict:
    """Log-probs of the completions."""
    return seconds(lambda: completion_logprobs(model))


def update() -> dict:
    """Log-probs, clipped loss with KL, backward, clip, AdamW, on the adapter."""
    policy = get_peft_model(model, lora).train()
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=3e-6)
    advantage_B1 = (torch.arange(flags.rows, device=device) % 4 - 1.5)[:, None]
    reference_BT = torch.full((flags.rows, flags.new), -9.0, device=device)

    def once():
        optimizer.zero_grad()
        logp_BT = completion_logprobs(policy)
        ratio_BT = torch.exp(logp_BT - logp_BT.detach())
        clipped_BT = ratio_BT.clamp(0.8, 1.2)
        surrogate_BT = torch.minimum(ratio_BT * advantage_B1, clipped_BT * advantage_B1)
        d_BT = reference_BT - logp_BT
        (-surrogate_BT + shapes.BETA * (torch.exp(d_BT) - d_BT - 1)).mean().backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.1)
        optimizer.step()

    return seconds(once)


def iteration() -> dict:
    """TRL's GRPOTrainer: generation, reference, update."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    words = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3} | {f"w{i}": i for i in range(4, V)}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>",
        unk_token="<unk>", padding_side="left",
    )  # fmt: skip
    rows = [shapes.tokens(flags, seed)[:: shapes.GROUP] for seed in range(flags.repeats + 2)]
    prompts = [" ".join(f"w{i}" for i in row[: flags.prompt]) for part in rows for row in part]
    stamps = []

    class Clock(TrainerCallback):
        """Note when each step begins and ends."""

        def on_step_begin(self, *_, **__):
            stamps.append(time.perf_counter())

        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

    def reward(completions, **_):
        return [float(i % 4) for i in range(len(completions))]

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder, per_device_train_batch_size=flags.micro,
            gradient_accumulation_steps=flags.rows // flags.micro, num_generations=shapes.GROUP,
            max_completion_length=flags.new, beta=shapes.BETA, temperature=shapes.TEMPERATURE,
            top_k=50, top_p=1.0, max_steps=flags.repeats + 1, learning_rate=3e-6,
            generation_kwargs={"min_new_tokens": flags.new}, use_cpu=device == "cpu",
            bf16=flags.dtype == "bfloat16", report_to=[], logging_steps=1000,
            save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=model, reward_funcs=[reward], processing_class=tokenizer, peft_config=lora,
            train_dataset=Dataset.from_dict({"prompt": prompts}), args=config, callbacks=[Clock()],
        )  # fmt: skip
        forget_peak()
        trainer.train()
    times = [end - begin for begin, end in zip(stamps[::2], stamps[1::2], strict=True)]
    return shapes.spread(times[1:]) | {"first_call_s": times[0]}


figures, on = globals()[flags.work](), {}
if device == "cuda":
    on = dict(device=torch.cuda.get_device_name(), device_bytes=torch.cuda.max_memory_allocated())
shapes.emit("torch", flags, ("torch", "transformers", "trl", "peft"), figures, **on)
