"""Data files: rows of named columns from JSONL, CSV, TSV, Parquet, SQuAD's JSON, or a `datasets` name."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from gradless.errors import GradlessError

Row = dict[str, Any]
KINDS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
HEADERLESS = ("text", "label")


def read_rows(source: str, *, split: str = "train") -> list[Row]:
    """Read rows.

    Args:
        source: a file, or the name of a data set for `datasets.load_dataset` ("name" or "name:configuration").
        split: of such a data set.

    Raises:
        GradlessError: there is no such file, its kind is unknown, a line cannot be read, or it holds no row.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in KINDS:
            raise GradlessError(f"{path} has an unknown kind of data; give one of {', '.join(KINDS)}.")
        try:
            rows = list(_READERS[path.suffix](path))
        except (UnicodeDecodeError, csv.Error) as error:
            raise GradlessError(f"{path} cannot be read as UTF-8 {path.suffix[1:].upper()}: {error}.") from error
    elif path.suffix in KINDS:
        raise GradlessError(f"there is no data file {path}.")
    else:
        rows = _from_datasets(source, split)
    if not rows:
        raise GradlessError(f"{source} holds no rows; a run needs at least one.")
    return rows


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a delimited file. Without a header it must have two columns, which are text and label."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in _reader(file, delimiter) if line]
    if not lines:
        return
    header = lines[0]
    if len(header) == 2 and not _names_columns(header):
        names, body, first = list(HEADERLESS), lines, 1
    else:
        names, body, first = header, lines[1:], 2
    for number, line in enumerate(body, first):
        if len(line) != len(names):
            raise GradlessError(f"{path}, line {number} has {len(line)} columns and not {len(names)} ({', '.join(names)}).")
        yield dict(zip(names, line, strict=True))


def _reader(file: TextIO, delimiter: str) -> Iterator[list[str]]:
    """TSV fields stand as they are; CSV fields may be quoted."""
    return csv.reader(file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL)


def _names_columns(header: list[str]) -> bool:
    """Whether two cells are column names: short single words, one of them a usual name of a label or a completion."""
    known = {"label", "labels", "class", "target", "sentiment", "completion", "answer", "response", "output"}
    return any(cell.strip().lower() in known for cell in header) and all(len(cell.split()) == 1 for cell in header)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise GradlessError(f"{path}, line {number} is not JSON: {error.msg}.") from error
                if not isinstance(row, dict):
                    raise GradlessError(f"{path}, line {number} is not a JSON object with named columns.")
                yield row


def _json(path: Path) -> Iterator[Row]:
    """A JSON array of objects, or a file in SQuAD's nesting."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise GradlessError(f"{path} is not JSON: {error.msg} in line {error.lineno}.") from error
    if isinstance(content, list):
        yield from content
        return
    if not isinstance(content, dict) or "data" not in content:
        raise GradlessError(f"{path} is neither a JSON array of rows nor a file as SQuAD's, with 'data' at its top.")
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                answers = [answer["text"] for answer in qa["answers"]]
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": answers,
                }


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise GradlessError(f"{path}: reading Parquet needs pyarrow; pip install 'gradless[datasets]'.") from error
    yield from pyarrow.parquet.read_table(path).to_pylist()


_READERS = {
    ".tsv": lambda path: _delimited(path, "\t"),
    ".csv": lambda path: _delimited(path, ","),
    ".jsonl": _jsonl,
    ".json": _json,
    ".parquet": _parquet,
}


def _from_datasets(source: str, split: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        raise GradlessError(
            f"there is no file {source}; to load it as a data set's name, pip install 'gradless[datasets]'."
        ) from error
    name, _, configuration = source.partition(":")
    try:
        return list(datasets.load_dataset(name, configuration or None, split=split))
    except Exception as error:  # whatever the hub client raises is about this name
        raise GradlessError(f"{source} is neither a file nor a data set that `datasets` can load: {error}") from error
