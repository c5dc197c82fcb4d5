"""What every command line shares: one clear line and exit code 2 for bad input, quiet logs."""

import sys
from collections.abc import Callable

from absl import app, flags, logging

from gemma_cot.grpo.reward import RewardError


def run(main: Callable[[], None]) -> None:
    """Parse the flags, run `main`, and end the process.

    Exit code 2 and one line on stderr for bad flags and for any ValueError (the error of bad input
    everywhere in this package; RewardError is one); other exceptions are bugs and show a traceback.
    """
    app.run(lambda argv: _guarded(main, argv), flags_parser=_parse)


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


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
