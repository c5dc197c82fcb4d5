"""Kill a small run at random moments until it has ended, and compare: python tests/resume_kills.py

    python tests/resume_kills.py --kills=30 --variants=plain,dynamic

Every variant is run once undisturbed. Then it is started, killed (SIGKILL to all its processes) and
resumed at random moments until it comes to its end, again and again until there were that many
kills; a run must leave what the undisturbed one left: adapter and merged weights to the bit, lines
of metrics.jsonl without gap or double (times excepted), results of the evaluations, traces and kept
batches to the byte, summary.json but for seconds. Prints a JSON line; exit code 1 where anything
differs. Not part of the test suite, which stops a few times at fixed places.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from fault_runs import SETTINGS, SLOW
from small_runs import numbers, write_rows

# Between checkpoints lie other numbers of updates than a rollout has; see the first one's end.
VARIANTS = {
    "plain": dict(grpo_steps=7, prompts_per_rollout=4, checkpoint_every=3),
    "each": dict(prompts_per_rollout=4, num_iterations=2, checkpoint_every=1),
    "dynamic": dict(grpo_steps=8, prompts_per_rollout=4, checkpoint_every=1, dynamic_sampling=True,
                    length_weight=0.0, reward="resume_kills:odd=1"),
}  # fmt: skip
SAME_BYTES = ("adapter/*.safetensors", "merged/*.safetensors", "eval/*", "traces/*", "bad/*")


def odd(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """A reward that differs within about half of all groups."""
    return [float(len(text) % 2) for text in completions]


class Runs:
    """Runs of one variant in a folder, on the same data."""

    def __init__(self, folder: Path, variant: str):
        self.folder = folder
        folder.mkdir()
        write_rows(folder)
        settings = SETTINGS | VARIANTS[variant] | {
            "train_data": folder / "train.jsonl", "eval_data": folder / "eval.jsonl",
            "eval_limit": 6,
        }  # fmt: skip
        self.given = [f"--{name}={value}" for name, value in settings.items()]
        self.environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "WANDB_MODE": "disabled",
            "PYTHONPATH": f"{Path(__file__).parents[1]}{os.pathsep}{Path(__file__).parent}",
        }  # fmt: skip

    def start(self, out: Path) -> subprocess.Popen:
        """Start a run, or go on with one that has begun, in a process group of its own."""
        begun = (out / "config.json").exists()
        command = [sys.executable, "-m", "gemma_cot.train", f"--output_dir={out}"]
        with open(f"{out}.output", "ab") as output:
            return subprocess.Popen(
                command + (["--resume"] if begun else self.given), stdout=output,
                stderr=subprocess.STDOUT, env=self.environment, start_new_session=True,
            )  # fmt: skip

    def undisturbed(self) -> tuple[Path, float]:
        """Return a run that nobody disturbs, and the seconds that it takes (compiled already)."""
        for name in ("first", "whole"):
            began, out = time.monotonic(), self.folder / name
            assert self.start(out).wait(SLOW) == 0, Path(f"{out}.output").read_text()[-2000:]
        return out, time.monotonic() - began

    def killed(self, out: Path, longest: float, rng: random.Random) -> tuple[int, int]:
        """Kill a run until it has ended; return (kills, how it ended at last)."""
        kills = 0
        while True:
            process = self.start(out)
            try:
                return kills, process.wait(rng.uniform(0, longest))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                kills += 1


def differences(whole: Path, out: Path) -> list[str]:
    """Return what a run left otherwise than the undisturbed one."""
    found = []
    for pattern in SAME_BYTES:
        names = {p.relative_to(run).as_posix() for run in (whole, out) for p in run.glob(pattern)}
        for name in sorted(names):
            files = (whole / name, out / name)
            if not all(file.exists() for file in files):
                found.append(f"{name} is there once")
            elif files[0].read_bytes() != files[1].read_bytes():
                found.append(f"{name} differs")
    lines = [numbers(run / "metrics.jsonl") for run in (whole, out)]
    if lines[0] != lines[1]:
        steps = [[(row["stage"], row["step"]) for row in rows] for rows in lines]
        found.append("metrics.jsonl " + ("has other values" if steps[0] == steps[1] else
                                         f"has the steps {steps[1]}"))  # fmt: skip
    summaries = [json.loads((run / "summary.json").read_text()) for run in (whole, out)]
    names = (summaries[0].keys() | summaries[1].keys()) - {"seconds"}
    found += [f"summary.json differs in {name}" for name in sorted(names)
              if summaries[0].get(name) != summaries[1].get(name)]  # fmt: skip
    return found


def main() -> int:
    """Kill, resume, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=34, help="of every variant, at least")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began, result = random.Random(args.seed), time.monotonic(), {}
    with tempfile.TemporaryDirectory() as name:
        for variant in args.variants.split(","):
            runs = Runs(Path(name) / variant, variant)
            whole, longest = runs.undisturbed()
            found = differences(runs.folder / "first", whole)
            tried = ended = lost = 0
            while tried < args.kills:
                out, start = runs.folder / f"killed{ended}", time.monotonic()
                kills, code = runs.killed(out, longest, rng)
                if not kills:  # the machine is less busy by now
                    longest = min(longest, time.monotonic() - start)
                bad = differences(whole, out) if code == 0 else [
                    f"exit code {code}: " + Path(f"{out}.output").read_text()[-500:]
                ]  # fmt: skip
                tried, ended, lost = tried + kills, ended + 1, lost + kills * bool(bad)
                found += bad
                print(f"{variant}: {kills} kills, {bad or 'the same'}", file=sys.stderr, flush=True)
            result[variant] = {
                "faults_tried": tried, "survived": tried - lost, "lost": lost, "runs": ended,
                "differences": found,
            }  # fmt: skip
    print(json.dumps(result | {"seconds": round(time.monotonic() - began)}))
    return int(any(result[variant]["differences"] for variant in result))


if __name__ == "__main__":
    sys.exit(main())
