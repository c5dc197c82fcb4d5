"""The parameter table: fifteen leaves whose shapes, init, names and shardings all agree."""

import jax
import numpy as np
import pytest

from gemma_cot.axes import LETTERS, make_mesh
from gemma_cot.config import GEMMA3_1B, TINY
from gemma_cot.model.params import (
    PARAM_TABLE,
    build,
    init_params,
    num_params,
    param_shapes,
    param_shardings,
    put,
)

# conftest's model: L 3, D 20, N 6, K 2, H 8, F 28, V 50
SHAPES = {
    "embed": (50, 20),
    "final_norm": (20,),
    "layers": {
        "pre_attn_norm": (3, 20),
        "q": (3, 20, 6, 8),
        "k": (3, 20, 2, 8),
        "v": (3, 20, 2, 8),
        "q_norm": (3, 8),
        "k_norm": (3, 8),
        "o": (3, 6, 8, 20),
        "post_attn_norm": (3, 20),
        "pre_mlp_norm": (3, 20),
        "gate": (3, 20, 28),
        "up": (3, 20, 28),
        "down": (3, 28, 20),
        "post_mlp_norm": (3, 20),
    },
}


def test_shapes_are_golden(cfg, params):
    assert jax.tree.map(lambda leaf: leaf.shape, param_shapes(cfg)) == SHAPES
    assert jax.tree.map(lambda leaf: leaf.shape, params) == SHAPES


def test_num_params_is_the_sum_of_the_leaves(cfg, params):
    assert num_params(cfg) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_rows_are_consistent():
    assert len(PARAM_TABLE) == 15
    for field in ("path", "hf_name"):
        assert len({getattr(leaf, field) for leaf in PARAM_TABLE}) == 15
    for leaf in PARAM_TABLE:
        own = leaf.letters.removeprefix("L")
        assert set(leaf.letters) <= set(LETTERS)
        assert sorted(leaf.hf_layout.replace(",", "")) == sorted(own)  # the same axes, moved
        assert leaf.stacked == leaf.path.startswith("layers/") == ("{i}" in leaf.hf_name)
        assert set(leaf.fan_in) <= set(own)


def test_put_nests_by_path():
    tree: dict = {}
    put(tree, "a/b/c", 1)
    put(tree, "a/d", 2)
    put(tree, "e", 3)
    assert tree == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}


def test_build_visits_every_row_once():
    assert sorted(jax.tree.leaves(build(lambda leaf: leaf.path))) == sorted(
        leaf.path for leaf in PARAM_TABLE
    )


@pytest.fixture(scope="module")
def drawn():
    """The embedded model's shape in bfloat16, large enough for statistics, compiled once."""
    return jax.jit(lambda key: init_params(key, TINY, "bfloat16"))(jax.random.key(7))


@pytest.mark.parametrize("leaf", PARAM_TABLE, ids=lambda leaf: leaf.path)
def test_init_has_variance_one_over_fan_in(drawn, leaf):
    """TINY: D 128, N·H = 4·32 = 128, F 256. Norm weights act as 1 + w and start at 0."""
    array = drawn
    for part in leaf.path.split("/"):
        array = array[part]
    assert array.dtype == "bfloat16"
    values = np.asarray(array, np.float64)
    expected = {"": 0.0, "D": 128**-0.5, "NH": 128**-0.5, "F": 256**-0.5}[leaf.fan_in]
    # n >= 24,576 normals: the standard error of the deviation is 1/sqrt(2n) = 0.45 %; 5 of those.
    assert values.std() == pytest.approx(expected, rel=0.023)
    assert abs(values.mean()) <= 5 * expected / np.sqrt(values.size)


def test_leaves_of_one_shape_get_different_draws(drawn):
    layers = drawn["layers"]
    assert not np.array_equal(layers["k"], layers["v"])
    assert not np.array_equal(layers["gate"], layers["up"])
    assert not np.array_equal(layers["q"][0], layers["q"][1])


def test_shapes_carry_dtype_and_shardings_of_the_mesh(cfg):
    mesh = make_mesh("2x2")
    shapes = param_shapes(cfg, "bfloat16", mesh)
    shardings = param_shardings(mesh)
    assert jax.tree.map(lambda leaf: leaf.sharding, shapes) == shardings
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {np.dtype("bfloat16")}
    # query heads, MLP width and vocabulary are split over `model`, the rest is replicated
    split = jax.tree.map(lambda leaf: leaf.sharding.shard_shape(leaf.shape), shapes)
    layers = SHAPES["layers"] | {
        "q": (3, 20, 3, 8),
        "o": (3, 3, 8, 20),
        "gate": (3, 20, 14),
        "up": (3, 20, 14),
        "down": (3, 14, 20),
    }
    assert split == SHAPES | {"embed": (25, 20), "layers": layers}


def test_shapes_of_the_1b_model_need_no_memory():
    shapes = param_shapes(GEMMA3_1B, "bfloat16")
    assert shapes["layers"]["gate"].shape == (26, 1152, 6912)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 999_885_952
