"""What a command makes of errors: one line and exit code 2 for what its user can change. And that
it gives memory back after compiling."""

import ctypes
import errno
import re
import subprocess
import sys
from dataclasses import fields

import jax
import jax.numpy as jnp
import pytest

from gemma_cot import cli
from gemma_cot.config import TrainConfig
from gemma_cot.grpo.reward import RewardError


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("--x: must be 1,\n got 2; set it"), "error: --x: must be 1, got 2; set it\n"),
        (RewardError("reward f: raised"), "error: reward f: raised\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "out/train.jsonl"),
            "error: out/train.jsonl: must be writable and have room, got No space left on device; "
            "free space or choose another place\n",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "error: out: must be writable"),
        (NotADirectoryError(errno.ENOTDIR, "Not a folder", "f/x"), "error: f/x: must be writable"),
    ],
)
def test_what_a_user_can_change_is_one_line(error, line, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as ended:
        cli._guarded(main, ["command"])
    assert ended.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [KeyError("x"), UnicodeDecodeError("utf-8", b"", 0, 1, "x"), OSError(errno.EPIPE, "x")]
)
def test_bugs_show_a_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli._guarded(main, ["command"])


@pytest.mark.parametrize(("told", "line"), [([], ""), (["- 3 rows done"], " - 3 rows done")])
def test_ctrl_c_is_one_line_and_exit_code_130(told, line):
    code = f"from gemma_cot import cli\ndef main():\n    raise KeyboardInterrupt(*{told})\n"
    code += "print('so far')\ncli._guarded(main, ['command'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (130, "so far\n")
    assert done.stderr == f"\nstopped by SIGINT{line}\n"


def test_a_flag_that_is_no_text_is_refused(capsys):
    with pytest.raises(SystemExit) as ended:
        cli._parse(["command", "--preset=\udcff"])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(r"error: flags must be text in UTF-8, got '\udcff'")


def test_help_shows_every_flag_and_what_a_preset_makes_of_it():
    command = [sys.executable, "-m", "gemma_cot.train", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True).stdout
    missing = [item.name for item in fields(TrainConfig)
               if not re.search(rf"^  --(\[no\])?{item.name}:", shown, re.MULTILINE)]  # fmt: skip
    assert missing == [] and "--preset" in shown
    assert re.search(r"--learning_rate: [^-]*\(tiny:\s+0.001\)", shown)


def test_a_reader_that_goes_away_ends_no_command(tmp_path):
    code = """if True:
        from pathlib import Path
        from gemma_cot import cli
        def main():
            for row in range(20_000):
                print("row", row, flush=row % 2 == 0)
            Path("out").write_text("all rows")
        cli.run(main)
    """
    piped = '("$0" -c "$1"; echo $? >&2) | head -1'
    done = subprocess.run(
        ["sh", "-c", piped, sys.executable, code], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("row 0\n", "0\n")
    assert (tmp_path / "out").read_text() == "all rows"


def test_jax_tells_of_each_program_that_it_compiled():
    seen = []

    def listen(event: str, seconds: float, **_) -> None:
        seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    jax.monitoring.unregister_event_duration_listener(listen)
    assert cli.COMPILED in seen


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, frees by glibc")
def test_after_compiling_for_long_freed_memory_is_the_systems_again():
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    size, count = 2**16, 2000  # 125 MiB of blocks that glibc keeps: too small to be mapped
    blocks = [libc.malloc(size) for _ in range(count)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks[:-1]:  # the last holds the heap up
        libc.free(block)
    cli._guarded(lambda: None, ["command"])
    kept = resident()
    jax.monitoring.record_event_duration_secs(cli.COMPILED, 0.1)
    assert resident() > kept - 2**20
    jax.monitoring.record_event_duration_secs(cli.COMPILED, 1.0)
    assert resident() < kept - 100 * 2**20
    libc.free(blocks[-1])


def resident() -> int:
    """Return the resident bytes of this process."""
    with open("/proc/self/status") as file:
        (line,) = (line for line in file if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
