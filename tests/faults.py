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

from fault_runs import PHASES, SLOW, SmallRuns

from gemma_cot import checkpoint


class Skipped(Exception):
    """This machine cannot do it."""


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


def damaged(runs: SmallRuns, name: str, harm: Callable[[Path], None]) -> Path:
    """Harm the newest checkpoint of a stopped run and go on: it is named, the one before taken."""
    out = runs.copy(name.replace(" ", "_"))
    folder = newest(out)
    harm(folder)
    text = runs.finish(out, runs.resume(out))
    assert f"{folder.name} is broken and passed over: " in text, text[-2000:]
    return out


def truncated_checkpoint(runs: SmallRuns) -> Path:
    """The largest file of the newest checkpoint is cut in half."""

    def cut(folder: Path) -> None:
        path = max(files_of(folder), key=lambda path: path.stat().st_size)
        os.truncate(path, path.stat().st_size // 2)

    return damaged(runs, "truncated checkpoint", cut)


def flipped_bit(runs: SmallRuns) -> Path:
    """One bit in the middle of its largest file is another."""

    def flip_one(folder: Path) -> None:
        path = max(files_of(folder), key=lambda path: path.stat().st_size)
        flip(path, path.stat().st_size * 4)

    return damaged(runs, "flipped bit", flip_one)


def missing_manifest(runs: SmallRuns) -> Path:
    """Its manifest is gone."""
    return damaged(runs, "missing manifest", lambda f: (f / checkpoint.MANIFEST).unlink())


def bits_of_every_file(runs: SmallRuns) -> None:
    """The first, a middle and the last bit of every file: each flip is found. None is resumed."""
    out = runs.copy("bits_of_every_file")
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


def full_disk_under_checkpoints(runs: SmallRuns) -> Path:
    """The checkpoints' disk fills up while the run goes on: it warns, and ends with its adapter."""
    out = runs.folder / "full_checkpoints"
    folder = out / "checkpoints"
    with mounted(folder, "64m"):
        process = runs.start(out)
        runs.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
        fill(folder / "filler")
        text = runs.finish(out, process)
        assert "could not be saved, got No space left on device; the run goes on" in text
        assert checkpoint.latest_step(folder) is not None  # the last good one survives
    return out


def full_disk_under_the_run(runs: SmallRuns) -> Path:
    """The whole run's disk fills up; once there is room again, --resume goes on."""
    out = runs.folder / "full_run"
    kept = runs.folder / "full_run_kept"
    with mounted(out, "256m"):
        process = runs.start(out)
        runs.wait_until(lambda: len(checkpoint.all_steps(out / "checkpoints")) > 1, process)
        fill(out / "filler")
        process.wait(SLOW)
        text = process.output.read_text(errors="replace")
        assert process.returncode in (0, 2) and "No space left on device" in text, text[-2000:]
        assert "/gemma_cot/cli.py" not in text, text[-2000:]  # a traceback of ours
        (out / "filler").unlink()
        runs.finish(out, runs.resume(out))
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


def read_only_checkpoints(runs: SmallRuns) -> Path:
    """The checkpoints' file system becomes read-only while the run goes on."""
    out = runs.folder / "read_only"
    folder = out / "checkpoints"
    with mounted(folder, "64m"):
        process = runs.start(out)
        runs.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
        while subprocess.run(["mount", "-o", "remount,ro", str(folder)]).returncode:
            time.sleep(0.05)  # busy: a file is being written
        text = runs.finish(out, process)
        assert "got Read-only file system; the run goes on, the last good checkpoint" in text
        assert checkpoint.latest_step(folder) is not None
    return out


def no_permission(runs: SmallRuns) -> Path:
    """The checkpoints' folder takes no files any more: chattr +i for root, else its mode."""
    out = runs.folder / "no_permission"
    folder = out / "checkpoints"
    process = runs.start(out)
    runs.wait_until(lambda: len(checkpoint.all_steps(folder)) > 0, process)
    root = os.geteuid() == 0
    lock, unlock = (["chattr", "+i"], ["chattr", "-i"]) if root else (["chmod", "500"],
                                                                      ["chmod", "700"])  # fmt: skip
    if subprocess.run([*lock, str(folder)], capture_output=True).returncode:
        runs.stop(process)
        raise Skipped(f"{lock[0]}: this file system does not do it")
    try:
        text = runs.finish(out, process)
    finally:
        subprocess.run([*unlock, str(folder)], check=True)
    reason = "Operation not permitted" if root else "Permission denied"
    assert f"got {reason}; the run goes on, the last good checkpoint" in text, text[-2000:]
    with warnings.catch_warnings():  # the save that the lock met half-way is no checkpoint
        warnings.simplefilter("ignore")
        assert checkpoint.latest_step(folder) is not None
    return out


def sigterm_in_every_phase(runs: SmallRuns) -> Path:
    """One run is stopped once in each phase and goes on by the command that it prints."""
    out = runs.folder / "sigterm"
    process = runs.start(out)
    for phase in PHASES:
        runs.wait_for(out, phase, process)
        text = runs.stop(process)
        if "Go on with: python -m gemma_cot.train " not in text:
            assert phase == "export" and (out / "summary.json").exists(), text[-2000:]
        else:
            command = text.partition("Go on with: python -m gemma_cot.train ")[2].splitlines()[0]
            process = runs.launch(*shlex.split(command))
    runs.finish(out, process)
    return out


def preemption_of_one_host(runs: SmallRuns) -> None:
    """SIGTERM to the second of two processes: both end with 0 after the same step, and go on."""
    whole, out = runs.folder / "pair_whole", runs.folder / "pair"
    for process in runs.pair(runs.start, whole):
        runs.finish(whole, process)
    pair = runs.pair(runs.start, out)
    runs.wait_for(out, "GRPO", pair[0])
    pair[1].send_signal(signal.SIGTERM)
    texts = [runs.ended(process) for process in pair]
    assert "stopped by a preemption notice" in texts[0], texts[0][-2000:]  # 0 speaks for both
    assert not (out / "summary.json").exists()
    for process in runs.pair(runs.resume, out):
        runs.finish(out, process)
    lost = runs.lost(out, whole)
    assert lost == 0, f"{lost} numbers or files are lost"


def sigint_twice(runs: SmallRuns) -> Path:
    """Ctrl-C, and again before the step has ended: the run ends at once, and resumes."""
    out = runs.folder / "sigint"
    process = runs.start(out)
    runs.wait_for(out, "evaluating SFT", process)
    process.send_signal(signal.SIGINT)
    runs.wait_until(lambda: "again to end at once" in process.output.read_text(), process)
    process.send_signal(signal.SIGINT)
    process.wait(SLOW)
    assert process.returncode in (-signal.SIGINT, 0), process.returncode
    runs.finish(out, runs.resume(out))
    return out


def kill_in_a_save(runs: SmallRuns) -> Path:
    """kill -9 while a checkpoint is being written, three times over."""
    out, folder = runs.folder / "kill", runs.folder / "kill" / "checkpoints"
    process, killed = runs.start(out), 0
    while killed < 3:
        runs.wait_until(lambda: any(folder.glob(f"*{checkpoint.SAVING}*")), process)
        process.kill()
        process.wait()
        killed += 1
        process = runs.resume(out)  # what the kill left goes with the next save
        runs.wait_until(lambda: not any(folder.glob(f"*{checkpoint.SAVING}*")), process)
    runs.finish(out, process)
    return out


def random_kills(runs: SmallRuns) -> None:
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
        runs = SmallRuns(folder)
        for fault in chosen:
            name, start = fault.__name__.replace("_", " "), time.monotonic()
            try:
                out = fault(runs)
                missing = runs.lost(out) if out else 0
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
