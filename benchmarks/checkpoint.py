"""Measure what share of a run's time its checkpoints take.

    python benchmarks/checkpoint.py --every=50 --sft_steps=500 --grpo_steps=100

Trains the embedded tiny model (the tiny preset with these steps, one evaluation row) with
checkpoints every N steps and without, each `--repeat` times in a process of its own, in turns.
Prints one JSON line: the seconds of the stages with and without (medians), and, of the run with,
the seconds that the loop stood still for checkpoints (copying to the host, waiting for the one
before) and the seconds that writing took beside it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from gemma_cot import checkpoint, train
from gemma_cot.config import PRESETS, TrainConfig
from gemma_cot.run import Run


def measure(every: int, sft_steps: int, grpo_steps: int) -> dict:
    """Train in this process; return seconds of the stages, of standing still, and of writing."""
    spent = {"loop": 0.0, "writing": 0.0, "saves": 0}

    def timed(name: str, function):
        def call(*args, **options):
            began = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    def written(function):
        def call(*args):
            spent["saves"] += 1
            return function(*args)

        return call

    Run.save = timed("loop", Run.save)
    checkpoint._write = written(timed("writing", checkpoint._write))
    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainConfig(
            **PRESETS["tiny"]
            | dict(output_dir=folder, sft_steps=sft_steps, grpo_steps=grpo_steps, eval_limit=1,
                   checkpoint_every=every, sample_every=0, trace_every=0)
        )  # fmt: skip
        train.main(cfg)
        seconds = json.loads((Path(folder) / "summary.json").read_text())["seconds"]
    return spent | {"stages": seconds["sft"] + seconds.get("grpo", 0.0)}


def main() -> None:
    """Measure by turns and print the line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=50)
    parser.add_argument("--sft_steps", type=int, default=500)
    parser.add_argument("--grpo_steps", type=int, default=100)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--once", type=int, help="measure here with checkpoints every N steps")
    args = parser.parse_args()
    if args.once is not None:
        print(json.dumps(measure(args.once, args.sft_steps, args.grpo_steps)))
        return
    parts: dict[int, list[dict]] = {args.every: [], 0: []}
    steps = [f"--sft_steps={args.sft_steps}", f"--grpo_steps={args.grpo_steps}"]
    for _ in range(args.repeat):
        for every, done in parts.items():
            command = [sys.executable, __file__, f"--once={every}", *steps]
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            done.append(json.loads(output.splitlines()[-1]))
    middle = {every: {name: statistics.median(part[name] for part in done) for name in done[0]}
              for every, done in parts.items()}  # fmt: skip
    saving, without = middle[args.every], middle[0]
    line = {
        "every": args.every, "sft_steps": args.sft_steps, "grpo_steps": args.grpo_steps,
        "repeat": args.repeat, "checkpoints": saving["saves"],
        "seconds_with": saving["stages"], "seconds_without": without["stages"],
        "share_of_time": saving["stages"] / without["stages"] - 1,
        "seconds_loop_stood_still": saving["loop"], "seconds_writing": saving["writing"],
        "share_stood_still": saving["loop"] / saving["stages"],
        "jax": jax.__version__, "cores": os.cpu_count(), "machine": platform.machine(),
    }  # fmt: skip
    print(json.dumps(line))


if __name__ == "__main__":
    main()
