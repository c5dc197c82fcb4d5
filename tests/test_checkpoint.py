"""Checkpoints come back bit for bit, with their placement, whole or not at all."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
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
    checkpoint.prune(tmp_path / "absent", 0, keep=1)
    (tmp_path / "0700").mkdir()  # nobody's step, and later than all
    for step in (9, 100, 20):  # as numbers 100 is the latest, as words 9 would be
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)}, {"at": step})
    assert checkpoint.all_steps(tmp_path) == [9, 20, 100]
    assert checkpoint.latest_step(tmp_path) == 100
    tree, meta = checkpoint.restore(tmp_path, {"x": jnp.zeros(2, jnp.int32)}, step=20)
    assert tree["x"].tolist() == [20, 20] and meta == {"at": 20}
    with pytest.raises(ValueError, match="must be 0 or more and new, got 20"):
        checkpoint.save(tmp_path, 20, {"x": jnp.zeros(2)}, {})
    checkpoint.prune(tmp_path, 100, keep=2)
    assert checkpoint.all_steps(tmp_path) == [20, 100]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0700", "100", "20"]
    checkpoint.prune(tmp_path, 100, keep=5)
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
        checkpoint.prune(tmp_path, 4, keep=0)
    assert [path.name for path in tmp_path.iterdir()] == ["4"]  # refused before writing


def test_half_written_folders_are_never_listed(tmp_path):
    checkpoint.save(tmp_path, 5, {"x": jnp.ones(3)}, {})
    for name, lost in {"6": "index", "7": "tree"}.items():  # half copied, half deleted
        shutil.copytree(tmp_path / "5", tmp_path / name)
        shutil.rmtree(tmp_path / name / lost)
    shutil.copytree(tmp_path / "5", tmp_path / "8.orbax-checkpoint-tmp")  # killed save
    shutil.copytree(tmp_path / "5", tmp_path / "9.deleting")  # killed prune
    shutil.copytree(tmp_path / "5", tmp_path / "11")
    (tmp_path / "11" / checkpoint.MANIFEST).unlink()
    (tmp_path / "10").mkdir()
    assert checkpoint.all_steps(tmp_path) == [5]
    checkpoint.prune(tmp_path, 11, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10", "11", "5", "6", "7"]
    with pytest.warns(UserWarning) as warned:
        assert checkpoint.latest_step(tmp_path) == 5
    assert [str(w.message).removeprefix(f"checkpoint {tmp_path}/") for w in warned] == [
        "11 is broken and passed over: manifest.json is missing",
        "10 is broken and passed over: index/metadata is missing",
        "7 is broken and passed over: tree/_METADATA is missing",
        "6 is broken and passed over: index/metadata is missing",
    ]


def damage(path: Path, how: str) -> None:
    """Flip one bit in the middle of a file, cut it in half, or delete it."""
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    path.write_bytes(content[: len(content) // 2] if how == "cut" else content)
    if how == "gone":
        path.unlink()


@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_whichever_file_is_damaged_it_is_named_and_the_step_before_taken(tmp_path, how):
    for step in (1, 2):
        checkpoint.save(tmp_path / "ck", step, {"x": jnp.full(1000, step)}, {"at": step})
    files = [p.relative_to(tmp_path / "ck" / "2") for p in (tmp_path / "ck" / "2").rglob("*")]
    files = [name for name in files if (tmp_path / "ck" / "2" / name).is_file()]
    assert {Path("manifest.json"), Path("index/metadata"), Path("tree/_METADATA")} < set(files)
    for name in files:
        if how != "gone" and not (tmp_path / "ck" / "2" / name).stat().st_size:
            continue  # nothing in it to damage
        folder = Path(shutil.copytree(tmp_path / "ck", tmp_path / "copy"))
        damage(folder / "2" / name, how)
        with pytest.warns(UserWarning, match=f"copy/2 is broken and passed over: {name}"):
            tree, meta = checkpoint.restore(folder, {"x": jnp.zeros(1000, jnp.int32)})
        assert meta == {"at": 1} and tree["x"].tolist() == [1] * 1000
        with pytest.raises(ValueError, match=f"copy/2: files must be as .* got {name}"):
            checkpoint.read_meta(folder, 2)
        shutil.rmtree(folder)


def test_damage_is_told_with_what_was_expected(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)}, {})
    metadata = tmp_path / "1" / "tree" / "_METADATA"
    size, digest = json.loads((tmp_path / "1" / "manifest.json").read_text())["files"][
        "tree/_METADATA"
    ]
    damage(metadata, "flipped")
    assert checkpoint.fault(tmp_path / "1").startswith(
        f"tree/_METADATA: expected SHA-256 {digest[:12]}..., got "
    )
    damage(metadata, "cut")
    assert checkpoint.fault(tmp_path / "1") == (
        f"tree/_METADATA: expected {size} bytes, got {size // 2}"
    )
    with (
        pytest.warns(UserWarning, match="1 is broken"),
        pytest.raises(ValueError, match=r"must hold an intact step, got broken \[1\]; copy"),
    ):
        checkpoint.latest_step(tmp_path)
    checkpoint.save(tmp_path, 1, {"x": jnp.zeros(3)}, {})  # a broken one may be replaced
    assert checkpoint.restore(tmp_path, {"x": jnp.ones(3)})[0]["x"].tolist() == [0, 0, 0]


def test_checkpoints_from_before_manifests_are_read(tmp_path):
    checkpoint.save(tmp_path, 1, {"x": jnp.ones(3)}, {"at": 1})
    (tmp_path / "1" / "manifest.json").unlink()
    index = tmp_path / "1" / "index" / "metadata"
    content = json.loads(index.read_text())
    assert content.pop("format") == checkpoint.FORMAT
    index.write_text(json.dumps(content))
    tree, meta = checkpoint.restore(tmp_path, {"x": jnp.zeros(3)})
    assert meta == {"at": 1} and tree["x"].tolist() == [1, 1, 1]


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path):
    saver, done = checkpoint.Saver(), []
    step = jax.jit(lambda x: x + 1, donate_argnums=0)
    x = jnp.zeros((512, 512))
    for number in range(4):
        assert saver.wait() == ""
        saver.start(tmp_path, number, {"x": x}, {"at": number}, lambda n=number: done.append(n))
        saved, x = x, step(x)  # reuses the very memory that is being saved
        assert saved.is_deleted()  # a view held by the save would have kept it
    assert saver.wait() == "" and done == [0, 1, 2, 3]
    for number in range(4):
        tree, meta = checkpoint.restore(tmp_path, {"x": np.zeros((512, 512), np.float32)}, number)
        assert meta == {"at": number}
        assert tree["x"].min() == tree["x"].max() == number


def test_a_save_that_cannot_be_is_told_in_one_line_and_the_next_may_succeed(tmp_path):
    saver, tree = checkpoint.Saver(), {"x": jnp.ones(3)}
    (tmp_path / "ck").write_text("in the way")
    saver.start(tmp_path / "ck", 1, tree, {})
    problem = saver.wait()
    assert problem.startswith(f"checkpoint {tmp_path}/ck/1: could not be saved, got ")
    assert "\n" not in problem and saver.wait() == ""  # told once
    (tmp_path / "ck").unlink()
    saver.start(tmp_path / "ck", 1, tree, {})
    assert saver.wait() == "" and checkpoint.all_steps(tmp_path / "ck") == [1]
    saver.start(tmp_path / "ck", 2, tree, {}, lambda: 1 / 0)
    assert "ck/2: saved, but older ones stay, got ZeroDivisionError" in saver.wait()
    with pytest.raises(ValueError, match="must be 0 or more and new, got 2"):
        saver.start(tmp_path / "ck", 2, tree, {})


def test_the_best_by_a_metric_is_kept_beside_the_latest(tmp_path):
    rewards = {1: 0.5, 2: 2.5, 3: 1.0, 4: 2.5, 5: None, 6: 0.25}
    for step, reward in rewards.items():
        metrics = {} if reward is None else {"reward": reward}
        checkpoint.save(tmp_path, step, {"x": jnp.ones(1)}, {"metrics": metrics})
    assert checkpoint.best_step(tmp_path, "reward") == 4  # the later of two equals
    assert checkpoint.best_step(tmp_path, "-reward") == 6
    assert checkpoint.best_step(tmp_path, "loss") is None
    checkpoint.prune(tmp_path, 6, keep=2, best="reward")
    assert checkpoint.all_steps(tmp_path) == [4, 5, 6]
    checkpoint.prune(tmp_path, 6, keep=1)
    assert checkpoint.all_steps(tmp_path) == [6]


def test_broken_checkpoints_ahead_of_the_one_just_saved_are_not_what_is_kept(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"x": jnp.full(2, step)}, {})
    manifest = tmp_path / "3" / checkpoint.MANIFEST
    manifest.write_text(manifest.read_text().replace("index/metadata", "index/metadatum"))
    with pytest.warns(UserWarning, match="3 is broken and passed over"):
        assert checkpoint.latest_step(tmp_path) == 2
    shutil.rmtree(tmp_path / "1")
    checkpoint.prune(tmp_path, 2, keep=1)  # as after a resumed run saved its step 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]


def test_a_part_of_a_tree_is_restored_alone(tmp_path):
    checkpoint.save(tmp_path, 1, {"a": jnp.ones(3), "b": {"c": jnp.arange(4)}}, {})
    tree, _ = checkpoint.restore(tmp_path, {"a": None, "b": {"c": jnp.zeros(4, jnp.int32)}},
                                 partial=True)  # fmt: skip
    assert tree["a"] is None and tree["b"]["c"].tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"first \['d'\]: stored nothing"):
        checkpoint.restore(tmp_path, {"d": jnp.zeros(4)}, partial=True)


def test_a_state_saved_from_four_devices_lands_on_one_and_back(tmp_path):
    four = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    one = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])
    state = make_state()
    for step, (source, target) in enumerate([(four, one), (one, four)]):
        source, target = (NamedSharding(mesh, PartitionSpec()) for mesh in (source, target))
        checkpoint.save(tmp_path, step, jax.device_put(state, source), {})
        got, _ = checkpoint.restore(tmp_path, jax.device_put(state, target))
        assert_same(got, state)  # bit for bit
        assert all(leaf.sharding == target for leaf in jax.tree.leaves(got))


def test_a_folder_is_written_whole_in_the_place_of_an_older_one(tmp_path):
    def write(text: str, fail: bool = False):
        def fill(folder: Path):
            folder.mkdir()
            (folder / "a").write_text(text)
            if fail:
                raise OSError(28, "No space left on device")
            (folder / "b").write_text(text)

        return fill

    checkpoint.write_folder(tmp_path / "out", write("old"))
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_folder(tmp_path / "out", write("half", fail=True))
    assert [(tmp_path / "out" / name).read_text() for name in "ab"] == ["old", "old"]
    checkpoint.write_folder(tmp_path / "out", write("new"))
    assert [(tmp_path / "out" / name).read_text() for name in "ab"] == ["new", "new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


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
    checkpoint.prune(tmp_path, leftover, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [str(leftover)]


@pytest.mark.parametrize("made", [0, 1, 2])
def test_no_thread_waits_for_a_folder_that_the_disk_refused(tmp_path, monkeypatch, made):
    saver, real, folders = checkpoint.Saver(), os.mkdir, []
    saver.start(tmp_path, 1, {"a": np.ones(3)}, {})
    assert saver.wait() == ""
    before = set(threading.enumerate())

    def mkdir(path, *rest, **named):
        folders.append(path)
        if len(folders) > made:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "mkdir", mkdir)
    saver.start(tmp_path, 2, {"a": np.ones(3)}, {})
    assert saver.wait().endswith("2: could not be saved, got Read-only file system")
    fresh = {thread.name for thread in set(threading.enumerate()) - before}
    # orbax's own ones would wait, and keep the process from ending, for five minutes
    assert not [name for name in fresh if not name.startswith("asyncio_")]
    assert checkpoint.all_steps(tmp_path) == [1]
