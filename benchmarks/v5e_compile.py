"""What the run's own functions need on a TPU v5e, compiled for it without one.

    pip install -e '.[tpu]' && python benchmarks/v5e_compile.py > benchmarks/v5e_compile.jsonl

One JSON line a program: HBM of a chip in GiB (XLA's total: arguments + results - results in place
of arguments + temporaries), by owner, collectives {kind: [in the program, in its loops]}, the bound
from shapes and peak figures, and the seconds that compiling took on this machine with its load at
the end, which are the only timing here. --only=NAME takes the cases whose name holds NAME.
"""

import argparse
import dataclasses
import json
import os
import sys

import jax

from gemma_cot import config
from gemma_cot.axes import make_mesh
from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.plan.accounts import collectives, owners
from gemma_cot.plan.chips import devices_of
from gemma_cot.plan.clock import phases_of
from gemma_cot.plan.cost import bound
from gemma_cot.plan.programs import FUNCTIONS, Setup, call_of, compile_call

# name: (shape, mesh, settings that differ from the preset gemma3_1b_v5e8, functions)
KERNELS = dict(attention="pallas", logprob="pallas")
FOUR, SIXTEEN = dict(mini_batch=8, micro_batch=4), dict(mini_batch=32, micro_batch=16)
CASES = {
    "1b recipe": (config.GEMMA3_1B, "8x1", {}, FUNCTIONS),
    "1b 4 x 768 a chip": (config.GEMMA3_1B, "8x1", FOUR, ("reference_logprobs", "update")),
    "1b 4 x 768 a chip, no prompt shared": (
        config.GEMMA3_1B, "8x1", FOUR | dict(num_generations=32, mini_batch=1), ("update",)
    ),
    "1b 16 x 768 a chip": (config.GEMMA3_1B, "8x1", SIXTEEN, ("update",)),
    "1b 64 rows a chip": (config.GEMMA3_1B, "8x1", dict(prompts_per_rollout=128), ("decode",)),
    "1b 4 x 768 a chip, kernels": (
        config.GEMMA3_1B, "8x1", FOUR | KERNELS, ("reference_logprobs", "update")
    ),
    "1b 64 rows a chip, kernels": (
        config.GEMMA3_1B, "8x1", KERNELS | dict(prompts_per_rollout=128), ("decode",)
    ),
    "4b": (config.GEMMA3_4B, "4x2", {}, ("decode", "update")),
    "12b": (config.GEMMA3_12B, "1x8", {}, ("decode", "update")),
}  # fmt: skip


def measure(case: str, name: str) -> dict:
    """Compile one function of one case; return its figures."""
    shape, mesh, changes, _ = CASES[case]
    devices, chip = devices_of("v5e:2x4")
    cfg = TrainConfig(**PRESETS["gemma3_1b_v5e8"] | changes)
    shape = dataclasses.replace(shape, attention=cfg.attention, logprob=cfg.logprob)
    setup = Setup(cfg, shape, make_mesh(mesh, devices), "bfloat16", eval_rows=1000)
    program = compile_call(setup, call_of(name, setup))
    seconds, limiter = bound(phases_of(setup, name), chip)
    held = owners(setup, name, program)
    return {
        "case": case,
        "function": name,
        "topology": "v5e:2x4",
        "mesh": mesh,
        "hbm_gib": round(program.total / 2**30, 3),
        "hbm_gib_by_owner": {owner: round(size / 2**30, 3) for owner, size in held.items()},
        "collectives": collectives(program.text),
        "bound_ms": round(1e3 * seconds, 2),
        "limiter": limiter,
        "compile_seconds": round(program.seconds, 1),
        "load": round(os.getloadavg()[0], 1),
        "cpus": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }


def main() -> None:
    """Print a line a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    only = parser.parse_args().only
    for case, (_, _, _, names) in CASES.items():
        for name in names if only in case else ():
            print(f"{case}: {name}", file=sys.stderr, flush=True)
            print(json.dumps(measure(case, name)), flush=True)


if __name__ == "__main__":
    main()
