"""The journal: every answer that was received and may have been paid for, one JSON line each.

Append-only: an answer is written the moment it is there, which a kill of the process cannot undo,
and on the disk before anything is made of it, which a power cut cannot. A torn last line is dropped
at the next start. One process at a time holds the journal. Rows and rejects are derived from it and
never the other way round.
"""

import asyncio
import fcntl
import json
import os
from collections import Counter
from pathlib import Path


class Stop(Exception):
    """The run cannot go on; the message says why and what to change."""


def read_records(path: str | Path) -> tuple[list[dict], int]:
    """Return (records, bytes up to the end of the last whole line); nothing where no file is.

    Raises ValueError for a line that is no record.
    """
    content = Path(path).read_bytes() if Path(path).exists() else b""
    whole = content.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(content[:whole].split(b"\n")[:-1], 1):
        try:
            record = json.loads(line)
            if missing := {"key", "fault", "content", "usage", "usd"} - set(record):
                raise KeyError(missing)
            records.append(record)
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{path}:{number}: a line must be a record of this command, got {line[:60]!r}; "
                "delete the line (its answer will be asked for again)"
            ) from None
    return records, whole


class Journal:
    """The open journal of an output folder. A context manager; `close` lets the next run in.

    answers: request key -> record of an answer. useless: request key -> whole replies that were
    none. records: of both. usd: what all of them cost.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise ValueError(
                f"--output: must be a folder to write to, got {self._path.parent} "
                f"({error.strerror}); name another one"
            ) from None
        self.answers: dict[str, dict] = {}
        self.useless: Counter = Counter()
        self.records: list[dict] = []
        self.usd = 0.0

    def lock(self, wait: bool) -> bool:
        """Take the journal for this process alone; without `wait`, return False if another has it.

        The system gives it back when the process ends, however that comes about.
        """
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True

    def load(self) -> None:
        """Read what is there and cut a torn last line off. Raises ValueError for a broken line."""
        records, whole = read_records(self._path)
        os.ftruncate(self._fd, whole)
        for record in records:
            self._keep(record)

    async def append(self, record: dict) -> None:
        """Write a record at once and wait until it is synced, while other answers come in.

        Raises Stop when the disk does not take it.
        """
        line = json.dumps(record).encode() + b"\n"
        end = os.fstat(self._fd).st_size
        try:
            if os.write(self._fd, line) < len(line):
                os.ftruncate(self._fd, end)
                raise OSError(0, "No space left for a whole line")
            self._keep(record)
            await asyncio.to_thread(os.fsync, self._fd)
        except OSError as error:
            raise Stop(
                f"{self._path}: answers must be written as they come, got {error.strerror}; "
                "make room and run the same command again"
            ) from None

    def _keep(self, record: dict) -> None:
        self.usd += record["usd"]
        if record["fault"] is None:
            self.answers[record["key"]] = record
        else:
            self.useless[record["key"]] += 1
        self.records.append(record)

    def close(self) -> None:
        """Let go of the journal."""
        os.close(self._fd)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_) -> None:
        self.close()
