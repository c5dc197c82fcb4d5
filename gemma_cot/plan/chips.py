"""The chips a plan is made for: those of a TPU topology, without a TPU, or those of this machine.

Peak figures are the vendors' data sheets. libtpu (extra `tpu`) compiles for a TPU on any Linux
machine; what it needs to be told is set here, before it is loaded.
"""

import importlib.util
import os
from dataclasses import dataclass
from importlib import metadata

import jax
from jax.experimental import topologies

# Without these libtpu asks a metadata server which TPU it is on, and locks out a second process.
LIBTPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


@dataclass(frozen=True)
class Chip:
    """Peak figures of one chip; memory is what XLA lets programs have."""

    memory: float  # bytes
    flops: float  # bfloat16, a second
    hbm: float  # bytes a second
    ici: float  # bytes a second to other chips, all links in one direction


GIB = 2**30
CHIPS = {  # device kind -> peaks
    "TPU v5 lite": Chip(15.75 * GIB, 197e12, 819e9, 200e9),
    "TPU v6 lite": Chip(31.24 * GIB, 918e12, 1640e9, 400e9),
    "TPU v5": Chip(95.73 * GIB, 459e12, 2765e9, 600e9),
    "NVIDIA H100 80GB HBM3": Chip(80e9, 989e12, 3350e9, 450e9),
    "NVIDIA H200": Chip(141e9, 989e12, 4800e9, 450e9),
}


def devices_of(topology: str) -> tuple[list, Chip | None]:
    """Return (devices, their peaks or None) of a TPU topology such as "v5e:2x4", or of "local".

    Raises ValueError, one line, for a topology that libtpu does not know and for a missing libtpu.
    """
    devices = jax.devices() if topology == "local" else tpu_devices(topology)
    chip = CHIPS.get(devices[0].device_kind)
    if topology != "local" and chip is None:
        raise ValueError(
            f"--topology={topology}: must be of a chip whose peak figures are known "
            f"({', '.join(CHIPS)}), got {devices[0].device_kind}; set --topology=v5e:2x4"
        )
    return devices, chip


def compiler_of(device) -> str:
    """Return what compiles for a device, such as "jax 0.10.2, libtpu 0.0.52": releases of libtpu
    lay out the same program in different amounts of memory."""
    names = metadata.packages_distributions().get("libtpu", []) if device.platform == "tpu" else []
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", *names))


def tpu_devices(topology: str) -> list:
    """Return the abstract devices of a TPU topology, row by row."""
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"--topology={topology}: compiling for a TPU needs libtpu, got none; install the extra "
            "with pip install 'gemma_cot[tpu]', or set --topology=local"
        )
    for name, value in LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is there is not needed, nor occupied
    # What is compiled without its devices cannot be read back from a cache: JAX warns of each.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"--topology: must be one that libtpu knows, such as v5e:2x4, v5e:2x2 or v5e:1x1, got "
            f"{topology!r} ({str(error).splitlines()[0]}); correct it"
        ) from None
    return list(description.devices)
