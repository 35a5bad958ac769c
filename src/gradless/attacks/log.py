"""Every answer that was paid for: an attack that is interrupted asks nothing twice.

One SQLite file. An answer is committed to the disk before the attack goes on. An attack is a function of its options and of
these answers, so beginning it again with the same file repeats it, without a query, up to where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradless.database import Database
from gradless.errors import GradlessError

_SCHEMA = {
    "header": "CREATE TABLE header (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT",
    "calls": """CREATE TABLE calls (
        call INTEGER PRIMARY KEY,
        answers BLOB NOT NULL  -- of each image asked: `ANSWER`
    ) STRICT""",
}
_WHAT = "a log of queries"
ANSWER = np.dtype([("image", "<i4"), ("class", "<i4"), ("input", "<i8"), ("loss", "<f4")])
"""Which image it was, what the input was taken for, the input's name, the loss."""


class QueryLog:
    """The answers to an attack's calls of its model.

    Args:
        path: of the file; made where it is missing.
        header: what the attack is, as plain JSON values.

    Attributes:
        calls: how many calls' answers it holds.

    Raises:
        GradlessError: the file is no such log, or another attack's.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        if path.is_file() and path.stat().st_size:
            self._database = Database(path, _SCHEMA, _WHAT)
        else:
            entries = [(name, json.dumps(value)) for name, value in header.items()]
            self._database = Database.create(path, _SCHEMA, entries, _WHAT)
        with self._database.reading():
            rows = self._database.connection.execute("SELECT name, value FROM header").fetchall()
            found = {name: json.loads(value) for name, value in rows}
            calls = self._database.connection.execute("SELECT answers FROM calls").fetchall()
            held = [np.frombuffer(answers, ANSWER) for (answers,) in calls]
        for name in {**found, **header}:
            if found.get(name) != header.get(name):
                raise GradlessError(
                    f"{path} is of an attack whose {name} is {found.get(name)!r}, not {header.get(name)!r}; "
                    "resume with what it was begun with, or choose another output folder."
                )

        self.calls = len(held)
        self._held = {(image, name): (loss, taken) for answers in held for image, taken, name, loss in answers.tolist()}

    def answers(self, images: Sequence[int], names: Sequence[int]) -> dict[int, tuple[float, int]]:
        """The loss and the class that inputs of images were answered with, by their places; without those never asked."""
        asked = enumerate(zip(images, names, strict=True)) if self._held else ()
        return {i: self._held[of] for i, of in asked if of in self._held}

    def append(self, answers: np.ndarray[Any, Any]) -> None:
        """Commit the answers to a call, (n,) of `ANSWER`, to the disk.

        Raises:
            GradlessError: they could not be written; all before them are safe.
        """
        with self._database.writing(f"{len(answers)} answers") as transaction:
            transaction.execute("INSERT INTO calls (answers) VALUES (?)", (answers.tobytes(),))
        self.calls += 1

    def close(self) -> None:
        """Fold SQLite's write-ahead log into the file."""
        self._database.close()
