"""Data files: rows of named columns from JSONL, CSV, TSV, Parquet, SQuAD's JSON, or a `datasets` name."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradless.errors import GradlessError
from gradless.tasks.columns import TEXT, Spec, check, shown

Row = dict[str, Any]
KINDS = (".tsv", ".csv", ".jsonl", ".json", ".parquet")
HEADERLESS = ("text", "label")
LONGEST_LINE = 64 * 2**20
"""Largest number of bytes in a line of JSONL."""
LONGEST_CELL = 16 * 2**20
"""Largest number of characters in a cell of CSV or TSV."""
EXPANSION = 200
"""Largest ratio of a Parquet file's rows in memory to the file."""
SMALL = 256 * 2**20
"""Bytes in memory that any Parquet file may unpack to."""
ROWS_AT_ONCE = 64
"""Rows that are unpacked together."""
SQUAD: Spec = {
    "data": [
        {"title": TEXT, "paragraphs": [{"context": TEXT, "qas": [{"question": TEXT, "answers": [{"text": TEXT}]}]}]},
    ]
}
"""Type of a JSON file of the Stanford Question Answering Dataset."""


def read_rows(source: str, *, split: str = "train") -> list[Row]:
    """Read rows.

    Args:
        source: a file, or the name of a data set for `datasets.load_dataset` ("name" or "name:configuration").
        split: of such a data set.

    Raises:
        GradlessError: there is no such file, its kind is unknown, a line cannot be read, or it has no rows.
    """
    path = Path(source)
    if path.is_file():
        if path.suffix not in KINDS:
            raise GradlessError(f"{path} has an unknown kind of data; give one of {', '.join(KINDS)}.")
        try:
            rows = list(_READERS[path.suffix](path))
        except OSError as error:
            raise GradlessError(f"{path} cannot be read: {error}.") from error
    elif path.suffix in KINDS:
        raise GradlessError(f"there is no data file {path}.")
    else:
        rows = _from_datasets(source, split)
    if not rows:
        raise GradlessError(f"{source} holds no rows; a run needs at least one.")
    return rows


def parsed(text: str, where: str) -> object:
    """A JSON value. Repeated keys, NaN and Infinity are refused, because readers disagree on them.

    Args:
        text: of the value.
        where: the place of the value, for messages.
    """
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_number)
    except json.JSONDecodeError as error:
        line = f" in line {error.lineno}" if "\n" in text.strip() else ""
        raise GradlessError(f"{where} is not JSON: {error.msg}{line}.") from error
    except GradlessError as error:
        raise GradlessError(f"{where} {error}") from error
    except RecursionError as error:
        raise GradlessError(f"{where} is nested too deeply.") from error
    except ValueError as error:  # a number of thousands of digits
        raise GradlessError(f"{where} is not JSON that can be read: {error}.") from error


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise GradlessError(f"names {twice[:40]!r} twice in one object; keep one of the two.")
    return made


def _no_number(name: str) -> object:
    raise GradlessError(f"holds {name}, which is no JSON; write a number, or null.")


def _decoded(content: bytes, where: str) -> str:
    """UTF-8 text without a byte-order mark."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise GradlessError(f"{where} is not UTF-8 ({error.reason} at byte {error.start}); save the file as UTF-8.") from error


def _delimited(path: Path, delimiter: str) -> Iterator[Row]:
    """Rows of a delimited file. A file without a header must have two columns: text and label."""
    lines = list(_cells(path, delimiter))
    if not lines:
        return
    _, header = lines[0]
    if len(header) == 2 and not _names_columns(header):
        names = list(HEADERLESS)
    else:
        names = header
        del lines[0]
    _check_once(names, path)
    for number, line in lines:
        if len(line) != len(names):
            raise GradlessError(f"{path}, line {number} has {len(line)} columns and not {len(names)} ({', '.join(names)}).")
        yield dict(zip(names, line, strict=True))


def _cells(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty. CSV cells may be quoted, TSV cells are taken as they are."""
    csv.field_size_limit(LONGEST_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(
            file, delimiter=delimiter, quoting=csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL, strict=True
        )
        try:
            for line in reader:
                if line:
                    yield reader.line_num, line
        except UnicodeDecodeError as error:
            where = f"{path}, after line {reader.line_num}"
            raise GradlessError(f"{where} is not UTF-8 ({error.reason}); save the file as UTF-8.") from error
        except csv.Error as error:
            kind = path.suffix[1:].upper()
            raise GradlessError(f"{path}, line {reader.line_num} cannot be read as {kind}: {error}.") from error


def _names_columns(header: list[str]) -> bool:
    """Whether two cells are column names: single words, one of them a usual name of a label or a completion."""
    known = {"label", "labels", "class", "target", "sentiment", "completion", "answer", "response", "output"}
    return any(cell.strip().lower() in known for cell in header) and all(len(cell.split()) == 1 for cell in header)


def _jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}, line {number}"
            if len(line) > LONGEST_LINE:
                raise GradlessError(f"{where} is longer than {LONGEST_LINE >> 20} MiB; no row is that long.")
            if text := _decoded(line, where).strip():
                yield _row(parsed(text, where), where)


def _json(path: Path) -> Iterator[Row]:
    """Rows of a JSON array of objects, or of a file nested like SQuAD's."""
    content = parsed(_decoded(path.read_bytes(), str(path)), str(path))
    if isinstance(content, list):
        for number, row in enumerate(content, 1):
            yield _row(row, f"{path}, row {number}")
        return
    if not isinstance(content, dict) or "data" not in content:
        raise GradlessError(f"{path} is neither a JSON array of rows nor a file like SQuAD's, with 'data' at its top.")
    check(content, SQUAD, f"{path}, read as a file of SQuAD's kind,")
    for article in content["data"]:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                yield {
                    "title": article["title"],
                    "context": paragraph["context"],
                    "question": qa["question"],
                    "answers": [answer["text"] for answer in qa["answers"]],
                }


def _row(value: object, where: str) -> Row:
    if not isinstance(value, dict):
        raise GradlessError(f"{where} is {shown(value)}; it must be a JSON object with named columns.")
    return value


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise GradlessError(f"{path}: reading Parquet needs pyarrow; pip install 'gradless[datasets]'.") from error
    rows: list[Row] = []
    most = max(SMALL, EXPANSION * path.stat().st_size)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            for batch in file.iter_batches(batch_size=ROWS_AT_ONCE):
                unpacked = batch.to_pylist()
                most -= sum(map(_size, unpacked))
                if most < 0:
                    raise GradlessError(f"{path} unpacks to more than {EXPANSION} times its size; split it into several files.")
                rows += unpacked
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise GradlessError(f"{path} cannot be read as Parquet: {error}") from error
    _check_once(names, path)
    yield from map(_without_padding, rows)


def _size(value: Any) -> int:
    """The bytes that a value of plain Python takes."""
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(map(_size, value.values()))
    return sys.getsizeof(value) + (sum(map(_size, value)) if isinstance(value, list) else 0)


def _check_once(names: list[str], path: Path) -> None:
    """Refuse two columns of one name, because a row would keep only the last."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise GradlessError(f"{path} names the column {twice!r} twice; rename one of the two.")


def _without_padding(row: Row) -> Row:
    """A row of an Arrow table without null keys. Inner objects of a table all have the same keys; null marks a missing one."""
    return {name: _stripped(value) for name, value in row.items()}


def _stripped(value: object) -> object:
    if isinstance(value, dict):
        return {name: _stripped(inner) for name, inner in value.items() if inner is not None}
    return [_stripped(inner) for inner in value] if isinstance(value, list) else value


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
        return [_without_padding(row) for row in datasets.load_dataset(name, configuration or None, split=split)]
    except Exception as error:  # whatever the hub client raises is about this name
        raise GradlessError(f"{source} is neither a file nor a data set that `datasets` can load: {error}") from error
