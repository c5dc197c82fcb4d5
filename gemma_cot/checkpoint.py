"""Save and restore any pytree with orbax, one folder a step: `directory/STEP/{tree,index}`.

The tree is stored flat, path string -> array, so optax NamedTuples, flax dataclasses and None need
no special case: `like_tree` gives the structure. `index` is one JSON object: the caller's `meta`
and every leaf's shape and dtype, so that a mismatch is named before the tree is read. One writer
at a time. Knows no model, no stage, no flag.
"""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

TMP_MARK = ".orbax-checkpoint-tmp"  # orbax writes into STEP + this, then renames to STEP
DELETING = ".deleting"  # prune renames STEP to STEP + this, then deletes


def save(directory: str | Path, step: int, tree, meta: dict) -> None:
    """Write `tree` and the small JSON dict `meta` as checkpoint `step`; return when on disk.

    The folder appears under its final name by one rename, complete or not at all. Raises
    ValueError when the step exists already or is negative, or when a leaf is not a number or a
    non-empty array of numbers (orbax has no place for others); TypeError when meta is not JSON.
    """
    folder = Path(directory).absolute() / str(step)
    flat = _flatten(tree)
    _check_new(folder, step, flat)
    index = {"meta": meta, "leaves": _describe(flat)}
    json.dumps(index, allow_nan=False)  # raises before anything is written
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(tree=ocp.args.StandardSave(flat), index=ocp.args.JsonSave(index))
        checkpointer.save(folder, items)


def restore(directory: str | Path, like_tree, step: int | None = None) -> tuple:
    """Return (tree, meta) of checkpoint `step`, the latest when None.

    `like_tree` gives structure, shapes, dtypes and placement: a ShapeDtypeStruct or committed
    array with a sharding gets that sharding, an uncommitted JAX array (as optax's counters are)
    stays uncommitted, a NumPy leaf comes back as NumPy. Raises ValueError when there is no such
    checkpoint or when it does not match `like_tree`.
    """
    folder, index = _find(directory, step)
    flat_like = _flatten(like_tree)
    _check(folder, index["leaves"], flat_like)
    target = {name: _target(leaf) for name, leaf in flat_like.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        items = ocp.args.Composite(tree=ocp.args.StandardRestore(target))
        flat = checkpointer.restore(folder, items)["tree"]
    flat |= {name: jnp.array(flat[name]) for name in flat if _floats_freely(flat_like[name])}
    leaves = [flat[name] for name in flat_like]
    return jax.tree.unflatten(jax.tree.structure(like_tree), leaves), index["meta"]


def read_meta(directory: str | Path, step: int | None = None) -> dict:
    """Return the `meta` of checkpoint `step` (the latest when None) without reading its tree.

    Raises ValueError when there is no such checkpoint.
    """
    return _find(directory, step)[1]["meta"]


def latest_step(directory: str | Path) -> int | None:
    """Return the largest complete step, None when there is none (or no directory)."""
    return max(all_steps(directory), default=None)


def all_steps(directory: str | Path) -> list[int]:
    """Return the complete steps in ascending order; half-written or half-copied ones are not."""
    return sorted(int(f.name) for f in Path(directory).glob("*") if _is_complete(f))


def prune(directory: str | Path, keep: int) -> None:
    """Delete all but the `keep` latest checkpoints, and what killed saves and prunes left behind.

    A folder is renamed before it is deleted, so a kill in between leaves no broken checkpoint.
    Raises ValueError when `keep` is below 1.
    """
    if keep < 1:
        raise ValueError(f"prune: keep must be at least 1, got {keep}; pass 1 or more")
    root = Path(directory)
    for step in all_steps(root)[:-keep]:
        (root / str(step)).rename(root / f"{step}{DELETING}")
    for folder in [*root.glob(f"*{TMP_MARK}*"), *root.glob(f"*{DELETING}")]:
        shutil.rmtree(folder)


def _is_complete(folder: Path) -> bool:
    """Has it a step's name and both items? Orbax itself would list any folder named by digits."""
    items = (folder / "index" / "metadata", folder / "tree" / "_METADATA")
    return folder.name.isdecimal() and all(item.is_file() for item in items)


def _check_new(folder: Path, step: int, flat: dict) -> None:
    """Raise the ValueErrors of `save`."""
    dtypes = {name: leaf.dtype for name, leaf in flat.items() if leaf.size}
    good = [n for n, d in dtypes.items() if d.name == "bool" or jnp.issubdtype(d, np.number)]
    if step < 0 or folder.exists():
        raise ValueError(
            f"checkpoint {folder}: step must be 0 or more and new, got {step}; take another step"
        )
    if len(good) < max(1, len(flat)):
        raise ValueError(
            f"checkpoint {folder}: leaves must be non-empty arrays of numbers, got "
            f"{sorted(flat.keys() - good) or 'no leaf'}; leave them out (keep seeds, not keys)"
        )


def _find(directory: str | Path, step: int | None) -> tuple[Path, dict]:
    """Return the folder and the index of a complete step, the latest when None, or raise."""
    steps = all_steps(directory)
    if not steps or (step is not None and step not in steps):
        raise ValueError(
            f"checkpoint {directory}: must hold step {'(any)' if step is None else step}, got "
            f"steps {steps}; check the directory and the step"
        )
    folder = Path(directory).absolute() / str(steps[-1] if step is None else step)
    return folder, json.loads((folder / "index" / "metadata").read_text(encoding="utf-8"))


def _flatten(tree) -> dict:
    """Return path string -> array, in tree order; keystr writes every path differently."""
    keep = jax.Array | jax.ShapeDtypeStruct
    arrays = jax.tree.map(lambda x: x if isinstance(x, keep) else np.asarray(x), tree)
    return {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(arrays)}


def _describe(flat: dict) -> dict:
    return {name: [list(leaf.shape), leaf.dtype.name] for name, leaf in flat.items()}


def _floats_freely(leaf) -> bool:
    """Is it a JAX leaf bound to no device? Committing it would clash with a mesh under jit."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf.sharding is None
    return isinstance(leaf, jax.Array) and not leaf.committed


def _target(leaf):
    """Return what orbax restores into: a sharded JAX array or, for the rest, a NumPy array."""
    if isinstance(leaf, np.ndarray) or _floats_freely(leaf):
        return np.empty(leaf.shape, leaf.dtype)
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


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
