"""The letter table: shapes, shardings that collide, and every way to write --mesh."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from gemma_cot.axes import (
    LETTERS,
    MESH_AXES,
    RULES,
    auto_mesh,
    check_mesh,
    make_mesh,
    parse_mesh,
    per_device,
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
    assert spec_of("VD") == PartitionSpec("model", None)
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


GIB = 2**30
SIXTEEN = dict(N=4, F=6912, V=262_144)  # letters on the model axis, as Gemma 3 1B has them


@pytest.mark.parametrize(
    ("sizes", "weights", "batches", "expected"),
    [
        (SIXTEEN, 1.9, (16, 32), "8x1"),  # weights fit eight times over
        (SIXTEEN, 5.0, (16, 32), "8x1"),  # up to a third of 15 GiB
        (SIXTEEN, 5.1, (16, 32), "4x2"),
        (SIXTEEN, 1.9, (16, 4), "4x2"),  # 4 rows cannot be shared by 8
        (SIXTEEN, 1.9, (16, 3), "8x1"),  # 3 rows neither by 8, 4 nor 2: refused later, not here
        (SIXTEEN, 99.0, (16,), "2x4"),  # 4 heads: never more than 4 on model
        (SIXTEEN | {"N": 16}, 99.0, (16,), "1x8"),
        (SIXTEEN | {"N": 5}, 99.0, (16,), "8x1"),
    ],
)
def test_auto_mesh_keeps_data_parallel_while_weights_and_batches_allow(
    sizes, weights, batches, expected
):
    assert auto_mesh(8, sizes, weights * GIB, 15 * GIB, batches) == expected


def test_a_model_that_the_mesh_cannot_cut_is_refused(cfg):
    check_mesh(make_mesh("2x2"), cfg.sizes)  # N 6, F 28, V 50
    with pytest.raises(ValueError, match="--mesh=1x4: the model axis must divide the 6 of axis N "
                       r"\(query heads\), got 4; set --mesh=4x1"):  # fmt: skip
        check_mesh(make_mesh("1x4"), cfg.sizes)


@pytest.mark.parametrize("mesh", ["4x1", "2x2"])
def test_per_device_runs_every_data_device_on_its_own_rows(mesh):
    mesh = make_mesh(mesh)
    data = mesh.shape["data"]

    def own(scale, rows_BT):
        return scale * rows_BT, jax.lax.psum(rows_BT.sum(), "data"), rows_BT.shape[0] + 0 * rows_BT

    run = jax.jit(per_device(own, ",BT->BT,,BT", mesh))
    rows_BT = jnp.arange(24.0).reshape(8, 3)
    scaled, total, seen = run(2.0, rows_BT)
    assert (scaled == 2 * rows_BT).all() and total == rows_BT.sum() and (seen == 8 // data).all()
    with jax.set_mesh(mesh):
        again = jax.jit(per_device(own, ",BT->BT,,BT"))(2.0, rows_BT)
    assert (again[0] == scaled).all()


def test_per_device_without_a_mesh_or_inside_itself_is_the_function_itself():
    def double(x):
        return 2 * x

    assert per_device(double, "B->B") is double
    inside = []

    def outer(x):
        inside.append(per_device(double, "B->B"))
        inside.append(per_device(double, "B->B", axes=MESH_AXES))
        return inside[1](inside[0](x))

    mesh = make_mesh("2x2")
    assert (jax.jit(per_device(outer, "B->B", mesh))(jnp.ones(4)) == 4).all()
    assert inside[0] is double and inside[1] is not double, "model is still to be cut for a kernel"


@pytest.mark.parametrize(("n", "multiple", "up"), [(0, 4, 0), (1, 4, 4), (4, 4, 4), (5, 4, 8)])
def test_round_up(n, multiple, up):
    assert round_up(n, multiple) == up
