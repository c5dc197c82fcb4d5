"""What the run's own functions need on a TPU v5e, compiled for it without one.

    pip install -e '.[tpu]' && python benchmarks/v5e_compile.py > benchmarks/v5e_compile.jsonl

One JSON line a program: HBM of a chip in GiB (XLA's total: arguments + results - results in place
of arguments + temporaries), by owner, collectives {kind: [in the program, in its loops]}, the bound
from shapes and peak figures, and the seconds that compiling took on this machine with its load at
the end, which are the only timing here. --only=NAME takes the cases whose name holds NAME;
--topologies=v5e:1x1,v5e:2x2 instead shows how the 1B recipe grows with chips: as many prompts a
chip on each, 4 x 768 tokens a chip in an update.
"""

import argparse
import dataclasses
import json
import os
import sys

from gemma_cot import config
from gemma_cot.axes import make_mesh
from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.plan.accounts import collectives, owners
from gemma_cot.plan.chips import compiler_of, devices_of
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


def measure(case: str, name: str, topology: str = "v5e:2x4") -> dict:
    """Compile one function of one case; return its figures. Another topology: data parallel, its
    prompts those of v5e:2x4 for each chip."""
    shape, mesh, changes, _ = CASES[case]
    devices, chip = devices_of(topology)
    if topology != "v5e:2x4":
        mesh, chips = f"{len(devices)}x1", len(devices)
        changes = changes | dict(
            mini_batch=changes["mini_batch"] * chips // 8, prompts_per_rollout=4 * chips
        )
    cfg = TrainConfig(**PRESETS["gemma3_1b_v5e8"] | changes)
    shape = dataclasses.replace(shape, attention=cfg.attention, logprob=cfg.logprob)
    setup = Setup(cfg, shape, make_mesh(mesh, devices), "bfloat16", eval_rows=1000)
    program = compile_call(setup, call_of(name, setup))
    seconds, limiter = bound(phases_of(setup, name), chip)
    held = owners(setup, name, program)
    return {
        "case": case,
        "function": name,
        "topology": topology,
        "mesh": mesh,
        "hbm_gib": round(program.total / 2**30, 3),
        "hbm_gib_by_owner": {owner: round(size / 2**30, 3) for owner, size in held.items()},
        "collectives": collectives(program.text),
        "bound_ms": round(1e3 * seconds, 2),
        "limiter": limiter,
        "compile_seconds": round(program.seconds, 1),
        "load": round(os.getloadavg()[0], 1),
        "cpus": len(os.sched_getaffinity(0)),
        "compiler": compiler_of(devices[0]),
    }


def main() -> None:
    """Print a line a program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--topologies", default="", help="comma-separated, such as v5e:1x1,v5e:2x2")
    flags = parser.parse_args()
    programs = [(case, name) for case in CASES for name in CASES[case][3] if flags.only in case]
    if flags.topologies:
        case = "1b 4 x 768 a chip"
        programs = [(case, name, topology) for topology in flags.topologies.split(",")
                    for name in ("decode", "update")]  # fmt: skip
    for program in programs:
        print(*program, file=sys.stderr, flush=True)
        print(json.dumps(measure(*program)), flush=True)


if __name__ == "__main__":
    main()
