"""Break a small run in every way we know, let it go on, and compare: python tests/faults.py

    python tests/faults.py                       # all of them, on Linux; some need root
    python tests/faults.py --only=sigterm,full   # those whose names hold one of these words

Every fault strikes a run of `gemma_cot.train`, which then goes on (`--resume`) to the end. Lost are
the steps of metrics.jsonl that are missing or have another value than in a run that nobody
disturbed, evaluated rows that differ, and adapter, weights and traces that are not the same files.
Prints a line a fault and one JSON line: faults tried, survived, data lost (must be 0), skipped and
why; exit code 1 where one was not survived. Not part of the test suite, which has the fast ones.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
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


class Skipped(Exception):
    """This machine cannot do it."""


class Faults:
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


def newest(out: Path) -> Path:
    """Return the folder of the latest checkpoint."""
    return out / "checkpoints" / str(checkpoint.all_steps(out / "checkpoints")[-1])


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint that hold something."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


def flip(path: Path, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@contextmanager
def mounted(folder: Path, size: str):
    """Mount a small file system in memory on a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise Skipped(f"mount: {error.strerror}") from None
    if done.returncode:
        raise Skipped(f"mount: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


# ---- the faults: each returns the run that has come to its end ----------------------------------


def damaged(faults: Faults, name: str, harm: Callable[[Path], None]) -> Path:
    """Harm the newest checkpoint of a stopped run and go on: it is named, the one before taken."""
    out = faults.copy(name.replace(" ", "_"))
    folder = newest(out)
    harm(folder)
    text = faults.finish(out, faults.resume(out))
    assert f"{folder.name} is broken and passed over: " in text, text[-2000:]
    return out


def truncated_checkpoint(faults: Faults) -> Path:
    """The largest file of the newest checkpoint is cut in half."""

    def cut(folder: Path) -> None:
        path = max(files_of(folder), key=lambda path: path.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    return damaged(faults, "truncated checkpoint", cut)


def flipped_bit(faults: Faults) -> Path:
    """One bit in the middle of its largest file is another."""

    def flip_one(folder: Path) -> None:
        path = max(files_of(folder), key=lambda path: path.stat().st_size)
        flip(path, path.stat().st_size * 4)

    return damaged(faults, "flipped bit", flip_one)


def missing_manifest(faults: Faults) -> Path:
    """Its manifest is gone."""
    return damaged(faults, "missing manifest", lambda f: (f / checkpoint.MANIFEST).unlink())


def bits_of_every_file(faults: Faults) -> None:
    """The first, a middle and the last bit of every file: each flip is found. None is resumed."""
    out = faults.copy("bits_of_every_file")
    folder = newest(out)
    before = checkpoint.all_steps(out / "checkpoints")[-2]
    for path in files_of(folder):
        size = path.stat().st_size
        for bit in (0, 8 * (size // 2) + 2, 8 * size - 1):
            flip(path, bit)
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                step = checkpoint.latest_step(out / "checkpoints")
            assert step == before and len(seen) == 1, (path, bit, step)
            flip(path, bit)
    assert checkpoint.latest_step(out / "checkpoints") == int(folder.name)


def full_disk_under_checkpoints(faults: Faults) -> Path:
    """The checkpoints' disk fills up while the run goes on: it warns, and ends with its adapter."""
    out = faults.folder / "full_checkpoints"
    folder = out / "checkpoints"
    with mounted(folder, "64m"):
        process = faults.start(out)
        faults.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
        fill(folder / "filler")
        text = faults.finish(out, process)
        assert "could not be saved, got No space left on device; the run goes on" in text
        assert checkpoint.latest_step(folder) is not None  # the last good one survives
    return out


def full_disk_under_the_run(faults: Faults) -> Path:
    """The whole run's disk fills up; once there is room again, --resume goes on."""
    out = faults.folder / "full_run"
    kept = faults.folder / "full_run_kept"
    with mounted(out, "256m"):
        process = faults.start(out)
        faults.wait_until(lambda: len(checkpoint.all_steps(out / "checkpoints")) > 1, process)
        fill(out / "filler")
        process.wait(SLOW)
        text = process.output.read_text(errors="replace")
        assert process.returncode in (0, 2) and "No space left on device" in text, text[-2000:]
        assert "/gemma_cot/cli.py" not in text, text[-2000:]  # a traceback of ours
        (out / "filler").unlink()
        faults.finish(out, faults.resume(out))
        shutil.copytree(out, kept)
    return kept


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    try:
        with open(path, "wb", buffering=0) as file:
            while True:
                file.write(bytes(2**16))
    except OSError:
        pass


def read_only_checkpoints(faults: Faults) -> Path:
    """The checkpoints' file system becomes read-only while the run goes on."""
    out = faults.folder / "read_only"
    folder = out / "checkpoints"
    with mounted(folder, "64m"):
        process = faults.start(out)
        faults.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
        while subprocess.run(["mount", "-o", "remount,ro", str(folder)]).returncode:
            time.sleep(0.05)  # busy: a file is being written
        text = faults.finish(out, process)
        assert "got Read-only file system; the run goes on, the last good checkpoint" in text
        assert checkpoint.latest_step(folder) is not None
    return out


def no_permission(faults: Faults) -> Path:
    """The checkpoints' folder takes no files any more: chattr +i for root, else its mode."""
    out = faults.folder / "no_permission"
    folder = out / "checkpoints"
    process = faults.start(out)
    faults.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
    root = os.geteuid() == 0
    lock, unlock = (["chattr", "+i"], ["chattr", "-i"]) if root else (["chmod", "500"],
                                                                      ["chmod", "700"])  # fmt: skip
    if subprocess.run([*lock, str(folder)], capture_output=True).returncode:
        faults.stop(process)
        raise Skipped(f"{lock[0]}: this file system does not do it")
    try:
        text = faults.finish(out, process)
    finally:
        subprocess.run([*unlock, str(folder)], check=True)
    reason = "Operation not permitted" if root else "Permission denied"
    assert f"got {reason}; the run goes on, the last good checkpoint" in text, text[-2000:]
    with warnings.catch_warnings():  # the save that the lock met half-way is no checkpoint
        warnings.simplefilter("ignore")
        assert checkpoint.latest_step(folder) is not None
    return out


def sigterm_in_every_phase(faults: Faults) -> Path:
    """One run is stopped once in each phase and goes on by the command that it prints."""
    out = faults.folder / "sigterm"
    process = faults.start(out)
    for phase in PHASES:
        faults.wait_for(out, phase, process)
        text = faults.stop(process)
        if "Go on with: python -m gemma_cot.train " not in text:
            assert phase == "export" and (out / "summary.json").exists(), text[-2000:]
        else:
            command = text.partition("Go on with: python -m gemma_cot.train ")[2].splitlines()[0]
            process = faults.launch(*shlex.split(command))
    faults.finish(out, process)
    return out


def preemption_of_one_host(faults: Faults) -> None:
    """SIGTERM to the second of two processes: both end with 0 after the same step, and go on."""
    whole, out = faults.folder / "pair_whole", faults.folder / "pair"
    for process in faults.pair(faults.start, whole):
        faults.finish(whole, process)
    pair = faults.pair(faults.start, out)
    faults.wait_for(out, "GRPO", pair[0])
    pair[1].send_signal(signal.SIGTERM)
    texts = [faults.ended(process) for process in pair]
    assert "stopped by a preemption notice" in texts[0], texts[0][-2000:]  # 0 speaks for both
    assert not (out / "summary.json").exists()
    for process in faults.pair(faults.resume, out):
        faults.finish(out, process)
    lost = faults.lost(out, whole)
    assert lost == 0, f"{lost} numbers or files are lost"


def sigint_twice(faults: Faults) -> Path:
    """Ctrl-C, and again before the step has ended: the run ends at once, and resumes."""
    out = faults.folder / "sigint"
    process = faults.start(out)
    faults.wait_for(out, "evaluating SFT", process)
    process.send_signal(signal.SIGINT)
    faults.wait_until(lambda: "again to end at once" in process.output.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.wait(SLOW)
    assert process.returncode in (-signal.SIGINT, 0), process.returncode
    faults.finish(out, faults.resume(out))
    return out


def kill_in_a_save(faults: Faults) -> Path:
    """kill -9 while a checkpoint is being written, three times over."""
    out, folder = faults.folder / "kill", faults.folder / "kill" / "checkpoints"
    process, killed = faults.start(out), 0
    while killed < 3:
        faults.wait_until(lambda: any(folder.glob(f"*{checkpoint.SAVING}*")), process)
        process.kill()
        process.wait()
        killed += 1
        process = faults.resume(out)  # what the kill left goes with the next save
        faults.wait_until(lambda: not any(folder.glob(f"*{checkpoint.SAVING}*")), process)
    faults.finish(out, process)
    return out


def random_kills(faults: Faults) -> None:
    """The random kills of tests/resume_kills.py."""
    path = Path(__file__).with_name("resume_kills.py")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]


FAULTS = (
    truncated_checkpoint, flipped_bit, missing_manifest, bits_of_every_file,
    full_disk_under_checkpoints, full_disk_under_the_run, read_only_checkpoints, no_permission,
    sigterm_in_every_phase, preemption_of_one_host, sigint_twice, kill_in_a_save, random_kills,
)  # fmt: skip


def main() -> int:
    """Try every fault."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="words of faults' names, by comma")
    parser.add_argument("--keep", default="", help="a folder for the runs; default: none is kept")
    args = parser.parse_args()
    words = args.only.split(",")
    chosen = [fault for fault in FAULTS if any(word in fault.__name__ for word in words)]
    if not chosen:
        parser.error(f"--only: no fault's name holds one of {words}")
    began, survived, lost, skipped = time.monotonic(), 0, 0, {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.keep or temporary)
        folder.mkdir(exist_ok=True)
        faults = Faults(folder)
        for fault in chosen:
            name, start = fault.__name__.replace("_", " "), time.monotonic()
            try:
                out = fault(faults)
                missing = faults.lost(out) if out else 0
                verdict = f"survived, {missing} lost"
                survived, lost = survived + 1, lost + missing
            except Skipped as reason:
                skipped[name] = str(reason)
                verdict = f"skipped: {reason}"
            except (AssertionError, OSError, ValueError, subprocess.SubprocessError) as error:
                verdict = f"NOT SURVIVED: {error}"
            print(f"{name}: {verdict} ({time.monotonic() - start:.0f} s)", flush=True)
    tried = len(chosen) - len(skipped)
    line = {"faults": tried, "survived": survived, "data_lost": lost, "skipped": skipped,
            "seconds": round(time.monotonic() - began)}  # fmt: skip
    print(json.dumps(line))
    return int(survived < tried or lost > 0)


if __name__ == "__main__":
    sys.exit(main())
