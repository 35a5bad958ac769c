"""The places of the tensors in a file."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from gradless.readers.sentences import damaged, shown, truncated

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = FLOAT_TYPES | {
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Name of a type in files -> torch's type."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """The place of one tensor: `nbytes` bytes from `offset` on in `file`. `shape` is row-major (rows first)."""

    name: str
    type: str
    shape: tuple[int, ...]
    file: Path = field(compare=False)
    offset: int
    nbytes: int

    @property
    def end(self) -> int:
        return self.offset + self.nbytes


def check_places(path: Path, tensors: Iterable[TensorInfo], size: int) -> list[TensorInfo]:
    """The tensors of one file, ordered by their places.

    Raises:
        GradlessError: a tensor ends beyond the file's `size` bytes, or two tensors overlap.
    """
    placed = sorted(tensors, key=lambda info: (info.offset, info.end))
    for info in placed:
        if info.end > size:
            raise truncated(path, size, f"tensor {shown(info.name)} ends at byte {info.end}")
    for before, info in pairwise(placed):
        if info.offset < before.end:
            places = f"end at byte {before.end} and begin at byte {info.offset}"
            raise damaged(path, f"tensors {shown(before.name)} and {shown(info.name)} overlap: they {places}")
    return placed
