"""The durable record of a run: with the base file, it is the tuned model.

It is one SQLite file. Every step is on the disk before it moves a weight, so after a kill each step is there whole or not at
all. A replay of the rows gives the same bits, without data or forwards. The rows are chained by digests: an edited journal is
refused.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from gradless.batch import Loss
from gradless.database import Database
from gradless.errors import GradlessError
from gradless.methods.base import Estimate
from gradless.readers.sentences import said

FORMAT = 3
"""Version of the tables and of the arithmetic behind them: noise, rounding, the order of operations."""

_SCHEMA = {
    "header": "CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "steps": """CREATE TABLE steps (
        step INTEGER PRIMARY KEY,
        losses TEXT NOT NULL,    -- [[loss at +eps, loss at -eps] of each query]
        estimate TEXT NOT NULL,  -- [d of each query, see _packed, of each parameter group]
        lr TEXT NOT NULL,        -- [of each parameter group]
        seconds REAL NOT NULL,   -- since the run began, pauses left out
        moved REAL,              -- share of the integer codes that the update changed, NULL where there are none
        digest TEXT NOT NULL     -- of this row's step, losses, estimate and lr, and the digest before
    ) STRICT""",
    "evaluations": "CREATE TABLE evaluations (step INTEGER PRIMARY KEY, metrics TEXT NOT NULL, seconds REAL NOT NULL) STRICT",
    "finished": "CREATE TABLE finished (steps INTEGER NOT NULL, digest TEXT NOT NULL) STRICT",
    "written": "CREATE TABLE written (name TEXT PRIMARY KEY, sha256 TEXT NOT NULL) STRICT",  # missing in older runs
}
_WHAT = "a whole journal"
DEFLATED = 8
"""Largest number of bytes that one byte of Huffman codes can hold: each takes at least a bit."""


Header = dict[str, Any]
"""The description of a run, by name: plain JSON values."""


class Journal:
    """A run's journal, open for appending or for reading.

    Attributes:
        path: of the file.
        header: the description of the run: base hash, method, spaces, configuration, environment (plain JSON values).
        steps: number of checked steps.
        seconds: run time at the last step.
    """

    def __init__(self, path: Path, database: Database) -> None:
        self.path, self._database = path, database
        self.header: Header = {}
        self.steps = 0
        self.seconds = 0.0
        with database.reading():
            self._read_header()

    @classmethod
    def create(cls, path: Path, header: Header) -> Journal:
        """Begin a journal; `header` holds plain JSON values.

        Raises:
            GradlessError: the file cannot be written; no part of it remains.
        """
        rows = [(name, json.dumps(value)) for name, value in {"format": FORMAT, **header}.items()]
        return cls(path, Database.create(path, _SCHEMA, rows, _WHAT))

    @classmethod
    def open(cls, path: Path, *, to_go_on: bool = False) -> Journal:
        """Open a journal and check it from end to end.

        Args:
            path: of the file.
            to_go_on: the run will be resumed, and repeats the steps that are missing at the end.

        Raises:
            GradlessError: there is no journal, it is truncated or edited, or it has the format of another version.
        """
        if not path.is_file():
            raise GradlessError(f"there is no journal {path}; a run writes it as journal.db in its output folder.")
        journal = cls(path, Database(path, _SCHEMA, _WHAT))
        with journal._database.reading():
            journal._verify()
        if journal._database.log_is_missing and not journal.finished and not to_go_on:
            raise GradlessError(
                f"{path} was not closed by its run, and {path.name}-wal, which may hold its last steps, is not beside it: copy "
                f"both, or keep the {journal.steps} steps that are there with gradless verify --salvage."
            )
        return journal

    @staticmethod
    def is_begun(path: Path) -> bool:
        """Whether a file holds a journal with a header; a kill may have stopped the run before it was written."""
        if not path.is_file() or (path.stat().st_size == 0 and not path.with_name(path.name + "-wal").is_file()):
            return False
        try:  # read-only, or SQLite would fold in and remove the write-ahead log that a killed run left
            with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as connection:
                return bool(connection.execute("SELECT name FROM sqlite_master").fetchall())
        except sqlite3.Error:
            return True

    @staticmethod
    def salvage(path: Path, target: Path) -> int:
        """Copy the steps of a damaged journal, up to the first damaged one, to a new journal.

        Args:
            path: of the damaged journal, which is not changed.
            target: of the new journal; an existing file is replaced.

        Returns:
            The number of steps.

        Raises:
            GradlessError: the header cannot be read.
        """
        with tempfile.TemporaryDirectory(prefix="gradless-") as scratch:
            for suffix in ("", "-wal"):
                if Path(f"{path}{suffix}").is_file():
                    shutil.copyfile(f"{path}{suffix}", Path(scratch) / f"journal.db{suffix}")
            with contextlib.closing(sqlite3.connect(Path(scratch) / "journal.db")) as connection:
                header, whole = _whole_rows(connection, path)
        journal = Journal(target, Database.create(target, _SCHEMA, header, _WHAT))
        with journal._database.writing("the salvaged steps") as transaction:
            transaction.executemany("INSERT INTO steps VALUES (?, ?, ?, ?, ?, ?, ?)", whole)
        journal.close()
        return len(whole)

    def _read_header(self) -> None:
        rows = self._database.connection.execute("SELECT name, value FROM header ORDER BY name").fetchall()
        self.header = {name: json.loads(value) for name, value in rows}
        if self.header.get("format") != FORMAT:
            raise GradlessError(
                f"{self.path} has journal format {self.header.get('format')}, and this gradless replays format {FORMAT}; "
                f"use the version that wrote it ({self.header.get('environment', {}).get('gradless', 'unknown')})."
            )
        self._digest = self._first_digest = _digest_of(rows)

    def _verify(self) -> None:
        for row, seconds, digest in self._checked_rows():
            self._digest, self.steps, self.seconds = digest, row[0] + 1, seconds
        for steps, digest in self._select("SELECT steps, digest FROM finished"):
            if (steps, digest) != (self.steps, self._digest):
                raise GradlessError(
                    f"{self.path} is truncated: its run finished {steps} steps and it holds {self.steps}; "
                    "restore it from a copy."
                )

    def _checked_rows(self) -> Iterator[tuple[tuple[int, str, str, str], float, str]]:
        """Every step's (step, losses, estimate, lr), seconds and digest, in order.

        Raises:
            GradlessError: a row is not what the run wrote.
        """
        chained = self._first_digest
        query = "SELECT step, losses, estimate, lr, seconds, digest FROM steps ORDER BY step"
        for expected, (*row, seconds, digest) in enumerate(self._database.connection.execute(query)):
            chained = _chained(chained, *row)
            if row[0] != expected or digest != chained:
                raise GradlessError(
                    f"{self.path} was changed: step {expected} is not what the run wrote; restore it from a copy, or keep the "
                    "steps before it with gradless verify --salvage."
                )
            yield (row[0], row[1], row[2], row[3]), seconds, digest

    def _select(self, query: str) -> list[tuple[Any, ...]]:
        return self._database.connection.execute(query).fetchall()

    @property
    def finished(self) -> bool:
        """Whether the run has ended."""
        return bool(self._select("SELECT steps FROM finished"))

    def append(self, estimate: Estimate, seconds: float) -> None:
        """Commit a step to the disk. Call it before the step's update.

        Raises:
            GradlessError: the step could not be written; the journal is unchanged.
        """
        columns = (json.dumps(estimate.losses), json.dumps([*map(_packed, estimate.d)]), json.dumps(estimate.lr))
        digest = _chained(self._digest, estimate.step, *columns)
        with self._database.writing(f"step {estimate.step}") as transaction:
            last = transaction.execute("SELECT step, digest FROM steps ORDER BY step DESC LIMIT 1").fetchone()
            if (last or (-1, self._first_digest)) != (estimate.step - 1, self._digest):
                raise GradlessError(
                    f"{self.path} is no longer this run's: another process wrote to it after {self.steps} steps. Run the same "
                    "command with --resume to go on after what is there."
                )
            transaction.execute("DELETE FROM finished")
            transaction.execute("INSERT INTO steps VALUES (?, ?, ?, ?, ?, NULL, ?)", (estimate.step, *columns, seconds, digest))
        self._digest, self.steps, self.seconds = digest, estimate.step + 1, seconds

    def moved(self, step: int, share: float) -> None:
        """Note the share of codes that a step's update changed, for the curve. A replay computes it again."""
        with self._database.writing("a step's moves", durable=False) as transaction:
            transaction.execute("UPDATE steps SET moved = ? WHERE step = ?", (share, step))

    def moves(self) -> list[tuple[int, float]]:
        """(step, share of the codes that its update changed) of the steps that have it."""
        return [
            (step, moved) for step, moved in self._select("SELECT step, moved FROM steps WHERE moved IS NOT NULL ORDER BY step")
        ]

    def evaluated(self, step: int, metrics: dict[str, float], seconds: float) -> None:
        """Record an evaluation after `step` steps."""
        with self._database.writing("an evaluation") as transaction:
            transaction.execute("REPLACE INTO evaluations VALUES (?, ?, ?)", (step, json.dumps(metrics), seconds))

    def estimates(self) -> Iterator[Estimate]:
        """Every step that was there when the journal was opened, or was appended since. Each is checked again as it is read."""
        with self._database.reading():
            for (step, losses, d, lr), _, _ in islice(self._checked_rows(), self.steps):
                pairs = tuple(tuple(pair) for pair in json.loads(losses))
                yield Estimate(step, pairs, tuple(map(_unpacked, json.loads(d))), tuple(json.loads(lr)))

    def evaluations(self) -> list[dict[str, float]]:
        """Every evaluation: its metrics, `step` and `seconds`."""
        with self._database.reading():
            rows = self._select("SELECT step, metrics, seconds FROM evaluations ORDER BY step")
            return [{**json.loads(metrics), "step": step, "seconds": seconds} for step, metrics, seconds in rows]

    def written(self) -> dict[str, str]:
        """The SHA-256 of each file of the tuned model, by its path in the run's folder."""
        known = self._select("SELECT name FROM sqlite_master WHERE name = 'written'")
        return dict(self._select("SELECT name, sha256 FROM written")) if known else {}

    def finish(self, written: Mapping[str, str] | None = None) -> None:
        """Mark the run as finished, note the checksums of its files, and fold the write-ahead log in."""
        with self._database.writing("the run's end") as transaction:
            transaction.execute("DELETE FROM finished")
            transaction.execute("INSERT INTO finished VALUES (?, ?)", (self.steps, self._digest))
            transaction.execute(_SCHEMA["written"].replace("TABLE", "TABLE IF NOT EXISTS", 1))
            transaction.execute("DELETE FROM written")
            transaction.executemany("INSERT INTO written VALUES (?, ?)", (written or {}).items())
        self.close()

    def close(self) -> None:
        """Fold the write-ahead log into the file; see `Database.close`."""
        self._database.close()


def _packed(d: Sequence[Loss]) -> list[Loss] | str:
    """A group's derivatives as a list; small whole numbers as base85 of deflate's Huffman codes."""
    whole = [each for each in d if isinstance(each, int) and abs(each) < 128]
    if d and len(whole) == len(d):
        coder = zlib.compressobj(wbits=-zlib.MAX_WBITS, strategy=zlib.Z_HUFFMAN_ONLY)
        return base64.b85encode(coder.compress(bytes(each + 128 for each in whole)) + coder.flush()).decode()
    return list(d)


def _unpacked(d: list[float] | str) -> tuple[float, ...]:
    """The inverse of `_packed`."""
    if not isinstance(d, str):
        return tuple(d)
    codes = base64.b85decode(d)
    inflate = zlib.decompressobj(-zlib.MAX_WBITS)
    numbers = inflate.decompress(codes, DEFLATED * len(codes) + 1)
    if len(numbers) > DEFLATED * len(codes) or not inflate.eof:
        raise ValueError("a step holds more than its codes can")
    return tuple(each - 128 for each in numbers)


def _whole_rows(connection: sqlite3.Connection, path: Path) -> tuple[list[tuple[str, str]], list[tuple[object, ...]]]:
    """The header of a damaged journal, and its steps up to the first that was changed or cannot be read."""
    whole: list[tuple[object, ...]] = []
    try:
        header = connection.execute("SELECT name, value FROM header ORDER BY name").fetchall()
    except sqlite3.Error as error:
        raise GradlessError(f"{path} has no readable header ({said(error)}); nothing can be salvaged.") from error
    digest = _digest_of(header)
    with contextlib.suppress(sqlite3.Error):
        for row in connection.execute("SELECT step, losses, estimate, lr, seconds, moved, digest FROM steps ORDER BY step"):
            digest = _chained(digest, *row[:4])
            if row[0] != len(whole) or row[6] != digest:
                break
            whole.append(row)
    return header, whole


def _digest_of(header: list[tuple[str, str]]) -> str:
    return hashlib.blake2b(repr(header).encode(), digest_size=16).hexdigest()


def _chained(previous: str, step: int, losses: str, estimate: str, lr: str) -> str:
    text = "\n".join((previous, str(step), losses, estimate, lr))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
