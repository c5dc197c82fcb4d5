"""What the scripts of this folder share: shapes, random tokens, timing, memory, one JSON line.

Standard library and NumPy only: the peers' scripts run in environments without JAX or torch.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import numpy as np

# Gemma 3 text towers: every sixth layer global, the others see 512 positions.
SHAPES = {
    "small": dict(
        num_layers=6, embed_dim=256, num_heads=4, num_kv_heads=1, head_dim=64, mlp_dim=1024,
        vocab_size=8192,
    ),
    "1b": dict(
        num_layers=26, embed_dim=1152, num_heads=4, num_kv_heads=1, head_dim=256, mlp_dim=6912,
        vocab_size=262_144,
    ),
}  # fmt: skip
WINDOW = 512
GROUP, RANK, BETA, TEMPERATURE = 4, 32, 0.04, 0.9
WORKS = ("forward", "sample", "logprobs", "update", "iteration")


def parse(who: str, devices: bool = False, dtypes=("float32", "bfloat16")) -> argparse.Namespace:
    """Read the flags that every script of a peer has; devices: and --devices, which is ours."""
    parser = argparse.ArgumentParser(description=f"Time one piece of work of {who}.")
    parser.add_argument("--work", choices=WORKS, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--rows", type=int, default=4, help="sequences; 4 to a prompt")
    parser.add_argument("--micro", type=int, default=GROUP, help="rows of a micro-batch at most")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=512, help="tokens of a completion")
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="of weights")
    parser.add_argument("--repeats", type=int, default=3)
    if devices:
        parser.add_argument("--devices", type=int, default=1, help="CPU devices, data parallel")
    return parser.parse_args()


def tokens(flags: argparse.Namespace, seed: int = 0) -> np.ndarray:
    """Return int32 rows [rows, prompt + new]; the 4 rows of a group share their prompt."""
    rng = np.random.default_rng(seed)
    vocab = SHAPES[flags.shape]["vocab_size"]
    prompt = rng.integers(10, vocab, (max(1, flags.rows // GROUP), flags.prompt))
    prompt = np.repeat(prompt, GROUP, axis=0)[: flags.rows]
    completion = rng.integers(10, vocab, (flags.rows, flags.new))
    return np.concatenate([prompt, completion], axis=1).astype(np.int32)


def seconds(work: Callable, repeats: int) -> dict:
    """Return first call and median, minimum, maximum of `repeats` more; `work` blocks."""
    forget_peak()
    began = time.perf_counter()
    work()
    first = time.perf_counter() - began
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return spread(times) | {"first_call_s": first}


def run_script(script: str, *flags: str, python: str = sys.executable) -> dict:
    """Run a script of this folder in a process of its own; return its JSON line, the last."""
    command = [python, str(Path(__file__).parent / script), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def spread(times: list[float]) -> dict:
    """Return median, minimum and maximum of times in seconds."""
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def forget_peak() -> None:
    """Let the peak of this process's memory begin anew: drawing random weights is not the work."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_gib() -> float:
    """Return the peak resident memory of this process since `forget_peak`, GiB."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def emit(
    who: str,
    flags: argparse.Namespace,
    packages: tuple[str, ...],
    figures: dict,
    device: str = "cpu",
    device_bytes: int | None = None,
) -> None:
    """Print one JSON line. device_bytes: the peak of an accelerator's memory; None: there is none,
    and the peak of this process counts, since its model is there."""
    record = {
        "who": who, **vars(flags), **figures, "device": device,
        "peak_gib": peak_gib() if device_bytes is None else device_bytes / 2**30,
        "cpus": len(os.sched_getaffinity(0)), "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in packages},
    }  # fmt: skip
    print(json.dumps(record, default=float), flush=True)
