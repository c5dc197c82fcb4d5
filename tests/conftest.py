"""CPU, four host devices, strict shapes and dtypes, highest precision; a small model.

The tiny test model has a different size on every axis, so that a transposed axis cannot pass.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
)

import jax
import pytest

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
