"""What share of a device's speed decoding and updates reach: python benchmarks/utilisation.py

    python benchmarks/utilisation.py --shape=1b --dtype=bfloat16 --rows=64     # on a GPU or a TPU
    python benchmarks/utilisation.py                                           # small, on a CPU

First what the device does at its best, measured: bytes a second of a copy or of a loop in place,
whichever is faster (read and written), FLOPs a second of a square matrix product, both in --dtype.
Then `ours.py` in processes of its own: sampling --rows rows, and an update of one micro-batch of
--micro rows. The bytes that decoding must move (weights, adapter, the keys and values that a token
may see) and the FLOPs of an update (forward, and backward to the activations and the adapter;
masked scores and the scores that attention computes again included) are counted from shapes by
`gemma_cot.plan.cost`. Prefill is in the time of sampling and not in its bytes. One JSON line each;
nothing else should run meanwhile.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import shapes

from gemma_cot.plan.chips import CHIPS

CALLS = 8  # in flight at one time, so that starting one is hidden behind those before it


def seconds(step: Callable, x: jax.Array) -> float:
    """Return the median seconds of x = step(x), CALLS times in a row, five times after a first."""
    times = []
    for _ in range(6):
        began = time.perf_counter()
        for _ in range(CALLS):
            x = step(x)
        jax.block_until_ready(x)
        times.append((time.perf_counter() - began) / CALLS)
    return statistics.median(times[1:])


def peaks(dtype: str) -> dict:
    """Return what this process's device does at its best, by measuring it."""
    device = jax.devices()[0]
    n, size = (2048, 2**28) if device.platform == "cpu" else (8192, 2**32)  # bytes of one array
    x = jnp.ones(size // jnp.dtype(dtype).itemsize, dtype)
    a = jax.random.normal(jax.random.key(0), (n, n), dtype) * n**-0.5
    product = jax.jit(jnp.matmul)
    in_place = jax.jit(lambda x: x + 1, donate_argnums=0)  # where new memory costs more than a copy
    return {
        "device": device.device_kind,
        "copy_bytes_per_s": 2 * size / min(seconds(jax.jit(jnp.copy), x), seconds(in_place, x)),
        "product_flops_per_s": 2 * n**3 / seconds(lambda x: product(x, a), a),
    }


def main() -> None:
    """Parse the command line and print three lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", type=int, default=16, help="rows sampled; 4 to a prompt")
    parser.add_argument("--micro", type=int, default=shapes.GROUP, help="rows of the update")
    parser.add_argument("--peaks", action="store_true", help="only the first line")
    flags, extra = parser.parse_known_args()
    if flags.peaks:
        print(json.dumps(peaks(flags.dtype)))
        return
    best = shapes.run_script("utilisation.py", "--peaks", f"--dtype={flags.dtype}")
    print(json.dumps(best), flush=True)
    extra = [*extra, f"--dtype={flags.dtype}"]

    run = shapes.run_script("ours.py", "--work=sample", f"--rows={flags.rows}", *extra)
    bytes_per_s = run["hbm_bytes"][-1] / run["median_s"]
    line = {
        "work": "sample", "rows": run["rows"], "median_s": run["median_s"],
        "tokens_per_s": run["rows"] * run["new"] / run["median_s"], "bytes_per_s": bytes_per_s,
        "share_of_copy": bytes_per_s / best["copy_bytes_per_s"], "peak_gib": run["peak_gib"],
    }  # fmt: skip
    print(json.dumps(line), flush=True)

    rows = f"--rows={flags.micro}", f"--micro={flags.micro}"
    run = shapes.run_script("ours.py", "--work=update", *rows, *extra)
    flops_per_s = sum(run["flops"]) / run["median_s"]
    line = {
        "work": "update", "rows": run["rows"], "median_s": run["median_s"],
        "flops_per_s": flops_per_s, "share_of_product": flops_per_s / best["product_flops_per_s"],
        "peak_gib": run["peak_gib"],
    }  # fmt: skip
    chip = CHIPS.get(best["device"])
    if chip and flags.dtype == "bfloat16":
        line["mfu"] = flops_per_s / chip.flops  # of the data sheet's figure
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
