"""Random small Gemma 3 models made by transformers, and its logits for left-padded rows."""

import os

import numpy as np
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up or downloaded

# Every size differs; transformers wants hidden_size to be a multiple of num_attention_heads.
SMALL = dict(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=28,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=5,
    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    query_pre_attn_scalar=9,
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1_000_000.0},
    },
    max_position_embeddings=512,
)


def randomise(model, seed: int):
    """Fill every weight: matrices with variance 1 / fan-in, norm weights (1 + w) with std 0.2."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            scale = 0.2 if weight.ndim == 1 else weight.shape[-1] ** -0.5
            weight.normal_(0, scale, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make_gemma():
    """Return make(seed=0, **changes of SMALL; None leaves a key out) -> Gemma3ForCausalLM, fp32."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.set_num_threads(1)  # the matrices are small: more threads only wait for each other

    def make(seed=0, **changes):
        keys = {key: value for key, value in (SMALL | changes).items() if value is not None}
        config = Gemma3TextConfig(attn_implementation="eager", dtype="float32", **keys)
        return randomise(Gemma3ForCausalLM(config).to(torch.float32), seed)

    return make


@pytest.fixture(scope="session")
def make_multimodal_gemma():
    """Return make(seed) -> Gemma3ForConditionalGeneration: SMALL beside a tiny vision tower.

    Token 49 stands for an image.
    """
    import transformers

    def make(seed):
        vision = transformers.SiglipVisionConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
        )
        config = transformers.Gemma3Config(
            text_config=transformers.Gemma3TextConfig(**SMALL),
            vision_config=vision,
            mm_tokens_per_image=1,
            image_token_index=49,
        )
        config._attn_implementation = "eager"
        return randomise(transformers.Gemma3ForConditionalGeneration(config).float(), seed)

    return make


@pytest.fixture(scope="session")
def reload_gemma():
    """Return reload(folder) -> Gemma3ForCausalLM in float32 with eager attention."""
    import torch
    from transformers import Gemma3ForCausalLM

    def reload(folder):
        return Gemma3ForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()

    return reload


@pytest.fixture(scope="session")
def their_logits():
    """Return f(model, tokens [B, T], start [B]) -> torch logits [B, T, V] (junk before start)."""
    import torch

    def run(model, tokens, start):
        column = np.arange(tokens.shape[1])[None, :]
        return model(
            input_ids=torch.tensor(tokens, dtype=torch.long),
            attention_mask=torch.tensor(column >= start[:, None]).long(),
            position_ids=torch.tensor(np.maximum(column - start[:, None], 0)).long(),
            use_cache=False,
        ).logits

    return run


@pytest.fixture(scope="session")
def padded_tokens():
    """Return f(vocab size, start, T) -> (tokens [B, T], start [B] int32, real [B, T] bool)."""

    def make(vocab_size, start=(0, 5, 17), num_tokens=24):
        start = np.array(start, np.int32)
        real = np.arange(num_tokens)[None, :] >= start[:, None]
        tokens = np.random.default_rng(0).integers(1, vocab_size, real.shape).astype(np.int32)
        return np.where(real, tokens, 0).astype(np.int32), start, real

    return make
