"""The durable record of a run: with the base file, it is the tuned model.

One SQLite file. Every step is committed to the disk before it moves a weight, so a run that is killed at any moment holds
each step either whole or not at all, and replaying its rows, which needs neither data nor forwards, gives the same bits.
Rows are chained by digests: a journal that was edited is refused.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gradless.errors import GradlessError
from gradless.methods.base import Estimate

FORMAT = 3
"""Of the tables, and of the arithmetic behind them: noise, rounding, the order of operations."""

_SCHEMA = """
CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE steps (
    step INTEGER PRIMARY KEY,
    losses TEXT NOT NULL,    -- [[loss at +eps, loss at -eps] of each query]
    estimate TEXT NOT NULL,  -- [d of each query, see _packed, of each parameter group]
    lr TEXT NOT NULL,        -- [of each parameter group]
    seconds REAL NOT NULL,   -- since the run began, pauses left out
    moved REAL,              -- share of the integer codes that the update changed, NULL where there are none
    digest TEXT NOT NULL     -- of this row's step, losses, estimate and lr, and the digest before
) STRICT;
CREATE TABLE evaluations (step INTEGER PRIMARY KEY, metrics TEXT NOT NULL, seconds REAL NOT NULL) STRICT;
CREATE TABLE finished (steps INTEGER NOT NULL, digest TEXT NOT NULL) STRICT;
"""


class Journal:
    """A run's journal, open for appending or for reading.

    Attributes:
        path: of the file.
        header: what the run is: base hash, method, spaces, configuration, environment (plain JSON values).
        steps: how many steps it holds.
        seconds: the run's time at its last step.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path, self._connection = path, connection
        self.header: dict[str, Any] = {}
        self.steps = 0
        self.seconds = 0.0
        self._digest = ""

    @classmethod
    def create(cls, path: Path, header: dict[str, Any]) -> Journal:
        """Begin a journal; `header` must survive JSON."""
        path.parent.mkdir(parents=True, exist_ok=True)
        journal = cls(path, sqlite3.connect(path))
        rows = [(name, json.dumps(value)) for name, value in {"format": FORMAT, **header}.items()]
        with journal._writing("the journal's beginning") as transaction:
            for statement in _SCHEMA.split(";"):
                transaction.execute(statement)
            transaction.executemany("INSERT INTO header VALUES (?, ?)", rows)
        journal._read_header()
        return journal

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Open a journal and check it from end to end.

        Raises:
            GradlessError: there is none, it is truncated or edited, or its format is another version's.
        """
        if not path.is_file():
            raise GradlessError(f"there is no journal {path}; a run writes it as journal.db in its output folder.")
        try:
            journal = cls(path, sqlite3.connect(path))
            journal._read_header()
            journal._verify()
        except (sqlite3.DatabaseError, json.JSONDecodeError, UnicodeDecodeError) as error:
            raise GradlessError(f"{path} is not a whole journal ({error}); restore it from a copy.") from error
        return journal

    def _read_header(self) -> None:
        rows = self._connection.execute("SELECT name, value FROM header ORDER BY name").fetchall()
        self.header = {name: json.loads(value) for name, value in rows}
        if self.header.get("format") != FORMAT:
            raise GradlessError(
                f"{self.path} has journal format {self.header.get('format')}, and this gradless replays format {FORMAT}; "
                f"use the version that wrote it ({self.header.get('environment', {}).get('gradless', 'unknown')})."
            )
        self._digest = hashlib.blake2b(repr(rows).encode(), digest_size=16).hexdigest()

    def _verify(self) -> None:
        query = "SELECT step, losses, estimate, lr, seconds, digest FROM steps ORDER BY step"
        for expected, (step, losses, estimate, lr, seconds, digest) in enumerate(self._connection.execute(query)):
            self._digest = _chained(self._digest, step, losses, estimate, lr)
            if step != expected or digest != self._digest:
                raise GradlessError(
                    f"{self.path} was changed: step {expected} is not what the run wrote; restore it from a copy."
                )
            self.steps, self.seconds = step + 1, seconds
        for steps, digest in self._connection.execute("SELECT steps, digest FROM finished"):
            if (steps, digest) != (self.steps, self._digest):
                raise GradlessError(
                    f"{self.path} is truncated: its run finished {steps} steps and it holds {self.steps}; "
                    "restore it from a copy."
                )

    @contextlib.contextmanager
    def _writing(self, what: str, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """One transaction; unless it is durable, a power failure may lose it."""
        try:
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
            with self._connection:
                self._connection.execute("BEGIN IMMEDIATE")
                yield self._connection
        except (sqlite3.OperationalError, sqlite3.IntegrityError) as error:
            raise GradlessError(
                f"{what} could not be written to {self.path} ({error}); all that was written before is safe: make sure that "
                "the disk has room and that no other process writes there, and run the same command with --resume."
            ) from error

    def append(self, estimate: Estimate, seconds: float) -> None:
        """Commit a step to the disk. Call it before the step's update.

        Raises:
            GradlessError: it could not be written; the journal is as it was.
        """
        columns = (json.dumps(estimate.losses), json.dumps([*map(_packed, estimate.d)]), json.dumps(estimate.lr))
        digest = _chained(self._digest, estimate.step, *columns)
        with self._writing(f"step {estimate.step}") as transaction:
            transaction.execute("DELETE FROM finished")
            transaction.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?, NULL, ?)", (estimate.step, *columns, seconds, digest))
        self._digest, self.steps, self.seconds = digest, estimate.step + 1, seconds

    def moved(self, step: int, share: float) -> None:
        """Note what share of the codes a step's update changed: for the curve; a replay finds it anew."""
        with self._writing("a step's moves", durable=False) as transaction:
            transaction.execute("UPDATE steps SET moved = ? WHERE step = ?", (share, step))

    def moves(self) -> list[tuple[int, float]]:
        """(step, share of the codes that its update changed), where noted."""
        return self._connection.execute("SELECT step, moved FROM steps WHERE moved IS NOT NULL ORDER BY step").fetchall()

    def evaluated(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Record an evaluation after `step` steps."""
        with self._writing("an evaluation") as transaction:
            transaction.execute("REPLACE INTO evaluations VALUES (?, ?, ?)", (step, json.dumps(metrics), seconds))

    def estimates(self) -> Iterator[Estimate]:
        """Every step, in order."""
        for step, losses, d, lr in self._connection.execute("SELECT step, losses, estimate, lr FROM steps ORDER BY step"):
            yield Estimate(
                step,
                tuple(tuple(pair) for pair in json.loads(losses)),
                tuple(map(_unpacked, json.loads(d))),
                tuple(json.loads(lr)),
            )

    def evaluations(self) -> list[dict[str, float]]:
        """Every evaluation: its metrics, and `step` and `seconds`."""
        query = "SELECT step, metrics, seconds FROM evaluations ORDER BY step"
        return [
            {**json.loads(metrics), "step": step, "seconds": seconds}
            for step, metrics, seconds in self._connection.execute(query)
        ]

    def finish(self) -> None:
        """Mark the run as finished, and fold SQLite's write-ahead log in so that the file stands alone."""
        with self._writing("the run's end") as transaction:
            transaction.execute("DELETE FROM finished")
            transaction.execute("INSERT INTO finished VALUES (?, ?)", (self.steps, self._digest))
        self.close()

    def close(self) -> None:
        """Fold the write-ahead log into the file; where someone else is reading it, SQLite does so when they stop."""
        with contextlib.suppress(sqlite3.OperationalError):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.execute("PRAGMA journal_mode=DELETE")
        self._connection.close()


def _packed(d: Sequence[Any]) -> list[Any] | str:
    """A group's derivatives: a list, or, of small whole numbers, base85 of their Huffman codes as deflate writes them."""
    if d and all(isinstance(each, int) and abs(each) < 128 for each in d):
        coder = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
        return base64.b85encode(coder.compress(bytes(each + 128 for each in d)) + coder.flush()).decode()
    return list(d)


def _unpacked(d: list[Any] | str) -> tuple[Any, ...]:
    """What `_packed` was given."""
    if isinstance(d, str):
        return tuple(each - 128 for each in zlib.decompress(base64.b85decode(d), -zlib.MAX_WBITS))
    return tuple(d)


def _chained(previous: str, step: int, losses: str, estimate: str, lr: str) -> str:
    text = "\n".join((previous, str(step), losses, estimate, lr))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
