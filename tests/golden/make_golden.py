"""Write the golden set with transformers: python tests/golden/make_golden.py (under a minute, CPU).

tiny_hf/    a random Gemma 3 as `save_pretrained` writes it: config.json, model.safetensors
golden.npz  tokens, start, logits, loss, and the gradient by every weight's name ("grad.NAME")

tests/model/test_golden.py compares us with it and needs neither torch nor transformers. The files
in the repository are by torch 2.13.0 (CPU) and transformers 5.24.0; others change the last bits.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

HERE = Path(__file__).resolve().parent
# Every size differs, so that a transposed axis cannot pass; D = 24 is a multiple of N = 6 because
# transformers asks for it. Both kinds of layers, each after the other; global RoPE scaled.
CONFIG = dict(
    num_hidden_layers=4,
    hidden_size=24,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=28,
    vocab_size=50,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    query_pre_attn_scalar=9,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
    },
    rms_norm_eps=1e-6,
    max_position_embeddings=64,
)
START = np.array([0, 4, 9], np.int32)  # first real column of each row
NUM_COLUMNS = 16  # the first two rows are longer than the window


def make_model() -> Gemma3ForCausalLM:
    """Return the model: matrices with variance 1 / fan-in, norm weights (1 + w) with std 0.2."""
    config = Gemma3TextConfig(attn_implementation="eager", dtype="float32", **CONFIG)
    model = Gemma3ForCausalLM(config).to(torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.copy_(scale * torch.randn(weight.shape, generator=generator))
    return model


def main() -> None:
    """Write tiny_hf/ and golden.npz beside this file."""
    model = make_model()
    model.save_pretrained(HERE / "tiny_hf")
    (HERE / "tiny_hf" / "generation_config.json").unlink(missing_ok=True)

    column = np.arange(NUM_COLUMNS)[None, :]
    real = column >= START[:, None]
    drawn = np.random.default_rng(0).integers(1, CONFIG["vocab_size"], real.shape)
    tokens = np.where(real, drawn, 0).astype(np.int32)
    logits = model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.tensor(real).long(),
        position_ids=torch.tensor(np.maximum(column - START[:, None], 0)).long(),
        use_cache=False,
    ).logits
    # mean negative log-likelihood of every real token that has a real token before it
    logp = torch.log_softmax(logits[:, :-1], -1)
    target = torch.tensor(tokens[:, 1:], dtype=torch.long)
    chosen = logp.gather(-1, target[..., None])[..., 0]
    loss = -chosen[torch.tensor(real[:, :-1])].mean()
    loss.backward()
    np.savez_compressed(
        HERE / "golden.npz",
        tokens=tokens,
        start=START,
        logits=np.where(real[..., None], logits.detach().numpy(), 0),  # padding: 0
        loss=np.float32(loss.item()),
        **{f"grad.{name}": weight.grad.numpy() for name, weight in model.named_parameters()},
    )


if __name__ == "__main__":
    main()
