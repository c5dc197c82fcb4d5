"""What repeats are found with, on disk: digests of rows, and their 8-grams.

Memory holds 8 bytes a row, so that a million rows need hardly more than ten thousand. Called by the
pipeline, which gives a folder and deletes it.
"""

import errno
import os
import sqlite3
from array import array
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np

BLOCK = 1 << 17  # grams read at a time


class Seen:
    """The first place of every digest, in a database of its own."""

    def __init__(self, path: Path):
        self._path = path
        self._db = sqlite3.connect(path, isolation_level=None)
        for pragma in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-16384"):  # 16 MiB
            self._run(f"PRAGMA {pragma}")
        columns = "key BLOB PRIMARY KEY, file TEXT, line INTEGER"
        self._run(f"CREATE TABLE seen({columns}) WITHOUT ROWID")
        self._run("BEGIN")

    def _run(self, statement: str, values: tuple = ()) -> sqlite3.Cursor:
        """Execute a statement. Raises OSError when the disk is full."""
        try:
            return self._db.execute(statement, values)
        except sqlite3.OperationalError as error:
            raise OSError(errno.ENOSPC, str(error), str(self._path)) from error

    def first(self, key: bytes, place: tuple[str, int]) -> tuple[str, int] | None:
        """Return where `key` was first seen; None, and remember `place`, where it was not.

        Raises OSError when the disk is full."""
        if self._run("INSERT OR IGNORE INTO seen VALUES (?, ?, ?)", (key, *place)).rowcount:
            return None
        return self._run("SELECT file, line FROM seen WHERE key = ?", (key,)).fetchone()

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()


class GramFile:
    """A sequence of arrays of 8-gram hashes, one a row, that only grows. Rows of other domains
    share no gram."""

    def __init__(self, path: Path):
        self._file = open(path, "w+b")  # noqa: SIM115 - closed by `close`
        self._ends = array("q", [0])  # in grams
        self._salts: dict[str, np.uint64] = {}

    def append(self, domain: str, grams: np.ndarray) -> None:
        """Add a row."""
        if domain not in self._salts:
            digest = blake2b(domain.encode(), digest_size=8).digest()
            self._salts[domain] = np.uint64(int.from_bytes(digest, "little"))
        self._file.write((grams ^ self._salts[domain]).tobytes())
        self._ends.append(self._ends[-1] + len(grams))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        first, end = self._ends[row], self._ends[row + 1]
        return np.frombuffer(os.pread(self._file.fileno(), 8 * (end - first), 8 * first), np.uint64)

    def blocks(self) -> Iterator[np.ndarray]:
        """Yield all grams, many at a time; to be called when every row is there."""
        self._file.flush()
        for first in range(0, self._ends[-1], BLOCK):
            yield np.frombuffer(os.pread(self._file.fileno(), 8 * BLOCK, 8 * first), np.uint64)

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
