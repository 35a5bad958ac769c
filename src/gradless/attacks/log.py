"""Every answer that was paid for: an attack that is interrupted asks nothing twice.

One SQLite file. An answer is committed to the disk before the attack goes on, and an attack is a function of its options
and of these answers, so beginning it again with the same file repeats it up to where it stopped, without a query.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradless.errors import GradlessError

_SCHEMA = """
CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE calls (
    call INTEGER PRIMARY KEY,
    inputs INTEGER NOT NULL,  -- the sum of the inputs' 64-bit names
    losses BLOB NOT NULL      -- fp32, one an image
) STRICT;
"""


class QueryLog:
    """The answers to an attack's calls of its model, in order.

    Args:
        path: of the file; made where it is missing.
        header: what the attack is, as plain JSON values.

    Raises:
        GradlessError: the file is no such log, or another attack's.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._connection = sqlite3.connect(path, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=FULL")
            if not self._connection.execute("SELECT name FROM sqlite_master").fetchall():
                self._connection.executescript(_SCHEMA)
                entries = [(name, json.dumps(value)) for name, value in header.items()]
                self._connection.executemany("INSERT INTO header VALUES (?, ?)", entries)
            found = {name: json.loads(value) for name, value in self._connection.execute("SELECT name, value FROM header")}
            (self.calls,) = self._connection.execute("SELECT count(*) FROM calls").fetchone()
        except sqlite3.DatabaseError as error:
            raise GradlessError(f"{path} is no log of queries ({error}); choose another output folder.") from error
        for name in {**found, **header}:
            if found.get(name) != header.get(name):
                raise GradlessError(
                    f"{path} is of an attack whose {name} is {found.get(name)!r}, not {header.get(name)!r}; "
                    "resume with what it was begun with, or choose another output folder."
                )

    def answer(self, call: int, inputs: int, count: int) -> Tensor | None:
        """The losses (count,) that call number `call` was answered with, or None where it has not been made.

        Raises:
            GradlessError: it was made with other inputs.
        """
        if call >= self.calls:
            return None
        found, losses = self._connection.execute("SELECT inputs, losses FROM calls WHERE call = ?", (call,)).fetchone()
        if found != inputs or len(losses) != 4 * count:
            raise GradlessError(
                f"call {call} in {self.path} asked for other images; the versions of gradless or torch differ from those "
                "it was begun with: use these, or begin again in another output folder."
            )
        return torch.frombuffer(bytearray(losses), dtype=torch.float32)

    def append(self, inputs: int, losses: Tensor) -> None:
        """Commit the answer to the next call to the disk.

        Raises:
            GradlessError: it could not be written; all before it is safe.
        """
        try:
            row = (self.calls, inputs, losses.float().cpu().numpy().tobytes())
            self._connection.execute("INSERT INTO calls VALUES (?, ?, ?)", row)
        except sqlite3.OperationalError as error:
            raise GradlessError(
                f"{len(losses)} answers could not be written to {self.path} ({error}); all before them are safe: make sure "
                "that the disk has room, and run the same command with --resume."
            ) from error
        self.calls += 1

    def close(self) -> None:
        """Fold SQLite's write-ahead log into the file."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()
