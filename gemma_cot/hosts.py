"""Several processes, one program: how they meet, what each holds, what they tell each other.

On several hosts every process runs the same program on one mesh over all devices (SPMD): all read
the same files, each has its share of the rows, process 0 alone writes. What one of them decides by
a clock or a folder, or fails at, all must know, or the others wait for it for ever. With a single
process everything here does nothing. Knows no model, no data and no flag.
"""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

WAIT_SECONDS = 300  # for the other processes to come
LAST_SECONDS = 3  # for the others to go when all do


def join(coordinator: str = "", num_processes: int = 1, process_id: int = 0) -> None:
    """Meet the other processes of a run; call it before anything touches a device.

    coordinator: HOST:PORT of process 0; "auto" leaves all three to JAX, which knows TPU pods and
    Slurm; "" is a single process, except where the environment lists several TPU hosts. Raises
    ValueError, one line; where the others do not come, ends the process with such a line.
    """
    if not coordinator and num_processes > 1:
        raise ValueError(
            f"--num_processes: must be 1 without --coordinator, got {num_processes}; add "
            "--coordinator=HOST:PORT, an address of process 0 that all of them reach"
        )
    if coordinator not in ("", "auto"):
        where = _check_address(coordinator, num_processes, process_id)
    elif coordinator or _on_a_pod():
        where = {}
    else:
        return
    if where and process_id == 0:
        _check_port(coordinator)
    late = threading.Timer(WAIT_SECONDS, _give_up, (coordinator, num_processes, process_id))
    late.daemon = True
    late.start()
    try:  # where the others do not come in time, it aborts the process: `late` is earlier
        jax.distributed.initialize(**where, initialization_timeout=WAIT_SECONDS + 60)
    except Exception as error:  # of many types, as clusters are
        raise ValueError(
            f"--coordinator: process {process_id} must be able to meet the others at "
            f"{coordinator or 'an address of the pod'}, got {error}; choose another HOST:PORT"
        ) from None
    finally:
        late.cancel()


def _check_address(coordinator: str, num_processes: int, process_id: int) -> dict:
    """Return what JAX is told; raise ValueError for what cannot be an address or a number."""
    if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[^\s:]+):[0-9]{1,5}", coordinator):
        raise ValueError(
            f"--coordinator: must be HOST:PORT or auto, got {coordinator!r}; set it to an address "
            "of process 0 such as 10.0.0.2:1234"
        )
    if not 0 <= process_id < num_processes:
        raise ValueError(
            f"--process_id: must be 0 to --num_processes - 1 = {num_processes - 1}, got "
            f"{process_id}; give each process a number of its own"
        )
    return dict(
        coordinator_address=coordinator, num_processes=num_processes, process_id=process_id
    )


def _check_port(coordinator: str) -> None:
    """Raise ValueError where process 0 cannot listen; the library would end with a crash."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    place = ("", int(coordinator.rpartition(":")[2]))
    try:
        socket.create_server(place, family=family, dualstack_ipv6=both).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"--coordinator: process 0 must be able to meet the others at {coordinator}, got "
            f"{error}; choose another port"
        ) from None


def _on_a_pod() -> bool:
    """Whether the environment lists several TPU hosts; nobody is asked over the network."""
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return "," in hosts and os.environ.get("JAX_PLATFORMS", "tpu") != "cpu"


def _give_up(coordinator: str, num_processes: int, process_id: int) -> None:
    sys.stderr.write(
        f"error: --coordinator: all {num_processes} processes must meet at {coordinator or 'auto'} "
        f"within {WAIT_SECONDS} s, got too few of them there (this is process {process_id}); start "
        "each with the same --coordinator and --num_processes, and check address and firewall\n"
    )
    os._exit(2)


def are_several() -> bool:
    """Whether this process has met others; touches no device."""
    return jax.distributed.is_initialized()


def leave(code: int) -> None:
    """End the process; where there are others, at once: an orderly exit would wait for them, and
    they for this one. They end when their next exchange fails or this one's heartbeat is missed.

    Process 0 goes last: without its coordination service, JAX aborts those that are just leaving.
    """
    if not are_several():
        sys.exit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    if is_writer():
        time.sleep(LAST_SECONDS)
    os._exit(code)


def is_writer() -> bool:
    """Whether this is process 0, the one that writes files and prints."""
    return jax.process_index() == 0


def share(rows: int) -> slice:
    """Return which of `rows`, cut over the mesh's data axis, lie on this process's devices."""
    each = rows // jax.process_count()
    return slice(jax.process_index() * each, (jax.process_index() + 1) * each)


def place(tree, sharding):
    """Return `tree` on the devices; host arrays are the same in all processes, each puts its part.

    sharding: one for all leaves, or a tree of them.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def put(x, sharding):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            return jax.device_put(x, sharding)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    if isinstance(sharding, jax.sharding.Sharding):
        return jax.tree.map(lambda x: put(x, sharding), tree)
    return jax.tree.map(put, tree, sharding)


def fetch(tree):
    """Return arrays of the devices as NumPy, whole, in every process. All must call it."""
    if jax.process_count() > 1:
        tree = multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def own(tree):
    """Return as NumPy what this process's devices hold: its rows, all of what is replicated."""

    def block(x):
        if isinstance(x, jax.Array) and not x.is_fully_addressable:
            mesh, spec = x.sharding.mesh, x.sharding.spec
            x = multihost_utils.global_array_to_host_local_array(x, mesh, spec)
        return jax.device_get(x)

    return jax.tree.map(block, tree)


def gather(work: Callable[[], object]) -> list:
    """Return what work() gives (a JSON value) in each process, by process. All must call it.

    What it raises in one of them, all raise, so that none waits for one that has gone.
    """
    if jax.process_count() == 1:
        return [work()]
    value = error = None
    try:
        value = work()
    except Exception as raised:
        if getattr(raised, "is_known", False):  # to all, by a `gather` inside
            raise
        error = raised
    told = None if error is None else str(error) or type(error).__name__
    parts = _exchange([value, told])
    for process, (_, problem) in enumerate(parts):
        if problem is not None:
            error = error or ValueError(f"process {process}: {problem}")
            error.is_known = True
            raise error
    return [value for value, _ in parts]


def check_same(values: dict) -> None:
    """Raise ValueError, in all, unless every process has the same JSON values."""
    first, *others = gather(lambda: values)
    for process, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise ValueError(
                    f"{name}: must be the same in all processes, got {value!r:.100} in process 0, "
                    f"{other[name]!r:.100} in process {process}; give all the same flags and files"
                )


def _exchange(value) -> list:
    """Return every process's JSON value: lengths first, then texts padded to the longest."""
    text = json.dumps(value).encode()
    lengths = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.zeros(2 ** int(max(lengths)).bit_length(), np.uint8)  # few sizes, few compilations
    padded[: len(text)] = np.frombuffer(text, np.uint8)
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(row[:n])) for row, n in zip(texts, lengths, strict=True)]


def together(work: Callable[[], object]):
    """Return work() when every process has done it; what one raises, all raise."""
    kept = []
    gather(lambda: kept.append(work()))
    return kept[0]


def agreed(work: Callable[[], object]):
    """Let process 0 work while the others wait; return the JSON value that it got, in all."""
    return gather(lambda: work() if is_writer() else None)[0]
