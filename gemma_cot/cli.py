"""What every command line shares: one clear line and exit code 2 for bad input, quiet logs."""

import errno
import sys
from collections.abc import Callable

from absl import app, flags, logging

from gemma_cot.grpo.reward import RewardError


def run(main: Callable[[], None]) -> None:
    """Parse the flags, run `main`, and end the process.

    Exit code 2 and one line on stderr for bad flags, for any ValueError (the error of bad input
    everywhere in this package; RewardError is one), and where the disk is full or a file may not be
    written; other exceptions are bugs and show a traceback.
    """
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


def _parse(argv: list[str]) -> list[str]:
    """Parse flags; unknown or malformed ones end the process before anything else happens."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        _refuse(f"{error}; --helpfull lists every flag")


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
    logging.set_verbosity(logging.ERROR)  # JAX and orbax log through absl
    if argv[1:]:
        _refuse(f"arguments must be --flags, got {argv[1:]}; --helpfull lists every flag")
    try:
        main()
    except (ValueError, RewardError) as error:
        if type(error) not in (ValueError, RewardError):
            raise  # a subclass that a library raised: a bug, not bad input
        _refuse(str(error))
    except OSError as error:
        if error.errno not in DISK:
            raise
        _refuse(
            f"{error.filename or 'the disk'}: must be writable and have room, got "
            f"{error.strerror}; free space or choose another place"
        )


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
