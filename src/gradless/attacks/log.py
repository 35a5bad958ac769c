"""`QueryLog`: the answers of a model, on the disk, so that an interrupted attack asks nothing twice.

One SQLite file. An answer is committed to the disk before the attack goes on. An attack depends only on its options and on
these answers. Begun again with the same file it repeats itself, without a query, up to the point of the interruption.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
"""One answer: the image's number, the class that the model named, the input's name, the loss."""


class QueryLog:
    """The answers to an attack's calls of the model.

    Args:
        path: the file; it is created if it is missing.
        header: the attack's options, as plain JSON values.

    Attributes:
        calls: the number of calls in the log.

    Raises:
        GradlessError: the file is no such log, or the log of another attack.
    """

    def __init__(self, path: Path, header: dict[str, object]) -> None:
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
            logged = [np.frombuffer(answers, ANSWER) for (answers,) in calls]
        for name in {**found, **header}:
            if found.get(name) != header.get(name):
                raise GradlessError(
                    f"{path} is of an attack whose {name} is {found.get(name)!r}, not {header.get(name)!r}; "
                    "resume with the options that it began with, or choose another output folder."
                )

        self.calls = len(logged)
        self._logged = {(image, name): (loss, taken) for part in logged for image, taken, name, loss in part.tolist()}

    def answers(self, images: Sequence[int], names: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Logged answers to some inputs.

        Args:
            images: the numbers of the images.
            names: the names of their inputs.

        Returns:
            Loss and class, by the input's place in `names`; an input that is not in the log is left out.
        """
        asked = enumerate(zip(images, names, strict=True)) if self._logged else ()
        return {i: self._logged[of] for i, of in asked if of in self._logged}

    def append(self, answers: NDArray[np.generic]) -> None:
        """Commit the answers of one call, (n,) of `ANSWER`, to the disk.

        Raises:
            GradlessError: they could not be written; earlier ones are safe.
        """
        with self._database.writing(f"{len(answers)} answers") as transaction:
            transaction.execute("INSERT INTO calls (answers) VALUES (?)", (answers.tobytes(),))
        self.calls += 1

    def close(self) -> None:
        """Fold SQLite's write-ahead log into the file."""
        self._database.close()
