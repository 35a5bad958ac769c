"""GGUF files: their mapped tensors, and an export that patches only tuned numbers."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import Tensor

from gradless.blocks import BLOCK_TYPES
from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats.checkpoint import Blocks, Checkpoint, patch
from gradless.readers.gguf import Strings, Value, read_header
from gradless.readers.sentences import damaged, shown
from gradless.readers.tensors import FLOAT_TYPES

NOT_LINEAR = ("token_embd", "output.", "position_embd", "per_layer_token_embd", "token_types")
SUPPORTED = (*FLOAT_TYPES, *BLOCK_TYPES)
VOCABULARY = "tokenizer.ggml.tokens"
OF_TOKENS = ("tokenizer.ggml.scores", "tokenizer.ggml.token_type")
"""Arrays with one value for each token of the vocabulary."""


@dataclass
class GGUFFile(Checkpoint):
    """A memory-mapped GGUF file.

    Attributes:
        metadata: see `readers.gguf.GGUFHeader`.
    """

    output_name = "model.gguf"

    metadata: dict[str, Value] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Map a file.

        Raises:
            GradlessError: the file is not GGUF, is truncated or damaged, or has an unsupported tensor type.
        """
        path = Path(path)
        if not path.is_file():
            raise GradlessError(f"there is no file {path}; give the path of a .gguf file.")
        header = read_header(path)
        for name, info in header.tensors.items():
            if info.type not in SUPPORTED:
                raise GradlessError(f"{path}: tensor {shown(name)} has type {info.type}; supported are {', '.join(SUPPORTED)}.")
        _check_vocabulary(path, header.metadata)
        blocks = header.metadata.get(f"{header.metadata.get('general.architecture')}.block_count", 0)
        if not isinstance(blocks, int) or blocks > len(header.tensors):
            raise damaged(path, f"its block_count is {blocks!r}, and it has {len(header.tensors)} tensors")
        types = {name: info.type for name, info in header.tensors.items() if info.type in BLOCK_TYPES}
        return cls(path, header.tensors, Blocks(types, "GGUF"), header.metadata)

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", "unknown"))

    @property
    def title(self) -> str:
        return str(self.metadata.get("general.name", self.path.stem))

    def fingerprint(self) -> str:
        return sha256(self.path)

    def identity(self) -> dict[str, str]:
        return {}  # the one file holds everything

    def export(self, path: Path, floats: Mapping[str, Tensor] | None = None) -> None:
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)
            for info, content in self.changes(floats or {}):
                patch(temporary, info, content)

    def linear_layers(self) -> list[str]:
        return [name for name in self.quantized if not name.startswith(NOT_LINEAR)]


def _check_vocabulary(path: Path, metadata: Mapping[str, Value]) -> None:
    """Refuse a vocabulary that is no array of strings, or whose numbers of scores or types differ from that of its tokens."""
    tokens = metadata.get(VOCABULARY)
    if tokens is not None and not isinstance(tokens, Strings):
        raise damaged(path, f"{VOCABULARY} is no array of strings")
    for key in OF_TOKENS:
        values = metadata.get(key)
        if values is None or tokens is None:
            continue
        if not isinstance(values, np.ndarray):
            raise damaged(path, f"{key} is no array of numbers")
        if len(values) != len(tokens):
            raise damaged(path, f"{key} holds {len(values)} values for a vocabulary of {len(tokens)} tokens")
