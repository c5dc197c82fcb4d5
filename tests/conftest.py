"""CPU, four host devices, strict shapes and dtypes, highest precision; a small model.

The tiny test model has a different size on every axis, so that a transposed axis cannot pass.
"""

import dataclasses
import os
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("WANDB_MODE", "disabled")  # where it is installed, a run would open one
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

# Compiled programs are kept, for other tests, workers and subprocesses and for the next time.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
# Compilation is most of the suite's time: the same float32 mathematics without XLA's costly passes,
# in subprocesses too.
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

import jax
import pytest
import sentencepiece

from gemma_cot.config import ModelConfig
from gemma_cot.model.params import init_params

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_default_matmul_precision", "highest")

TEST_MODEL = ModelConfig(
    num_layers=3,
    embed_dim=20,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    mlp_dim=28,
    vocab_size=50,
    window=5,
    global_layers=(False, True, False),
    query_scalar=9.0,
    rope_scale_global=2.0,
)


def pytest_configure(config):
    """Let XLA's older emitters write the plain tests' loops, which compile faster. A release, or
    a libtpu, that does not know the flag would end the process."""
    if version("jaxlib").startswith("0.10.") and "not interop" in config.option.markexpr:
        os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"


@pytest.fixture(scope="session")
def cfg() -> ModelConfig:
    """The tiny test model: L 3, D 20, N 6, K 2, Q 3, H 8, F 28, V 50, window 5."""
    return TEST_MODEL


@pytest.fixture(scope="session")
def params(cfg):
    """Random float32 weights of the tiny test model; norm weights are not 0 either."""
    drawn = init_params(jax.random.key(0), cfg)
    leaves, structure = jax.tree.flatten(drawn)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [
        x + 0.1 * jax.random.normal(key, x.shape, x.dtype)
        for x, key in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, noisy)


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A folder with a SentencePiece tokenizer of 480 pieces to Gemma 3's conventions.

    The control tokens have Gemma 3's ids: <pad> 0, <eos> 1, <bos> 2, <unk> 3, <mask> 4,
    [multimodal] 5, 99 unused ones, <start_of_turn> 105, <end_of_turn> 106, newline 107, two 108.
    """
    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["apples", "pears", "coins", "hours", "boxes", "metres", "answer", "reasoning"]
    lines = [
        f"Tom has {7 * i % 100} {a} and gives {3 * i} {b} away. So {7 * i} - {3 * i} = {4 * i}\n"
        for i, (a, b) in enumerate(zip(words * 8, words[3:] * 12, strict=False))
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        eos_piece="<eos>",
        bos_piece="<bos>",
        unk_piece="<unk>",
        user_defined_symbols=["<mask>", "[multimodal]"]
        + [f"<unused{i}>" for i in range(99)]
        + ["<start_of_turn>", "<end_of_turn>", "\n", "\n\n"],
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
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture(scope="session")
def shallow(cfg):
    """The tiny test model with one layer: how a batch is cut is not a matter of depth."""
    return dataclasses.replace(cfg, num_layers=1, global_layers=(True,))


@pytest.fixture(scope="session")
def weights(params):
    """The weights of the tiny test model's first layer."""
    return params | {"layers": jax.tree.map(lambda w: w[:1], params["layers"])}
