"""GGUF files: the tensors as they lie in the file, and an export that patches only what was tuned.

The header is parsed here rather than with `gguf.GGUFReader`, which makes a NumPy view of every vocabulary entry; types and
sizes are the gguf package's.
"""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from torch import Tensor

from gradless.blocks import BLOCK_TYPES
from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats.checkpoint import FLOAT_TYPES, Blocks, Checkpoint, TensorInfo, patch

NOT_LINEAR = ("token_embd", "output.", "position_embd", "per_layer_token_embd", "token_types")
SUPPORTED = (*FLOAT_TYPES, *BLOCK_TYPES)

_SCALARS = dict(zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True))
_STRING, _ARRAY = 8, 9


@dataclass
class GGUFFile(Checkpoint):
    """A memory-mapped GGUF file.

    Attributes:
        metadata: scalar and string values; of an array, its length.
    """

    output_name = "model.gguf"

    metadata: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file.

        Raises:
            GradlessError: it is not GGUF, is truncated, or holds a tensor type that gradless does not read.
        """
        path = Path(path)
        if not path.is_file():
            raise GradlessError(f"there is no file {path}; give the path of a .gguf file.")
        metadata, tensors = _Header(path).parse()
        types = {name: info.type for name, info in tensors.items() if info.type in BLOCK_TYPES}
        return cls(path, tensors, Blocks(types, "GGUF"), metadata)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def title(self) -> str:
        return str(self.metadata.get("general.name", self.path.stem))

    def fingerprint(self) -> str:
        return sha256(self.path)

    def identity(self) -> dict[str, str]:
        return {self.path.name: sha256(self.path)}

    def export(self, path: Path, floats: Mapping[str, Tensor] | None = None) -> None:
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)
            for info, content in self.changes(floats or {}):
                patch(temporary, info, content)

    def linear_layers(self) -> list[str]:
        return [name for name in self.quantized if not name.startswith(NOT_LINEAR)]


class _Header:
    """One pass over a GGUF header."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = np.memmap(path, dtype=np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
        self.at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        if bytes(self.data[:4]) != b"GGUF":
            raise GradlessError(
                f"{self.path} is not a GGUF file (it does not begin with 'GGUF'); give a .gguf file as llama.cpp reads it."
            )
        self.at = 4
        version = self.scalar("I")
        if version not in (2, 3):
            raise GradlessError(f"{self.path} is GGUF version {version}; versions 2 and 3, little-endian, are supported.")
        tensor_count, key_count = self.scalar("Q"), self.scalar("Q")
        metadata = {}
        for _ in range(key_count):
            name = self.string()
            metadata[name] = self.value(self.scalar("I"))
        places = [self.place() for _ in range(tensor_count)]
        alignment = metadata.get("general.alignment", 32)
        start = -(-self.at // alignment) * alignment
        tensors = {}
        for name, shape, type_name, nbytes, offset in places:
            if start + offset + nbytes > len(self.data):
                raise self.truncated(f"tensor {name} ends at byte {start + offset + nbytes}")
            tensors[name] = TensorInfo(name, type_name, shape, self.path, start + offset, nbytes)
        return metadata, tensors

    def place(self) -> tuple[str, tuple[int, ...], str, int, int]:
        name = self.string()
        shape = tuple(self.scalar("Q") for _ in range(self.scalar("I")))[::-1]
        type_number, offset = self.scalar("I"), self.scalar("Q")
        try:
            type_name = gguf.GGMLQuantizationType(type_number).name
        except ValueError:
            type_name = f"number {type_number}"
        if type_name not in SUPPORTED:
            raise GradlessError(f"{self.path}: tensor {name} has type {type_name}; supported are {', '.join(SUPPORTED)}.")
        size, nbytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(type_number)]
        if shape[-1] % size:
            raise GradlessError(f"{self.path}: tensor {name} has rows of {shape[-1]}, not a multiple of {type_name}'s {size}.")
        return name, shape, type_name, math.prod(shape) // size * nbytes, offset

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(self.code(kind))
        kind, count = self.scalar("I"), self.scalar("Q")
        if kind == _STRING:
            for _ in range(count):
                self.take(self.scalar("Q"))
        else:
            self.take(count * struct.calcsize("<" + self.code(kind)))
        return count

    def code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise GradlessError(f"{self.path}: byte {self.at} holds no GGUF value type ({kind}); the header is damaged.")
        return _SCALARS[kind]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8", "replace")

    def take(self, count: int) -> bytes:
        if self.at + count > len(self.data):
            raise self.truncated("its header is incomplete")
        taken = bytes(self.data[self.at : self.at + count])
        self.at += count
        return taken

    def truncated(self, where: str) -> GradlessError:
        return GradlessError(
            f"{self.path} is truncated: it has {len(self.data)} bytes, but {where}. Download or copy it again."
        )
