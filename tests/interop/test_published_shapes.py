"""The published models' config.json and shapes: 270M and 1B whole, 4B at its real widths.

pytest -m interop tests/interop/test_published_shapes.py -s prints maxima. The 1B case needs 10 GiB
of memory and 4 GiB of temporary disk.
"""

import dataclasses
import json
import os
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
from test_model_config import NEW_1B, OLD_1B, OLD_4B

from gemma_cot.config import GEMMA3_1B, GEMMA3_4B, GEMMA3_270M, ModelConfig
from gemma_cot.model.gemma import logits
from gemma_cot.model.load import load_pretrained

from .conftest import randomise

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.interop

# google/gemma-3-270m: old keys, layer_types beside them, the pattern with an underscore.
OLD_270M = {k: v for k, v in OLD_1B.items() if k != "sliding_window_pattern"} | {
    "_sliding_window_pattern": 6,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "num_hidden_layers": 18,
}
# The 4B as later transformers rewrote it: rope_parameters without their bases, which stay flat.
MIXED_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "text_config": OLD_4B["text_config"]
    | {
        "_sliding_window_pattern": 6,
        "layer_types": [
            "sliding_attention" if (i + 1) % 6 else "full_attention" for i in range(34)
        ],
        "rope_local_base_freq": 10000,
        "rope_parameters": {
            "full_attention": {"factor": 8.0, "rope_type": "linear"},
            "sliding_attention": {"rope_type": "default"},
        },
        "rope_scaling": None,
        "rope_theta": 1000000,
    },
    "vision_config": OLD_4B["vision_config"],
}
OTHER_BASES = MIXED_4B | {
    "text_config": MIXED_4B["text_config"] | {"rope_theta": 500_000, "rope_local_base_freq": 2_000}
}
FILES = {
    "270m": (OLD_270M, GEMMA3_270M),
    "1b_old": (OLD_1B, GEMMA3_1B),
    "1b_new": (NEW_1B, GEMMA3_1B),
    "4b_old": (OLD_4B, GEMMA3_4B),
    "4b_mixed": (MIXED_4B, GEMMA3_4B),
    "4b_mixed_other_bases": (
        OTHER_BASES,
        dataclasses.replace(GEMMA3_4B, rope_base_global=500_000.0, rope_base_local=2_000.0),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_transformers_reads_the_same_config(name, tmp_path):
    config, expected = FILES[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    theirs = transformers.AutoConfig.from_pretrained(tmp_path).get_text_config()
    assert ModelConfig.from_hf(config) == expected
    assert ModelConfig.from_hf(theirs.to_dict()) == expected  # as transformers understood it


# The 4B's widths, heads, window and RoPE in two layers, one of each kind, 4096 tokens, and a tiny
# vision tower beside them, so that it fits.
SHALLOW_4B = OLD_4B | {
    "image_token_index": 4095,
    "mm_tokens_per_image": 1,
    "text_config": OLD_4B["text_config"]
    | {"num_hidden_layers": 2, "sliding_window_pattern": 2, "vocab_size": 4096},
    "vision_config": {
        "hidden_size": 8,
        "image_size": 8,
        "intermediate_size": 12,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": 4,
    },
}
# config.json, first real column of each row, columns: every row is longer than the window.
SHAPES = {
    "270m": (OLD_270M, (16,), 544),
    "1b": (OLD_1B, (0, 16), 544),
    "4b": (SHALLOW_4B, (16,), 1056),
}
# 1e-4 for logits of std 3 (the largest are 15 to 18), measured 6e-5 to 7e-5. Both sides round in
# float32, and their distance grows with the logits: at std 5 it was 1.3e-4 on the 1B shapes, where
# the same network in float64 was 0.99e-4 from transformers and 1.06e-4 from us (rms 1.4e-5 and
# 1.5e-5). The 4B's wider sums and longer rows round more: 1.1e-4 apart, float64 is 1.1e-4 from
# transformers and 0.9e-4 from us (rms 1.06e-5 and 1.01e-5). Neither side is the nearer one, so its
# bound is 2e-4. One position more or fewer in the window moves logits by more than 0.4.
LOGIT_ATOL = {"270m": 1e-4, "1b": 1e-4, "4b": 2e-4}
LOUDNESS = 3.0  # final norm 1 + w about +-this, embedding rows of length 1: the logits' std
# The rms difference by the rms logit: 24 bits through all layers, measured below 4e-6.
LOGIT_RMS = 1e-5


def write_random_model(folder: Path, config: dict):
    """Return a random model of `config`, after saving it beside that very config.json."""
    from transformers.initialization import no_init_weights  # they are all drawn below

    (folder / "config.json").write_text(json.dumps(config))
    read = transformers.AutoConfig.from_pretrained(folder)
    read._attn_implementation = "eager"
    with no_init_weights():
        model = getattr(transformers, config["architectures"][0])(read).float()
    model.tie_weights()
    randomise(model, seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("model.norm.weight"):
                # of either sign: else each token points at itself, the more the fewer the layers
                weight.add_(LOUDNESS - 1)
                weight[::2] -= 2 * LOUDNESS
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    return model


def distance(ours, theirs, start):
    """Return (max |difference|, its rms / rms logit, largest logit, std) over real columns."""
    largest, peak, squares, power, count = 0.0, 0.0, 0.0, 0.0, 0
    for row, first in enumerate(start):
        for t in range(first, ours.shape[1]):  # a column at a time: the logits are 1 GB a row
            off = ours[row, t] - theirs[row, t]
            largest, peak = max(largest, np.abs(off).max()), max(peak, np.abs(theirs[row, t]).max())
            squares += np.dot(off, off)
            power += np.dot(theirs[row, t], theirs[row, t])
            count += off.size
    return largest, (squares / power) ** 0.5, peak, (power / count) ** 0.5


@pytest.fixture
def two_threads():
    """Let torch use two threads: these matrices are large."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("size", SHAPES)
def test_logits_at_real_shapes(size, their_logits, padded_tokens, two_threads, record_property):
    """270M: all 18 layers and 262,144 tokens. 1B: all 26 layers and 262,144 tokens, a row without
    and one with padding. 4B: 2 of 34 layers and 4096 of 262,208 tokens, all else as published
    (K = 4, window 1024, RoPE scale 8), stored under the multimodal names."""
    if size == "1b" and os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") < 12 * 2**30:
        pytest.skip("needs a machine of 12 GiB")
    config, start, num_tokens = SHAPES[size]
    with tempfile.TemporaryDirectory() as folder:  # not tmp_path: pytest would keep 4 GiB a run
        model = write_random_model(Path(folder), config)
        vocab_size = model.config.get_text_config().vocab_size
        tokens, start, _ = padded_tokens(vocab_size - 1, start, num_tokens)
        with torch.no_grad():
            theirs = their_logits(model, tokens, start).numpy()
        del model  # before ours is there too
        cfg, params = load_pretrained(folder, "float32")
    ours = jax.jit(logits, static_argnames="cfg")(params, cfg, tokens, start)
    del params
    largest, relative, peak, std = distance(np.asarray(ours), theirs, start)
    record_property("max_abs_error", float(largest))
    print(f"\n{size}: logits {largest:.1e} of {peak:.0f} (std {std:.1f}), rms {relative:.1e} of it")
    assert num_tokens - start.max() > cfg.window
    assert largest < LOGIT_ATOL[size]
    assert relative < LOGIT_RMS
