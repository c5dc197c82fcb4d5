"""Random weights and adapters of any shape, drawn by NumPy: no compilation, so tests stay fast."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gemma_cot.axes import shape_of
from gemma_cot.lora.lora import TARGETS, Lora
from gemma_cot.model.params import LAYER_TABLE, build


@pytest.fixture(scope="session")
def draw_params():
    """Return f(cfg, seed) -> float32 parameters: matmuls near unit scale, norm weights near 0."""

    def make(cfg, seed: int):
        rng = np.random.default_rng(seed)

        def leaf_of(leaf):
            fan_in = np.prod(shape_of(leaf.fan_in, cfg.sizes)) if leaf.fan_in else 25.0
            drawn = rng.normal(size=shape_of(leaf.letters, cfg.sizes)) / np.sqrt(fan_in)
            return jnp.asarray(drawn, jnp.float32)

        return build(leaf_of)

    return make


@pytest.fixture(scope="session")
def lora(cfg) -> Lora:
    """An adapter of rank 3 on every target, scale 1.5, its b not zero."""
    rng = np.random.default_rng(3)
    sizes = cfg.sizes | {"R": 3}
    layers = {}
    for target in TARGETS:
        shapes = [shape_of(letters, sizes) for letters in LAYER_TABLE[target].adapter_letters]
        a, b = (jnp.asarray(rng.normal(0.0, 0.2, shape), jnp.float32) for shape in shapes)
        layers[target] = {"a": a, "b": b}
    return Lora(layers, 1.5)


@pytest.fixture(scope="session")
def fresh_lora(lora) -> Lora:
    """The same adapter as a fresh one: b is zero."""
    zeros = {name: {"a": ab["a"], "b": jnp.zeros_like(ab["b"])} for name, ab in lora.layers.items()}
    return lora.replace(layers=zeros)


@pytest.fixture(scope="session")
def in_bf16():
    """Return f(tree) -> the tree in bfloat16."""
    return lambda tree: jax.tree.map(lambda w: jnp.asarray(np.asarray(w), jnp.bfloat16), tree)
