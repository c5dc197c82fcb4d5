"""Save and restore any pytree with orbax, one folder a step: `directory/STEP/{tree,index}`.

The tree is stored flat, path string -> array, so optax NamedTuples, flax dataclasses and None need
no special case: `like_tree` gives the structure. `index` is one JSON object: the caller's `meta`
and every leaf's shape and dtype, so that a mismatch is named before the tree is read.
`manifest.json` holds size and SHA-256 of every file and is written last: a folder whose files are
not those of its manifest is no checkpoint. One writer at a time. Knows no model, no stage, no flag.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

TMP_MARK = ".orbax-checkpoint-tmp"  # orbax writes into its folder + this, then renames it
SAVING = ".saving"  # a save writes into STEP + this, then renames to STEP
DELETING = ".deleting"  # what is to go is renamed to its name + this, then deleted
MANIFEST = "manifest.json"
FORMAT = 2  # in the index: from 2 on a checkpoint has a manifest


def save(directory: str | Path, step: int, tree, meta: dict) -> None:
    """Write `tree` and the small JSON dict `meta` as checkpoint `step`; return when on disk.

    The folder appears under its final name by one rename, complete or not at all; a broken one of
    that name is replaced. Raises ValueError when the step exists already or is negative, or when a
    leaf is not a number or a non-empty array of numbers (orbax has no place for others); TypeError
    when meta is not JSON.
    """
    _write(*_snapshot(directory, step, tree, meta))


class Saver:
    """Saves checkpoints in the background, one at a time.

    The arrays are copied to the host before `start` returns, so the caller may donate them. What
    goes wrong later (no space, no permission) raises nothing: `wait` says it in one line.
    """

    def __init__(self):
        self._thread, self._problem = None, ""

    def start(
        self, directory: str | Path, step: int, tree, meta: dict, then: Callable = lambda: None
    ) -> None:
        """Begin to save what `save` would, then call `then()`; raises like `save`.

        Call `wait` first: there is one save at a time, and its problem is told once.
        """
        snapshot = _snapshot(directory, step, tree, meta)
        arguments = (Path(directory) / str(step), snapshot, then)
        self._thread = threading.Thread(target=self._work, args=arguments, name="checkpoint")
        self._thread.start()

    def wait(self) -> str:
        """Wait until nothing is being saved; return what went wrong, "" when nothing did."""
        if self._thread:
            self._thread.join()
        problem, self._thread, self._problem = self._problem, None, ""
        return problem

    def _work(self, folder: Path, snapshot: tuple, then: Callable) -> None:
        try:
            _write(*snapshot)
            then()
        except Exception as error:  # orbax and tensorstore have many; none may end the run
            what = "saved, but older ones stay" if folder.is_dir() else "could not be saved"
            self._problem = f"checkpoint {folder}: {what}, got {_reason(error)}"


def restore(
    directory: str | Path, like_tree, step: int | None = None, partial: bool = False
) -> tuple:
    """Return (tree, meta) of checkpoint `step`, the latest intact one when None.

    `like_tree` gives structure, shapes, dtypes and placement: a ShapeDtypeStruct or committed
    array with a sharding gets that sharding, whatever the devices it was saved from; an uncommitted
    JAX array (as optax's counters are) stays uncommitted, a NumPy leaf comes back as NumPy. Raises
    ValueError when there is no such checkpoint, when a file of it is not as it was written, or when
    it does not match `like_tree`, which with `partial` may lack some of its leaves.
    """
    folder, index = _find(directory, step)
    stored, flat_like = index["leaves"], _flatten(like_tree)
    _check(folder, {n: v for n, v in stored.items() if n in flat_like or not partial}, flat_like)
    target = {name: np.empty(shape, jnp.dtype(dtype)) for name, (shape, dtype) in stored.items()}
    with _checkpointer() as checkpointer:
        items = ocp.args.Composite(tree=ocp.args.StandardRestore(target))
        flat = checkpointer.restore(folder, items)["tree"]
    leaves = [_place(flat[name], leaf) for name, leaf in flat_like.items()]
    return jax.tree.unflatten(jax.tree.structure(like_tree), leaves), index["meta"]


def read_meta(directory: str | Path, step: int | None = None) -> dict:
    """Return the `meta` of checkpoint `step` (the latest intact when None), its tree unread.

    Raises ValueError when there is no such checkpoint or when a file of it is not as written.
    """
    return _find(directory, step)[1]["meta"]


def latest_step(directory: str | Path) -> int | None:
    """Return the latest step that is intact, None when there is no checkpoint (or directory).

    Warns of every broken one that it passes over. Raises ValueError when all are broken.
    """
    steps = sorted((int(f.name) for f in _folders(directory)), reverse=True)
    for step in steps:
        problem = fault(Path(directory) / str(step))
        if not problem:
            return step
        line = f"checkpoint {directory}/{step} is broken and passed over: {problem}"
        warnings.warn(line, stacklevel=2)
    if steps:
        raise ValueError(
            f"checkpoint {directory}: must hold an intact step, got broken {sorted(steps)}; copy "
            "one back, or start anew with --overwrite"
        )
    return None


def all_steps(directory: str | Path) -> list[int]:
    """Return the complete steps in ascending order; half-written or half-copied ones are not.

    A quick look at the names of files: `fault` reads them.
    """
    return sorted(int(folder.name) for folder in _folders(directory) if _is_complete(folder))


def fault(folder: str | Path) -> str:
    """Return which file of a checkpoint is not as it was written, "" when all are.

    Checkpoints from before manifests are only looked at for completeness.
    """
    folder = Path(folder)
    if not _is_complete(folder):
        needed = ("index/metadata", "tree/_METADATA", MANIFEST)
        return f"{next((n for n in needed if not (folder / n).is_file()), needed[0])} is missing"
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())["files"].items()
        for name, (size, digest) in manifest:
            got = _measure(folder / name) if (folder / name).is_file() else None
            if got is None:
                return f"{name} is missing"
            if got[0] != size:
                return f"{name}: expected {size} bytes, got {got[0]}"
            if got[1] != digest:
                return f"{name}: expected SHA-256 {digest[:12]}..., got {got[1][:12]}..."
    except FileNotFoundError:
        return ""  # complete without a manifest: an old one
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} is damaged ({error})"
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return ""


def best_step(directory: str | Path, metric: str) -> int | None:
    """Return the step whose meta["metrics"] has the highest `metric`, the latest of equals.

    "-NAME" looks for the lowest. None when no checkpoint has it.
    """
    name, sign = metric.removeprefix("-"), -1 if metric.startswith("-") else 1
    values = {}
    for step in all_steps(directory):
        value = _index(Path(directory) / str(step))["meta"].get("metrics", {}).get(name)
        if value is not None:
            values[step] = sign * value
    return max(values, key=lambda step: (values[step], step), default=None)


def prune(directory: str | Path, newest: int, keep: int, best: str = "") -> None:
    """Delete all but the `keep` latest checkpoints and, with `best`, the best by that metric.

    newest: the step just saved; later ones are broken and were passed over, they go. What killed
    saves and prunes left behind goes too. A folder is renamed before it is deleted, so a kill in
    between leaves no broken checkpoint. Raises ValueError when `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"prune: keep must be at least 1, got {keep}; pass 1 or more")
    root = Path(directory)

    def delete(step: int) -> None:
        (root / str(step)).rename(root / f"{step}{DELETING}")

    for step in (int(folder.name) for folder in _folders(root)):
        if step > newest:
            delete(step)
    spared = best_step(root, best) if best else None
    for step in all_steps(root)[:-keep]:
        if step != spared:
            delete(step)
    for mark in (TMP_MARK, SAVING, DELETING):
        for folder in root.glob(f"*{mark}*"):
            shutil.rmtree(folder)


def write_folder(path: str | Path, write: Callable[[Path], None]) -> None:
    """Let write(folder) fill a folder that then appears as `path`, whole, instead of an older one.

    A kill leaves the older or the newer one; between two renames it can leave the newer one as
    `path` + ".saving" alone.
    """
    path, fresh, old = Path(path), Path(f"{path}{SAVING}"), Path(f"{path}{DELETING}")
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    write(fresh)
    if path.exists():
        path.rename(old)
    fresh.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def _snapshot(directory: str | Path, step: int, tree, meta: dict) -> tuple[Path, dict, dict]:
    """Return (folder, host copies of the leaves, index), or raise the errors of `save`."""
    folder = Path(directory).absolute() / str(step)
    flat = _flatten(tree)
    _check_new(folder, step, flat)
    index = {"format": FORMAT, "meta": meta, "leaves": _describe(flat)}
    json.dumps(index, allow_nan=False)  # raises before anything is written
    # A copy even on a CPU, where NumPy would else hold the very buffer that the next step reuses.
    return folder, {name: np.array(leaf) for name, leaf in jax.device_get(flat).items()}, index


def _write(folder: Path, flat: dict, index: dict) -> None:
    """Write a checkpoint beside its place, its manifest last, and rename it into its place."""
    fresh = folder.with_name(f"{folder.name}{SAVING}")
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        with _checkpointer() as checkpointer:
            items = {"tree": ocp.args.StandardSave(flat), "index": ocp.args.JsonSave(index)}
            checkpointer.save(fresh, ocp.args.Composite(**items))
        names = [p.relative_to(fresh).as_posix() for p in fresh.rglob("*") if p.is_file()]
        files = {name: _measure(fresh / name, sync=True) for name in sorted(names)}
        with open(fresh / f"{MANIFEST}.tmp", "w", encoding="utf-8") as file:
            json.dump({"files": files}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        (fresh / f"{MANIFEST}.tmp").rename(fresh / MANIFEST)
        for place in (*(p for p in fresh.rglob("*") if p.is_dir()), fresh):
            _sync_folder(place)
        if folder.exists():  # a broken one
            shutil.rmtree(folder.with_name(f"{folder.name}{DELETING}"), ignore_errors=True)
            folder.rename(folder.with_name(f"{folder.name}{DELETING}"))
        fresh.rename(folder)
        _sync_folder(folder.parent)
    except BaseException:
        for left in folder.parent.glob(f"{folder.name}{SAVING}*"):
            shutil.rmtree(left, ignore_errors=True)  # makes room again
        raise


def _checkpointer() -> ocp.Checkpointer:
    """Return orbax's, which here never waits for other processes: each reads, one writes.

    Nor for folders that it makes itself: where the disk refused one, orbax's threads would wait for
    it for five minutes, and the process for them.
    """
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    at_once = ocp.options.AsyncOptions(create_directories_asynchronously=False)
    options = ocp.CompositeOptions(multiprocessing_options=alone, async_options=at_once)
    handler = ocp.CompositeCheckpointHandler(composite_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _measure(path: Path, sync: bool = False) -> list:
    """Return [size, SHA-256] of a file, with `sync` once it is on the disk."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return [file.tell(), digest]


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems have no such thing
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _reason(error: Exception) -> str:
    """Return an error's cause in one line; orbax and tensorstore wrap what the system says."""
    text = " ".join(str(error).split())
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM):
        if os.strerror(number) in text or getattr(error, "errno", None) == number:
            return os.strerror(number)
    return f"{type(error).__name__}: {text[:200]}"


def _folders(directory: str | Path) -> list[Path]:
    """Return the folders with a step's name."""
    named = (f for f in Path(directory).glob("*") if f.name.isdecimal() and f.is_dir())
    return [f for f in named if f.name == str(int(f.name))]


def _is_complete(folder: Path) -> bool:
    """Has it both items and the manifest? Orbax itself would list any folder named by digits."""
    items = (folder / "index" / "metadata", folder / "tree" / "_METADATA")
    if not all(item.is_file() for item in items):
        return False
    try:
        return (folder / MANIFEST).is_file() or "format" not in _index(folder)
    except ValueError:
        return False


def _index(folder: Path) -> dict:
    return json.loads((folder / "index" / "metadata").read_bytes())


def _check_new(folder: Path, step: int, flat: dict) -> None:
    """Raise the ValueErrors of `save`."""
    dtypes = {name: leaf.dtype for name, leaf in flat.items() if leaf.size}
    good = [n for n, d in dtypes.items() if d.name == "bool" or jnp.issubdtype(d, np.number)]
    if step < 0 or (folder.exists() and not fault(folder)):
        raise ValueError(
            f"checkpoint {folder}: step must be 0 or more and new, got {step}; take another step"
        )
    if len(good) < max(1, len(flat)):
        raise ValueError(
            f"checkpoint {folder}: leaves must be non-empty arrays of numbers, got "
            f"{sorted(flat.keys() - good) or 'no leaf'}; leave them out (keep seeds, not keys)"
        )


def _find(directory: str | Path, step: int | None) -> tuple[Path, dict]:
    """Return the folder and the index of an intact step, the latest when None, or raise."""
    found = latest_step(directory) if step is None else step
    if found is None or found not in {int(folder.name) for folder in _folders(directory)}:
        raise ValueError(
            f"checkpoint {directory}: must hold step {'(any)' if step is None else step}, got "
            f"steps {all_steps(directory)}; check the directory and the step"
        )
    folder = Path(directory).absolute() / str(found)
    problem = fault(folder) if step is not None else ""
    if problem:
        raise ValueError(
            f"checkpoint {folder}: files must be as they were written, got {problem}; take "
            f"another of steps {[s for s in all_steps(directory) if s != step]}"
        )
    return folder, _index(folder)


def _flatten(tree) -> dict:
    """Return path string -> array, in tree order; keystr writes every path differently."""
    keep = jax.Array | jax.ShapeDtypeStruct
    arrays = jax.tree.map(lambda x: x if isinstance(x, keep) else np.asarray(x), tree)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(arrays)}


def _describe(flat: dict) -> dict:
    return {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in flat.items()}


def _place(value: np.ndarray, like):
    """Return a restored leaf where `like` is: on its devices, on none in particular, or NumPy.

    A JAX leaf bound to no device stays so: committing it would clash with a mesh under jit.
    """
    if isinstance(like, np.ndarray):
        return value
    free = like.sharding is None if isinstance(like, jax.ShapeDtypeStruct) else not like.committed
    if free:
        return jnp.array(value)
    return jax.make_array_from_callback(value.shape, like.sharding, lambda part: value[part])


def _check(folder: Path, stored: dict, flat_like: dict) -> None:
    """Raise ValueError naming the first leaf that is missing, unexpected or of another shape."""
    wanted = _describe(flat_like)
    differ = [name for name in wanted | stored if wanted.get(name) != stored.get(name)]
    if differ:
        first = differ[0]
        raise ValueError(
            f"checkpoint {folder}: leaves must match the run's, got {len(differ)} that differ, "
            f"first {first}: stored {stored.get(first, 'nothing')}, "
            f"wanted {wanted.get(first, 'nothing')}; restore with the settings it was saved with"
        )
