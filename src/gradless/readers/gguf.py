"""The header of a GGUF file: its metadata and the places of its tensors.

Only short values are copied. Arrays of numbers are views of the mapped file. Strings of an array are decoded on access, because
a vocabulary has up to some 262,144 of them. Every count is checked against the bytes that are left before it is used. Type
numbers and sizes are the gguf package's.
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import overload

import gguf
import numpy as np
from numpy.typing import NDArray

from gradless.errors import GradlessError
from gradless.readers.sentences import damaged, shown, truncated
from gradless.readers.tensors import TensorInfo, check_places

MOST_KEYS = MOST_TENSORS = 1 << 16
"""Largest number of keys and of tensors. The largest models have some thousands of tensors."""
MOST_STRINGS = 1 << 22
"""Largest number of strings in all arrays together: sixteen of the largest vocabularies."""
MOST_TEXT = 1 << 22
"""Largest number of bytes of all keys, names and single strings (chat templates) together, without strings in arrays."""
MOST_DIMENSIONS = 4
MOST_ALIGNMENT = 1 << 20

_SCALARS = {n: Struct("<" + code) for n, code in zip((0, 1, 2, 3, 4, 5, 6, 10, 11, 12), "BbHhIifQqd", strict=True)}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_U32, _U64 = Struct("<I"), Struct("<Q")
_LEAST_KEY, _LEAST_TENSOR = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8
"""Smallest number of bytes of a key with its value, and of a tensor's entry."""


class Strings(Sequence[str]):
    """An array of strings in a mapped file; each is decoded on access.

    Raises:
        GradlessError: on access, if a string is not UTF-8.
    """

    def __init__(self, where: str, data: mmap.mmap, places: NDArray[np.int64]) -> None:
        """`where` names the array in messages. `places` holds the start of each string in `data`, and the end of the last one
        plus eight bytes (the length of a next one)."""
        self._where, self._data, self._places = where, data, places

    def __len__(self) -> int:
        return len(self._places) - 1

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> list[str]: ...
    def __getitem__(self, at: int | slice) -> str | list[str]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        at = range(len(self))[at]
        begin, end = int(self._places[at]), int(self._places[at + 1]) - 8
        return self._decoded(self._data[begin:end], at)

    def __iter__(self) -> Iterator[str]:
        if not len(self):
            return
        first = int(self._places[0])
        held = self._data[first : int(self._places[-1]) - 8]
        places = (self._places - first).tolist()
        for number in range(len(self)):
            yield self._decoded(held[places[number] : places[number + 1] - 8], number)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Strings) and len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"<{len(self)} strings of {self._where}>"

    def _decoded(self, raw: bytes, number: int) -> str:
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise GradlessError(f"{self._where}: string {number} is not UTF-8; the file is damaged.") from error


Value = int | float | bool | str | NDArray[np.generic] | Strings


@dataclass(frozen=True)
class GGUFHeader:
    """The part of a GGUF file before its weights.

    Attributes:
        metadata: values by key, in the file's order: numbers, strings, arrays of numbers as read-only views of the file (which
            may not be aligned), arrays of strings as `Strings`.
        tensors: places by name, in the file's order; `type` is ggml's name.
    """

    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> GGUFHeader:
    """Read a file's header, but not its weights.

    Raises:
        GradlessError: it is not GGUF of version 2 or 3, is truncated, or contradicts itself or the format.
    """
    try:
        with path.open("rb") as file:
            empty = not file.seek(0, 2)
            data = mmap.mmap(-1, 1) if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise GradlessError(f"{path} cannot be read: {error.strerror or error}.") from error
    return _Header(path, data).parse()


class _Header:
    """One pass over a header."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.at, self.text, self.strings = 0, 0, 0

    def parse(self) -> GGUFHeader:
        if self.data[:4] != b"GGUF":
            raise GradlessError(
                f"{self.path} is not a GGUF file (it does not begin with 'GGUF'); give a .gguf file as llama.cpp reads it."
            )
        self.at = 4
        version = self.whole(_U32)
        if version not in (2, 3):
            which = "big-endian" if version in (1 << 24, 2 << 24, 3 << 24) else f"of version {version}"
            raise GradlessError(f"{self.path} is GGUF, but {which}; versions 2 and 3, little-endian, are supported.")
        tensor_count, key_count = self.whole(_U64), self.whole(_U64)
        self.countable(tensor_count, "tensors", _LEAST_TENSOR, MOST_TENSORS)
        self.countable(key_count, "keys", _LEAST_KEY, MOST_KEYS)
        metadata: dict[str, Value] = {}
        for _ in range(key_count):
            key = self.name("a key")
            if key in metadata:
                raise self.damaged(f"the key {shown(key)} is there twice")
            metadata[key] = self.value(key)
        places: dict[str, tuple[tuple[int, ...], str, int, int]] = {}
        for _ in range(tensor_count):
            name = self.name("a tensor")
            if name in places:
                raise self.damaged(f"the tensor {shown(name)} is there twice")
            places[name] = self.place(name)
        alignment = self.alignment(metadata)
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, (shape, kind, nbytes, offset) in places.items():
            if offset % alignment:
                raise self.damaged(f"tensor {shown(name)} lies at {offset}, which is no multiple of the alignment, {alignment}")
            tensors[name] = TensorInfo(name, kind, shape, self.path, start + offset, nbytes)
        check_places(self.path, tensors.values(), self.size)
        return GGUFHeader(metadata, tensors)

    def alignment(self, metadata: dict[str, Value]) -> int:
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is int and alignment.bit_count() == 1 and 8 <= alignment <= MOST_ALIGNMENT:
            return alignment
        held = repr(alignment) if isinstance(alignment, int | float) else f"no number ({type(alignment).__name__})"
        raise self.damaged(f"general.alignment is {held}; it is a power of two from 8 to {MOST_ALIGNMENT}")

    def place(self, name: str) -> tuple[tuple[int, ...], str, int, int]:
        """A tensor's shape, type, bytes and offset."""
        count = self.whole(_U32)
        if not 1 <= count <= MOST_DIMENSIONS:
            raise self.damaged(f"tensor {shown(name)} has {count} dimensions, and not 1 to {MOST_DIMENSIONS}")
        shape = tuple(self.whole(_U64) for _ in range(count))[::-1]
        number, offset = self.whole(_U32), self.whole(_U64)
        if not all(0 < each < 1 << 63 for each in shape):
            raise self.damaged(f"tensor {shown(name)} has the shape {list(shape)}")
        try:
            kind = gguf.GGMLQuantizationType(number)
            size, nbytes = gguf.GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise self.damaged(f"tensor {shown(name)} has the type number {number}, which ggml does not know") from error
        if shape[-1] % size:
            raise self.damaged(f"tensor {shown(name)} has rows of {shape[-1]}, not a multiple of {kind.name}'s {size}")
        return shape, kind.name, math.prod(shape) // size * nbytes, offset

    def value(self, key: str) -> Value:
        kind = self.whole(_U32)
        if kind == _STRING:
            return self.string(f"the value of {shown(key)}")
        if kind == _ARRAY:
            return self.array(key)
        if kind == _BOOL:
            return bool(self.booleans(key, self.numbers(np.dtype("u1"), 1))[0])
        if kind not in _SCALARS:
            raise self.damaged(f"the value of {shown(key)} has the type number {kind}, which GGUF does not know")
        return self.scalar(_SCALARS[kind])

    def array(self, key: str) -> Value:
        kind, count = self.whole(_U32), self.whole(_U64)
        where = f"the array {shown(key)}"
        if kind == _STRING:
            self.strings += count
            self.countable(count, f"strings in {where}", 8, MOST_STRINGS)
            self.countable(self.strings, "strings in all arrays", 0, MOST_STRINGS)
            return self.array_of_strings(f"{self.path}, {shown(key)}", count)
        if kind == _ARRAY:
            raise GradlessError(f"{self.path}: {where} holds arrays, which gradless does not read.")
        if kind != _BOOL and kind not in _SCALARS:
            raise self.damaged(f"{where} has the type number {kind}, which GGUF does not know")
        dtype = np.dtype("u1" if kind == _BOOL else _SCALARS[kind].format)
        self.countable(count, f"numbers in {where}", dtype.itemsize, self.size)
        numbers = self.numbers(dtype, count)
        return self.booleans(key, numbers) if kind == _BOOL else numbers

    def array_of_strings(self, where: str, count: int) -> Strings:
        """Walk over the lengths of the strings without reading the strings."""
        places, read, data, at, last = array("q", bytes(8 * (count + 1))), _U64.unpack_from, self.data, self.at, self.size - 8
        for number in range(count):
            if at > last:
                raise self.incomplete()
            (length,) = read(data, at)
            places[number] = at + 8
            at += 8 + length
        if at > self.size:
            raise self.incomplete()
        places[count] = at + 8
        self.at = at
        return Strings(where, data, np.frombuffer(places, np.int64))

    def numbers(self, dtype: np.dtype[np.generic], count: int) -> NDArray[np.generic]:
        begin = self.take(count * dtype.itemsize)
        return np.frombuffer(self.data, dtype, count, begin)

    def booleans(self, key: str, held: NDArray[np.generic]) -> NDArray[np.generic]:
        if held.max(initial=0) > 1:
            raise self.damaged(f"the value of {shown(key)} is neither true nor false")
        return held.view(np.bool_)

    def name(self, of: str) -> str:
        """A key or a tensor's name; `of` says which, in messages."""
        name = self.string(f"the name of {of}")
        if not name or not name.isprintable():
            raise self.damaged(f"{of} has {'the name ' + ascii(shown(name)) if name else 'no name'}")
        return name

    def string(self, what: str) -> str:
        length = self.whole(_U64)
        begin = self.take(length)
        self.text += length
        if self.text > MOST_TEXT:
            raise self.damaged(f"{what} brings the text of its header to {self.text} bytes, and at most {MOST_TEXT} are read")
        try:
            return self.data[begin : self.at].decode()
        except UnicodeDecodeError as error:
            raise self.damaged(f"{what} is not UTF-8") from error

    def whole(self, struct: Struct) -> int:
        value = self.scalar(struct)
        assert isinstance(value, int)
        return value

    def scalar(self, struct: Struct) -> int | float:
        value: int | float = struct.unpack_from(self.data, self.take(struct.size))[0]
        return value

    def take(self, count: int) -> int:
        """Step over `count` bytes and return their start."""
        begin = self.at
        if count > self.size - begin:
            raise self.incomplete()
        self.at += count
        return begin

    def countable(self, count: int, what: str, least: int, most: int) -> None:
        """Refuse a count that is above `most`, or whose things, of `least` bytes each, do not fit into the rest of the file."""
        if count > most:
            raise self.damaged(f"it says that it has {count} {what}, and at most {most} are read")
        if count * least > self.size - self.at:
            raise self.incomplete()

    def incomplete(self) -> GradlessError:
        return truncated(self.path, self.size, "its header is incomplete")

    def damaged(self, what: str) -> GradlessError:
        return damaged(self.path, what)
