"""The one table of axis letters, and everything that follows from a letter: sizes and shardings.

Every array name ends in the letters of its axes (`tokens_BT`, `q_BTNH`, `reward_PG`), every einsum
is written in them, and a parameter's sharding is looked up letter by letter in `RULES`. Changing
the parallelism of the whole program is editing that dict. Knows no model and no array values.
"""

import math
from collections.abc import Callable

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
    "C": "what is taken at one time: positions, or tokens of a part of the vocabulary",
}

MESH_AXES = ("data", "model")

# letter -> mesh axis. Letters that are absent are replicated.
RULES = {"B": "data", "P": "data", "N": "model", "F": "model", "V": "model"}
WEIGHTS_SHARE = 1 / 3  # of a device's memory; the rest is for adapter, caches and activations


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


def auto_mesh(
    num_devices: int,
    sizes: dict[str, int],
    weight_bytes: float,
    memory_bytes: float,
    batches: tuple[int, ...] = (),
    per_process: int | None = None,
) -> str:
    """Return what `--mesh=auto` stands for, e.g. "8x1": as many devices on data as possible.

    The smallest model axis that cuts every letter on it evenly, leaves weights at most
    WEIGHTS_SHARE of a device's memory, and a data axis that divides all `batches`. Where no axis
    does, memory comes before batches, and the largest axis comes nearest. It stays within the
    devices of a process (`per_process`, None: all).
    """
    largest = per_process or num_devices
    divisors = [m for m in range(1, largest + 1) if largest % m == 0]
    models = [m for m in divisors if not uneven_letters(sizes, m)]
    light = [m for m in models if weight_bytes / m <= WEIGHTS_SHARE * memory_bytes] or models[-1:]
    even = [m for m in light if all(rows % (num_devices // m) == 0 for rows in batches)] or light
    return f"{num_devices // even[0]}x{even[0]}"


def uneven_letters(sizes: dict[str, int], model: int) -> list[str]:
    """Return the letters on the model axis whose sizes `model` devices cannot share evenly."""
    return [x for x, axis in RULES.items() if axis == "model" and sizes[x] % model]


def check_mesh(mesh: Mesh, sizes: dict[str, int]) -> None:
    """Raise ValueError unless the mesh's model axis divides the sizes of all letters on it."""
    data, model = mesh.shape["data"], mesh.shape["model"]
    for letter in uneven_letters(sizes, model):
        raise ValueError(
            f"--mesh={data}x{model}: the model axis must divide the {sizes[letter]} of axis "
            f"{letter} ({LETTERS[letter].split(',')[0]}), got {model}; set --mesh={data * model}x1"
        )


def check_processes(mesh: Mesh) -> None:
    """Raise ValueError unless each process has the same number of whole rows of the mesh, so that
    its share of a batch is its own."""
    data, model = mesh.shape["data"], mesh.shape["model"]
    owners = [[device.process_index for device in row] for row in mesh.devices]
    counts = {owner: sum(row.count(owner) for row in owners) for row in owners for owner in row}
    if any(len(set(row)) > 1 for row in owners) or len(set(counts.values())) > 1:
        raise ValueError(
            f"--mesh={data}x{model}: the model axis must divide the devices of a process, as many "
            f"in each, got {', '.join(map(str, counts.values()))} of them and a model axis of "
            f"{model}; set --mesh={data * model}x1"
        )


def make_mesh(text: str = "auto", devices: list | None = None) -> Mesh:
    """Return the (data, model) mesh that `--mesh` asks for over `devices` (default: all, process by
    process).

    Axis types are Auto: the compiler propagates shardings from the arguments.
    """
    if devices is None:
        devices = sorted(jax.devices(), key=lambda device: device.process_index)
    shape = parse_mesh(text, len(devices))
    grid = np.asarray(devices, dtype=object).reshape(shape)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def per_device(
    function: Callable,
    letters: str,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = ("data",),
) -> Callable:
    """Return `function`, run by each device of `mesh` (None: the one in force) on its own rows.

    letters: "BTNH,B,->BTNH", the axes of inputs and outputs ("" for a scalar, or a whole pytree
    that every device has); rows (B, P, C) are split over `data`, everything else is whole. Without
    a mesh, or inside another `per_device`, it is the function itself. For what the compiler cannot
    cut by rows (a kernel), or would synchronise (a loop that ends when its rows have ended).
    axes: those the function is cut along; the compiler still cuts along the others, which it
    cannot do to a kernel. Collectives over `axes` are those the function asks for by name.
    """
    mesh_here = jax.sharding.get_abstract_mesh()
    mesh = mesh_here if mesh is None else mesh
    cut = {axis for axis, size in mesh.shape.items() if axis in axes or size == 1}
    cut -= set(mesh_here.manual_axes)
    if not cut:
        return function

    def specs(side: str) -> list[PartitionSpec]:
        rows = "BPC" if "data" in cut else ""
        return [
            PartitionSpec(*("data" if letter in rows else None for letter in array))
            for array in side.split(",")
        ]

    inputs, outputs = map(specs, letters.split("->"))
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=tuple(inputs),
        out_specs=tuple(outputs) if len(outputs) > 1 else outputs[0],
        axis_names=cut,
        check_vma=False,
    )


def platform() -> str:
    """Return "cpu", "gpu" or "tpu", on which this will run: that of the mesh in force
    (`jax.set_mesh`), else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def on_any_device(flag: jax.Array) -> jax.Array:
    """Return whether `flag` holds here or, where the compiler cuts along `model` inside a
    `per_device`, on any data device: then loops hold collectives, and all must turn equally often.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) != {"data"}:
        return flag
    return jax.lax.pmax(flag.astype(int), "data") > 0


def round_up(n: int, multiple: int) -> int:
    """Return the smallest multiple of `multiple` that is at least n."""
    return math.ceil(n / multiple) * multiple
