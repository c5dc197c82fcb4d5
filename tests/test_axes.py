"""The letter table: shapes, shardings that collide, and every way to write --mesh."""

import jax
import pytest
from jax.sharding import AxisType, PartitionSpec

from gemma_cot.axes import (
    LETTERS,
    MESH_AXES,
    RULES,
    make_mesh,
    parse_mesh,
    replicated,
    round_up,
    shape_of,
    sharding_of,
    spec_of,
)


def test_shape_is_spelled_letter_by_letter(cfg):
    # conftest's model: L 3, D 20, N 6, H 8, K 2, Q = 6 / 2 = 3
    assert shape_of("LDNH", cfg.sizes) == (3, 20, 6, 8)
    assert shape_of("KQ", cfg.sizes) == (2, 3)
    assert shape_of("", cfg.sizes) == ()


def test_sizes_of_the_test_model_are_distinct(cfg):
    """Only L = 3 = Q coincide; no array has both, so a transposed axis cannot pass."""
    sizes = {letter: n for letter, n in cfg.sizes.items() if letter != "Q"}
    assert len(set(sizes.values())) == len(sizes)


def test_every_rule_and_size_is_of_a_known_letter(cfg):
    assert set(RULES) <= set(LETTERS)
    assert set(RULES.values()) <= set(MESH_AXES)
    assert set(cfg.sizes) <= set(LETTERS)


def test_spec_looks_up_each_letter():
    assert spec_of("BT") == PartitionSpec("data", None)
    assert spec_of("LDNH") == PartitionSpec(None, None, "model", None)
    assert spec_of("LFD") == PartitionSpec(None, "model", None)
    assert spec_of("VD") == PartitionSpec(None, None)
    assert spec_of("") == PartitionSpec()


def test_two_axes_on_one_mesh_axis_are_refused_by_name():
    with pytest.raises(ValueError, match="'odd' with axes NF: a mesh axis may be used once"):
        spec_of("NF", "odd")
    with pytest.raises(ValueError, match="RULES in gemma_cot/axes.py"):
        sharding_of("BP", make_mesh(), "rows")


def test_sharding_splits_rows_over_data_and_heads_over_model():
    mesh = make_mesh("2x2")
    assert sharding_of("BT", mesh).shard_shape((8, 5)) == (4, 5)
    assert sharding_of("LDNH", mesh).shard_shape((3, 20, 6, 8)) == (3, 20, 3, 8)
    assert replicated(mesh).shard_shape((8, 5)) == (8, 5)


@pytest.mark.parametrize(
    ("text", "devices", "expected"),
    [("auto", 4, (4, 1)), ("auto", 1, (1, 1)), ("4x2", 8, (4, 2)), ("1x8", 8, (1, 8))],
)
def test_parse_mesh(text, devices, expected):
    assert parse_mesh(text, devices) == expected


@pytest.mark.parametrize("text", ["", "4", "4x", "x4", "0x4", "-2x-2", "2x2x1", "2X2", "axb"])
def test_malformed_mesh_is_refused(text):
    with pytest.raises(ValueError, match="must be 'auto' or DATAxMODEL.*--mesh=4x1"):
        parse_mesh(text, 4)


def test_mesh_that_misses_the_device_count_is_refused():
    with pytest.raises(ValueError, match="--mesh=4x2: must multiply to the 4 devices.*got 8"):
        parse_mesh("4x2", 4)


def test_make_mesh_takes_all_devices_with_auto_axis_types():
    mesh = make_mesh()
    assert dict(mesh.shape) == {"data": 4, "model": 1}  # conftest asks for four host devices
    assert mesh.axis_types == (AxisType.Auto, AxisType.Auto)
    assert list(mesh.devices.flat) == jax.devices()


def test_make_mesh_over_given_devices():
    assert dict(make_mesh("1x2", jax.devices()[:2]).shape) == {"data": 1, "model": 2}
    with pytest.raises(ValueError, match="2 devices present"):
        make_mesh("4x1", jax.devices()[:2])


@pytest.mark.parametrize(("n", "multiple", "up"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8)])
def test_round_up(n, multiple, up):
    assert round_up(n, multiple) == up
