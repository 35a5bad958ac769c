"""The header of a safetensors file: the places of its tensors, and its metadata.

The safetensors library refuses the same files.
"""

from __future__ import annotations

import math
from pathlib import Path

from gradless.errors import GradlessError
from gradless.readers.json import is_text, mapping, parse_object, shown_value
from gradless.readers.sentences import damaged, shown
from gradless.readers.tensors import TYPES, TensorInfo, check_places

FIELDS = {"dtype", "shape", "data_offsets"}
MOST = 1 << 63
"""Every dimension, offset and number of values is below this."""


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, in the header's order, and its metadata.

    Raises:
        GradlessError: the file is no safetensors file, is truncated, has an unknown type, or contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= size - 8:
                raise GradlessError(f"{path} is not a safetensors file, or is truncated; copy it again.")
            raw = file.read(length)
    except OSError as error:
        raise GradlessError(f"{path} cannot be read: {error.strerror or error}.") from error
    where = f"{path} is not a safetensors file, or is damaged: its header"
    if not raw.startswith(b"{"):
        raise GradlessError(f"{where} is no JSON object; copy it again.")
    content = parse_object(raw, where, size)
    metadata = mapping(content, "__metadata__", str(path), of=is_text, what="text")
    content.pop("__metadata__", None)
    start = 8 + length
    tensors = {name: _placed(path, name, entry, start) for name, entry in content.items()}
    end = start
    for info in check_places(path, tensors.values(), size):
        if info.offset != end:
            raise damaged(path, f"bytes {end} to {info.offset} belong to no tensor")
        end = info.end
    if end != size:
        raise damaged(path, f"it has {size} bytes, but its last tensor ends at byte {end}")
    return tensors, metadata


def _placed(path: Path, name: str, entry: object, start: int) -> TensorInfo:
    """The place of one tensor. `entry` is its entry in the header; the data begin at byte `start`."""
    if not name or not name.isprintable():
        raise damaged(path, f"a tensor has {'the name ' + ascii(shown(name)) if name else 'no name'}")
    if not isinstance(entry, dict) or entry.keys() != FIELDS:
        raise damaged(path, f"its header must give {shown(name)} dtype, shape and data_offsets, and nothing else")
    kind, shape, places = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in TYPES:
        raise GradlessError(f"{path}: {shown(name)} has type {shown_value(kind)}; known are {', '.join(TYPES)}.")
    if not _whole_numbers(shape) or math.prod(shape) >= MOST:
        raise damaged(path, f"{shown(name)} has no shape of whole numbers from 0 on")
    if not _whole_numbers(places) or len(places) != 2 or places[0] > places[1]:
        raise damaged(path, f"{shown(name)} needs data_offsets of two byte numbers, the first not above the second")
    begin, end = places
    nbytes = math.prod(shape) * TYPES[kind].itemsize
    if end - begin != nbytes:
        held = f"{' x '.join(map(str, shape)) or 'one value'} of {kind}"
        raise damaged(path, f"{shown(name)} lies in {end - begin} bytes, but {held} takes {nbytes}")
    return TensorInfo(name, kind, tuple(shape), path, start + begin, nbytes)


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < MOST for value in values)
