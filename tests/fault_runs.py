"""Small runs of `gemma_cot.train` in processes of their own, to be broken; what each has lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from small_runs import free_port, numbers, write_rows

from gemma_cot import checkpoint

SETTINGS = dict(  # the temperature and the length penalty make every group teach something
    max_completion_tokens=40, lora_rank=4, sft_steps=6, sft_batch=4, grpo_steps=6,
    num_generations=4, prompts_per_rollout=2, mini_batch=2, micro_batch=2, temperature=2.0,
    length_weight=1.0, length_cache=40, eval_batch=1, eval_limit=8, checkpoint_every=1,
    keep_checkpoints=3, sample_every=0, trace_every=1,
)  # fmt: skip
PHASES = {  # file whose appearance says that a phase has begun, and what it must hold
    "loading": ("config.json", ""),
    "evaluating base": ("eval/base.protocol.json", ""),
    "SFT": ("metrics.jsonl", '"stage": "sft"'),
    "evaluating SFT": ("eval/sft.protocol.json", ""),
    "GRPO": ("metrics.jsonl", '"stage": "grpo"'),
    "evaluating GRPO": ("eval/grpo.protocol.json", ""),
    "export": ("adapter/adapter_config.json", ""),
}
SLOW = 1800.0  # seconds that nothing here may take


class SmallRuns:
    """A folder of runs with one set of data, and the run that nobody disturbed."""

    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        write_rows(folder)
        self.environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
            "JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "WANDB_MODE": "disabled",
        }  # fmt: skip
        self.whole, self.stopped = folder / "whole", folder / "stopped"
        if not (self.whole / "summary.json").exists():
            self.finish(self.whole, self.start(self.whole))

    def start(self, out: Path, *more: str) -> subprocess.Popen:
        """Start a run into `out`."""
        settings = SETTINGS | {"output_dir": out, "train_data": self.folder / "train.jsonl",
                               "eval_data": self.folder / "eval.jsonl"}  # fmt: skip
        return self.launch(*(f"--{name}={value}" for name, value in settings.items()), *more)

    def resume(self, out: Path, *more: str) -> subprocess.Popen:
        """Start the command that a stopped run prints."""
        return self.launch("--resume", f"--output_dir={out}", *more)

    def pair(self, begin: Callable, out: Path) -> list[subprocess.Popen]:
        """Start a run, or go on with one, as two processes of a device each."""
        both = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
        return [begin(out, *both, f"--process_id={i}") for i in range(2)]

    def launch(self, *flags: str) -> subprocess.Popen:
        """Start `gemma_cot.train` as a process whose outputs go into one file."""
        self.runs += 1
        with open(self.folder / f"output{self.runs}", "wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "gemma_cot.train", *flags], stdout=output,
                stderr=subprocess.STDOUT, env=self.environment,
                cwd=Path(checkpoint.__file__).parents[1],
            )  # fmt: skip
        process.output = self.folder / f"output{self.runs}"
        return process

    def ended(self, process: subprocess.Popen) -> str:
        """Wait for the end of a process and return its output; its exit code must be 0."""
        process.wait(SLOW)
        text = process.output.read_text(errors="replace")
        assert process.returncode == 0, f"exit code {process.returncode}\n{text[-2000:]}"
        return text

    def finish(self, out: Path, process: subprocess.Popen) -> str:
        """Wait for the end of a process and return its output; the run must have ended too."""
        text = self.ended(process)
        assert (out / "summary.json").exists(), text[-2000:]
        return text

    def stop(self, process: subprocess.Popen) -> str:
        """Ask a run to stop; it must exit with 0 and say how to go on, or have ended just so."""
        process.send_signal(signal.SIGTERM)
        return self.ended(process)

    def wait_until(self, holds: Callable[[], bool], process: subprocess.Popen) -> None:
        """Wait for something to be seen on the disk while a run goes on."""
        deadline = time.monotonic() + SLOW
        while not holds():
            assert process.poll() is None, process.output.read_text(errors="replace")[-2000:]
            assert time.monotonic() < deadline, "nothing happened"
            time.sleep(0.002)

    def wait_for(self, out: Path, phase: str, process: subprocess.Popen) -> None:
        """Wait until a phase of PHASES has begun."""
        name, words = PHASES[phase]

        def has_begun() -> bool:
            path = out / name
            return path.exists() and (not words or words in path.read_text())

        self.wait_until(has_begun, process)

    def copy(self, name: str) -> Path:
        """Return a copy of a run that was stopped in GRPO."""
        if not self.stopped.exists():
            process = self.start(self.stopped)
            self.wait_for(self.stopped, "GRPO", process)
            self.stop(process)
        return Path(shutil.copytree(self.stopped, self.folder / name))

    def lost(self, out: Path, whole: Path | None = None) -> int:
        """Return how much of the undisturbed run is missing from `out` or another there."""
        count, whole = 0, whole or self.whole
        for name in ("metrics.jsonl", "eval/base.jsonl", "eval/sft.jsonl", "eval/grpo.jsonl"):
            wanted = numbers(whole / name)
            got = numbers(out / name) if (out / name).exists() else []
            assert wanted, f"{name} of the undisturbed run is empty"
            count += sum(1 for i, row in enumerate(wanted) if got[i : i + 1] != [row])
            count += max(0, len(got) - len(wanted))
        for pattern in ("adapter/*.safetensors", "merged/*.safetensors", "traces/*"):
            names = sorted(path.relative_to(whole) for path in whole.glob(pattern))
            assert names, f"the undisturbed run has no {pattern}"
            for name in names:
                same = (out / name).exists()
                same = same and (out / name).read_bytes() == (whole / name).read_bytes()
                count += not same
        return count
