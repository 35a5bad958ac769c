"""SQLite files that survive kills and full disks, and that are checked before they are read.

A file appears whole, with its tables, or not at all. A transaction is on the disk when it returns. Until the file is closed,
its last transactions are in SQLite's write-ahead log beside it. A file is only opened if it has the expected tables, no others,
and nothing that runs by itself (views, triggers).
"""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.readers.sentences import said

COMPANIONS = ("-wal", "-shm", "-journal")
"""Suffixes of the files that SQLite may keep beside an open file."""
PATIENCE = 60.0
"""Seconds to wait for another process."""


class Database:
    """An open SQLite file.

    Args:
        path: of the file.
        schema: table name -> its CREATE TABLE statement. The first table must be there, no others may be.
        what: a name for such a file in messages, as in "is not a whole journal".

    Attributes:
        connection: begins no transaction by itself; see `writing`.
        log_is_missing: whether the file was not closed and its log is gone, perhaps with the last transactions.

    Raises:
        GradlessError: the file is no such database.
    """

    def __init__(self, path: Path, schema: Mapping[str, str], what: str) -> None:
        self.path, self.schema, self.what = path, schema, what
        self._scratch: tempfile.TemporaryDirectory[str] | None = None
        with self.reading():
            # Ask SQLite, not the bytes: closing the file would release the locks of this process's other connections.
            log_is_there = Path(f"{path}-wal").exists()
            self.connection = self._connect()
            self.log_is_missing = not log_is_there and self.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
            self._check_schema()

    @classmethod
    def create(cls, path: Path, schema: Mapping[str, str], rows: Sequence[tuple[str, str]], what: str) -> Self:
        """Write a new file with these rows in its first table, whole, and open it.

        Raises:
            GradlessError: the file cannot be written; no part of it remains.
        """
        with replacing(path) as temporary:
            try:
                with contextlib.closing(sqlite3.connect(temporary)) as connection, connection:
                    for statement in schema.values():
                        connection.execute(statement)
                    connection.executemany(f"INSERT INTO {next(iter(schema))} VALUES (?, ?)", rows)
            except sqlite3.Error as error:
                raise OSError(str(error)) from error
            for suffix in COMPANIONS:
                Path(f"{path}{suffix}").unlink(missing_ok=True)
        return cls(path, schema, what)

    def _connect(self) -> sqlite3.Connection:
        try:
            return _opened(self.path)
        except sqlite3.OperationalError:  # a killed process's log on a read-only disk: fold it into a copy
            self._scratch = tempfile.TemporaryDirectory(prefix="gradless-")
            copy = Path(self._scratch.name) / self.path.name
            for suffix in ("", "-wal", "-journal"):
                with contextlib.suppress(FileNotFoundError):
                    shutil.copyfile(f"{self.path}{suffix}", f"{copy}{suffix}")
            return _opened(copy)

    def _check_schema(self) -> None:
        found = self.connection.execute("SELECT type, name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
        for kind, name, statement in found:
            if kind != "table" or name not in self.schema or _plain(statement) != _plain(self.schema[name]):
                raise GradlessError(f"{self.path} is not {self.what}: it has an unknown {kind} {name}.")
        if next(iter(self.schema)) not in {name for _, name, _ in found}:
            raise GradlessError(f"{self.path} is not {self.what} (no such table: {next(iter(self.schema))}).")

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Turn every error that a damaged file causes inside into one sentence."""
        try:
            yield
        except (sqlite3.Error, ValueError, OverflowError, TypeError, KeyError, RecursionError, OSError) as error:
            raise GradlessError(f"{self.path} is not {self.what} ({said(error)}); restore it from a copy.") from error

    @contextlib.contextmanager
    def writing(self, what: str, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction. A power failure may lose it unless it is `durable`.

        Raises:
            GradlessError: the transaction could not be written; earlier ones are safe.
        """
        try:
            self.connection.execute("PRAGMA journal_mode=WAL")
            self.connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            with self.connection:
                self.connection.execute("BEGIN IMMEDIATE")
                yield self.connection
        except sqlite3.Error as error:
            raise GradlessError(
                f"{what} could not be written to {self.path} ({error}); all that was written before is safe: make sure that "
                "the disk has room and that no other process writes there, and run the same command with --resume."
            ) from error

    def close(self) -> None:
        """Fold the write-ahead log into the file. If another process reads it, SQLite does this when that process stops."""
        with contextlib.suppress(sqlite3.Error):
            self.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self.connection.execute("PRAGMA journal_mode=DELETE")
        self.connection.close()
        if self._scratch is not None:
            self._scratch.cleanup()


def _opened(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=PATIENCE, isolation_level=None)
    try:
        connection.execute("PRAGMA trusted_schema=OFF")
        connection.execute("SELECT name FROM sqlite_master").fetchall()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _plain(statement: str) -> str:
    """A statement without its comments and white space."""
    return re.sub(r"--[^\n]*|\s+", "", statement)
