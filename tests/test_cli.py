"""What a command makes of errors: one line and exit code 2 for what its user can change."""

import errno

import pytest

from gemma_cot import cli
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
