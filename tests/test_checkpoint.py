"""Checkpoints come back bit for bit, with their placement, whole or not at all."""

import shutil
import subprocess
import sys
import time
from pathlib import Path

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gemma_cot import checkpoint


@flax.struct.dataclass
class State:
    step: jax.Array
    lora: dict
    opt_state: optax.OptState
    nothing: None = None


def make_state() -> State:
    """Return a state after two Adam updates, so that both moments and the counter are not zero."""
    lora = {"layers": {"q": {"a": jnp.linspace(-1, 1, 24).reshape(4, 6), "b": jnp.ones((6, 8))}}}
    optimizer = optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-3))
    opt_state = optimizer.init(lora)
    for scale in (0.3, -0.7):
        grads = jax.tree.map(lambda x, s=scale: jnp.sin(x) * s, lora)
        with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 counter
            updates, opt_state = optimizer.update(grads, opt_state, lora)
        lora = optax.apply_updates(lora, updates)
    return State(jnp.asarray(2, jnp.int32), lora, opt_state)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()  # bit for bit


def test_dataclass_with_adam_state_round_trips(tmp_path):
    state = make_state()
    checkpoint.save(tmp_path / "ck", 2, state, {"stage": "sft", "seed": 7})
    got, meta = checkpoint.restore(tmp_path / "ck", jax.tree.map(jnp.zeros_like, state))
    assert isinstance(got, State) and got.nothing is None
    assert_same(got, state)
    assert meta == {"stage": "sft", "seed": 7} == checkpoint.read_meta(tmp_path / "ck")


def test_odd_dtypes_values_and_names_round_trip(tmp_path):
    tree = {
        "bf16": jnp.arange(7, dtype=jnp.bfloat16) / 3,
        "a.b": {"c/d": jnp.asarray([np.nan, np.inf, -0.0], jnp.float32)},
        "a": {"b.c": jnp.asarray([True, False])},
        "host": np.arange(3, dtype=np.int64) + 2**40,
        "number": 5,
        "scalar": np.float32(1.5),
        "list": [jnp.ones(2), (jnp.zeros(1), {})],
    }
    checkpoint.save(tmp_path, 0, tree, {})
    got, _ = checkpoint.restore(tmp_path, tree)
    assert_same(got, jax.tree.map(lambda x: x if hasattr(x, "dtype") else np.asarray(x), tree))
    assert isinstance(got["host"], np.ndarray) and got["host"][0] == 2**40


def test_arrays_land_with_the_sharding_asked_for(tmp_path):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    split = NamedSharding(mesh, PartitionSpec("data", "model"))
    turned = NamedSharding(mesh, PartitionSpec("model", None))
    state = make_state()
    placed = state.replace(lora=jax.device_put(state.lora, split))
    checkpoint.save(tmp_path, 1, placed, {})

    got, _ = checkpoint.restore(tmp_path, placed)
    assert_same(got, state)
    assert all(leaf.sharding == split for leaf in jax.tree.leaves(got.lora))
    assert {shard.data.shape for shard in got.lora["layers"]["q"]["a"].addressable_shards} == {
        (2, 3)  # 4 x 6 cut in two both ways
    }

    # Abstract leaves with another layout than at saving.
    like_lora = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=turned), state.lora
    )
    like = state.replace(step=jax.ShapeDtypeStruct((), jnp.int32), lora=like_lora)
    got, _ = checkpoint.restore(tmp_path, like)
    assert_same(got, state)
    assert all(leaf.sharding == turned for leaf in jax.tree.leaves(got.lora))


def test_restored_state_goes_on_under_a_mesh(tmp_path):
    # optax's counter is bound to no device; bound to device 0 it could not meet a sharded array.
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put(jnp.arange(8.0), NamedSharding(mesh, PartitionSpec("data")))
    tree = {"count": jnp.asarray(3.0), "x": sharded}
    checkpoint.save(tmp_path, 1, tree, {})
    got, _ = checkpoint.restore(tmp_path, tree)
    assert not got["count"].committed and got["x"].committed
    total = jax.jit(lambda t: t["count"] * t["x"].sum())(got)
    assert total == 3 * 28  # 0 + 1 + ... + 7 = 28


def test_mismatches_are_named_in_one_line(tmp_path):
    checkpoint.save(tmp_path, 3, {"a": jnp.ones((2, 3)), "b": jnp.ones(4)}, {})
    wrong = {
        r"\['a'\]: stored \[\[2, 3\], 'float32'\], wanted \[\[3, 2\]": jnp.ones((3, 2)),
        r"\['a'\]: stored .*'float32'\], wanted .*'bfloat16'": jnp.ones((2, 3), jnp.bfloat16),
    }
    for message, leaf in wrong.items():
        with pytest.raises(ValueError, match=message) as error:
            checkpoint.restore(tmp_path, {"a": leaf, "b": jnp.ones(4)})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"\['b'\]: stored .*, wanted nothing"):
        checkpoint.restore(tmp_path, {"a": jnp.ones((2, 3))})
    with pytest.raises(ValueError, match=r"2 that differ, first \['c'\]: stored nothing"):
        checkpoint.restore(tmp_path, {"a": jnp.ones((2, 3)), "c": jnp.ones(4)})


def test_steps_are_listed_pruned_and_never_overwritten(tmp_path):
    assert checkpoint.latest_step(tmp_path / "absent") is None
    assert checkpoint.latest_step(tmp_path) is None
    checkpoint.prune(tmp_path / "absent", keep=1)
    for step in (9, 100, 20):  # as numbers 100 is the latest, as words 9 would be
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)}, {"at": step})
    assert checkpoint.all_steps(tmp_path) == [9, 20, 100]
    assert checkpoint.latest_step(tmp_path) == 100
    tree, meta = checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.int32)}, step=20)
    assert tree["x"].tolist() == [20, 20] and meta == {"at": 20}
    with pytest.raises(ValueError, match="must be 0 or more and new, got 20"):
        checkpoint.save(tmp_path, 20, {"x": jnp.zeros(2)}, {})
    checkpoint.prune(tmp_path, keep=2)
    assert checkpoint.all_steps(tmp_path) == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["100", "20"]
    checkpoint.prune(tmp_path, keep=5)
    assert checkpoint.all_steps(tmp_path) == [20, 100]


def test_refusals(tmp_path):
    with pytest.raises(ValueError, match=r"must hold step \(any\), got steps \[\]"):
        checkpoint.restore(tmp_path, {})
    checkpoint.save(tmp_path, 4, {"x": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match=r"must hold step 5, got steps \[4\]"):
        checkpoint.read_meta(tmp_path, step=5)
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(tmp_path, 6, {"x": jnp.ones(1)}, {"x": jnp.ones(1)})
    with pytest.raises(ValueError, match="must be 0 or more and new, got -1"):
        checkpoint.save(tmp_path, -1, {"x": jnp.ones(1)}, {})
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path, 6, {"x": jnp.ones(1)}, {"x": float("nan")})
    for leaf in (jax.random.key(0), "word", jnp.zeros((0, 3))):
        with pytest.raises(ValueError, match=r"arrays of numbers, got \[\"\['x'\]\"\]"):
            checkpoint.save(tmp_path, 6, {"x": leaf}, {})
    with pytest.raises(ValueError, match="got no leaf"):
        checkpoint.save(tmp_path, 6, {}, {})
    with pytest.raises(ValueError, match="keep must be at least 1"):
        checkpoint.prune(tmp_path, keep=0)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]  # refused before writing


def test_half_written_folders_are_never_listed(tmp_path):
    checkpoint.save(tmp_path, 5, {"x": jnp.ones(3)}, {})
    for name, lost in {"6": "index", "7": "tree"}.items():  # half copied, half deleted
        shutil.copytree(tmp_path / "5", tmp_path / name)
        shutil.rmtree(tmp_path / name / lost)
    shutil.copytree(tmp_path / "5", tmp_path / "8.orbax-checkpoint-tmp")  # killed save
    shutil.copytree(tmp_path / "5", tmp_path / "9.deleting")  # killed prune
    (tmp_path / "10").mkdir()
    assert checkpoint.all_steps(tmp_path) == [5]
    checkpoint.prune(tmp_path, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "5", "6", "7"]


KILLED = """
import sys, jax.numpy as jnp
from gemma_cot import checkpoint
tree = {str(i): jnp.ones((256, 1024)) for i in range(64)}  # 64 MiB: long enough to be caught
for step in range(20):
    checkpoint.save(sys.argv[1], step, tree, {})
    print(step, flush=True)
"""


def test_a_killed_save_leaves_only_whole_checkpoints(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(checkpoint.__file__).parents[1],
    )
    try:
        assert process.stdout.readline().strip() == "0"
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"*{checkpoint.TMP_MARK}*")):
            assert process.poll() is None and time.monotonic() < deadline
    finally:
        process.kill()
        process.communicate()
    like = {str(i): np.zeros((256, 1024), np.float32) for i in range(64)}
    steps = checkpoint.all_steps(tmp_path)
    assert steps == list(range(len(steps))) and steps
    for step in steps[-2:]:
        tree, _ = checkpoint.restore(tmp_path, like, step)
        assert all(leaf.min() == leaf.max() == 1 for leaf in tree.values())
    leftover = steps[-1] + 1
    checkpoint.save(tmp_path, leftover, {"x": jnp.ones(1)}, {})  # the resumed run saves it again
    checkpoint.prune(tmp_path, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [str(leftover)]
