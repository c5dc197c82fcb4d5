"""Run the no-flag recipe over several seeds, as a stranger would, and measure it from outside.

    python benchmarks/recipe.py --seeds=0,1,2 > results.jsonl

Prints one JSON line a seed: wall-clock seconds and peak memory of the process, the rates of every
stage with their intervals, and of GRPO's updates how many groups had signal (mean), the rollouts
they took (sum) and the share of sampled tokens in no update (mean). Further flags of
gemma_cot.train may follow `--`, such as --dynamic_sampling.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run_once(seed: int, extra: list[str]) -> dict:
    """Run the recipe in a process of its own; return its figures."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        began = time.perf_counter()
        command = [sys.executable, "-m", "gemma_cot.train", f"--output_dir={out}", f"--seed={seed}"]
        process = subprocess.Popen([*command, *extra], stdout=sys.stderr)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
        if status:
            raise SystemExit(f"the run of seed {seed} ended with status {status}")
        summary = json.loads((out / "summary.json").read_text())
        logged = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
        grpo = [metrics for metrics in logged if metrics["stage"] == "grpo"]
    names = ("full_format_accuracy", "answer_accuracy", "process_score", "truncated_rate")
    stages = {
        stage: {key: value for key, value in rates.items() if key.startswith(names) or key == "n"}
        for stage, rates in summary["stages"].items()
    }
    return {
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_gib": round(usage.ru_maxrss / 2**20, 2),
        "seconds_by_phase": summary["seconds"],
        "stages": stages,
        "flags": extra,
        "updates": len(grpo),
        "signal_share": statistics.fmean(metrics["signal_share"] for metrics in grpo),
        "rollouts": sum(metrics.get("rollouts", 1) for metrics in grpo),
        "wasted_tokens": statistics.fmean(metrics.get("wasted_tokens", 0.0) for metrics in grpo),
        "comparisons": summary["comparisons"],
        "jax": summary["jax"],
        "cpus": len(os.sched_getaffinity(0)),
    }


def main() -> None:
    """Parse the command line and print a line a seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments, extra = parser.parse_known_args()
    extra = [flag for flag in extra if flag != "--"]
    for seed in map(int, arguments.seeds.split(",")):
        print(json.dumps(run_once(seed, extra)), flush=True)


if __name__ == "__main__":
    main()
