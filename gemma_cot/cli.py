"""What every command line shares: one clear line and exit code 2 for bad input, quiet logs, memory
given back after compiling."""

import ctypes
import errno
import logging as pylogging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout

import jax
from absl import app, flags, logging

from gemma_cot import hosts
from gemma_cot.grpo.reward import RewardError

COMPILED = "/jax/core/compile/backend_compile_duration"  # what JAX calls the event


def run(main: Callable[[], None]) -> None:
    """Parse the flags, run `main`, and end the process.

    Exit code 2 and one line on stderr for bad flags, for any ValueError (the error of bad input
    everywhere in this package; RewardError is one), and where the disk is full or a file may not be
    written; 130 and one line for Ctrl-C, where the command has no end of its own for it; other
    exceptions are bugs and show a traceback. A warning is one line on stderr.
    """
    app.run(lambda argv: _crashing(main, argv), flags_parser=_parse)


class Lasting:
    """A stream whose reader may go away (`| head`, a closed terminal): what is written from then on
    goes nowhere, and the command goes on."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does; return the number of characters."""
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flush as the stream does."""
        self._try(self._stream.flush)

    def _try(self, work: Callable, *args) -> None:
        try:
            work(*args)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def _parse(argv: list[str]) -> list[str]:
    """Parse flags; unknown or malformed ones end the process before anything else happens.

    All flags of this package are the command's own, so that --help shows them.
    """
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        for flag in defined if module.startswith("gemma_cot") else ():
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    try:
        "".join(argv).encode()
        return flags.FLAGS(argv)
    except UnicodeEncodeError as error:
        got = error.object[error.start :]
        _refuse(f"flags must be text in UTF-8, got {got!a:.60}; convert it")
    except flags.Error as error:
        _refuse(f"{error}; --help lists every flag")


def trim_after_compiling() -> None:
    """From now on give back to the system what a compiler has freed, each time it has worked for
    more than half a second, before its program runs.

    glibc keeps it otherwise: on a CPU some 0.3 GiB that then lie under the run's peak. Does nothing
    with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None

    def compiled(event: str, seconds: float, **_) -> None:
        if event == COMPILED and seconds > 0.5:
            trim(0)

    if trim:
        jax.monitoring.register_event_duration_secs_listener(compiled)


def join_hosts(coordinator: str, num_processes: int, process_id: int) -> None:
    """Meet the other processes of a run, if there are any; all but the first then print nothing."""
    if coordinator:
        line = f"process {process_id} of {num_processes}: meeting the others at {coordinator}"
        print(line, file=sys.stderr, flush=True)
    hosts.join(coordinator, num_processes, process_id)
    if hosts.are_several() and not hosts.is_writer():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _crashing(main: Callable[[], None], argv: list[str]) -> None:
    try:
        with redirect_stdout(Lasting(sys.stdout)) as out, redirect_stderr(Lasting(sys.stderr)):
            try:
                _guarded(main, argv)
            finally:
                out.flush()
    except Exception:  # a bug
        if not hosts.are_several():
            raise
        traceback.print_exc()
        hosts.leave(1)


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
    logging.set_verbosity(logging.FATAL)  # orbax logs what it raises through absl
    pylogging.raiseExceptions = False  # a full disk is told once, not by every log that it hits
    warnings.showwarning = _warn
    threading.excepthook = _warn_of_thread
    trim_after_compiling()
    if argv[1:]:
        _refuse(f"arguments must be --flags, got {argv[1:]}; --help lists every flag")
    try:
        main()
    except (ValueError, RewardError) as error:
        if type(error) not in (ValueError, RewardError):
            raise  # a subclass that a library raised: a bug, not bad input
        _refuse(str(error))
    except KeyboardInterrupt as stopped:
        print("\nstopped by SIGINT", *stopped.args, file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)  # threads that compile would crash an orderly exit
    except OSError as error:
        if error.errno not in DISK:
            raise
        _refuse(
            f"{error.filename or 'the disk'}: must be writable and have room, got "
            f"{error.strerror}; free space or choose another place"
        )


def _warn(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"warning: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def _warn_of_thread(args) -> None:
    """Show what ended a thread; of a disk that takes nothing (TensorBoard's writer) one line."""
    if isinstance(args.exc_value, OSError) and args.exc_value.errno in DISK:
        _warn(args.exc_value, None, "", 0)
    else:
        traceback.print_exception(args.exc_value)


def _refuse(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    hosts.leave(2)
