"""The one table of axis letters, and everything that follows from a letter: sizes and shardings.

Every array name ends in the letters of its axes (`tokens_BT`, `q_BTNH`, `reward_PG`), every einsum
is written in them, and a parameter's sharding is looked up letter by letter in `RULES`. Changing
the parallelism of the whole program is editing that dict. Knows no model and no array values.
"""

import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

LETTERS = {
    "B": "rows: one completion each; row p * G + g is completion g of prompt p",
    "P": "prompts",
    "G": "completions per prompt, the group of GRPO",
    "M": "micro-batches",
    "T": "positions being run (queries)",
    "S": "positions attended to (keys)",
    "L": "layers",
    "D": "model width",
    "N": "query heads, N = K * Q",
    "K": "key/value heads",
    "Q": "query heads per key/value head",
    "H": "head dimension",
    "F": "MLP hidden width",
    "V": "vocabulary",
    "R": "LoRA rank",
    "C": "chunk of positions whose logits exist at one time",
}

MESH_AXES = ("data", "model")

# letter -> mesh axis. Letters that are absent are replicated.
RULES = {"B": "data", "P": "data", "N": "model", "F": "model"}


def shape_of(letters: str, sizes: dict[str, int]) -> tuple[int, ...]:
    """Return the shape that `letters` spell, e.g. ("LDF", sizes) -> (26, 1152, 6912)."""
    return tuple(sizes[letter] for letter in letters)


def spec_of(letters: str, name: str = "array") -> PartitionSpec:
    """Return the PartitionSpec of an array whose axes are `letters`.

    Raises ValueError when two axes would land on one mesh axis.
    """
    axes = [RULES.get(letter) for letter in letters]
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise ValueError(
            f"sharding of {name!r} with axes {letters}: a mesh axis may be used once per array, "
            f"got {dict(zip(letters, axes, strict=True))}; change RULES in gemma_cot/axes.py"
        )
    return PartitionSpec(*axes)


def sharding_of(letters: str, mesh: Mesh, name: str = "array") -> NamedSharding:
    """Return the NamedSharding of an array with axes `letters` on `mesh`."""
    return NamedSharding(mesh, spec_of(letters, name))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding that keeps a whole copy on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())


def parse_mesh(text: str, num_devices: int) -> tuple[int, int]:
    """Turn `--mesh` into (data, model) sizes: "auto" is all devices on data; "4x2" is itself.

    Raises ValueError when the text is malformed or does not multiply to `num_devices`.
    """
    if text == "auto":
        return num_devices, 1
    parts = text.split("x")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(
            f"--mesh: must be 'auto' or DATAxMODEL such as '8x1', got {text!r}; "
            f"set --mesh=auto or --mesh={num_devices}x1"
        )
    data, model = int(parts[0]), int(parts[1])
    if data * model != num_devices:
        raise ValueError(
            f"--mesh={text}: must multiply to the {num_devices} devices present, got "
            f"{data * model}; set --mesh=auto or --mesh={num_devices}x1"
        )
    return data, model


def make_mesh(text: str = "auto", devices: list | None = None) -> Mesh:
    """Return the (data, model) mesh that `--mesh` asks for over `devices` (default: all).

    Axis types are Auto: the compiler propagates shardings from the arguments.
    """
    devices = jax.devices() if devices is None else devices
    shape = parse_mesh(text, len(devices))
    grid = np.asarray(devices, dtype=object).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return math.ceil(n / multiple) * multiple
