"""A checkpoint that is mapped into memory as it is, and whose export patches only what was tuned.

In every container a checkpoint is tensors at offsets of files: floats and packed matrices. A `Layout` says how the tensors of a
packed matrix become a `PackedWeight`, and which of them change if it was tuned.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradless import kernels
from gradless.blocks import block_type
from gradless.errors import GradlessError
from gradless.readers.tensors import FLOAT_TYPES, TYPES, TensorInfo
from gradless.tensor import BlockWeight, PackedWeight, Part, TunedValues

Weight = TypeVar("Weight", bound=PackedWeight)


class Layout(ABC, Generic[Weight]):
    """How a format packs a matrix.

    Attributes:
        parts: the ends of its tensors' names, after the module's path; the first is in no other kind of layer.
        optional: the parts that may be missing.
    """

    parts: ClassVar[tuple[str, ...]]
    optional: frozenset[str] = frozenset()

    @property
    @abstractmethod
    def title(self) -> str:
        """The format, its bits and its groups."""

    def matrices(self, names: Iterable[str]) -> list[str]:
        """The names of the packed matrices among those of a checkpoint's tensors."""
        first = "." + self.parts[0]
        return [name.removesuffix(first) + ".weight" for name in names if name.endswith(first)]

    @abstractmethod
    def read(self, name: str, parts: Mapping[str, Tensor]) -> Weight:
        """The matrix as a packed weight.

        Raises:
            GradlessError: its tensors contradict each other, or hold something that cannot be tuned.
        """

    @abstractmethod
    def write(self, weight: Weight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The parts that tuning changed, each whole, in the file's own types and shapes."""

    @abstractmethod
    def saved(self, weight: Weight, parts: Mapping[str, Tensor]) -> Tensor:
        """The tuned values as the file will hold them: fp32, of their shape."""


class Blocks(Layout[BlockWeight]):
    """Matrices that lie in the file in blocks that we read as they are."""

    parts = ("weight",)

    def __init__(self, types: Mapping[str, str], title: str) -> None:
        self.types, self._title = types, title

    @property
    def title(self) -> str:
        return self._title

    def matrices(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if name in self.types]

    def read(self, name: str, parts: Mapping[str, Tensor]) -> BlockWeight:
        block = block_type(self.types[name])
        rows = math.prod(parts["weight"].shape[:-1])
        return BlockWeight(name, block, parts["weight"].view(rows, -1, block.nbytes))

    def write(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        packed = weight.packed.cpu().clone()
        if isinstance(weight.tuned, TunedValues):
            block, tuned = weight.block, {weight.tuned.part: weight.tuned.values}
            if weight.tuned.part is Part.BOTH:
                tuned = {Part.SCALE: weight.tuned.values, Part.OFFSET: kernels.exported_offset(weight)}
            for part, values in tuned.items():
                at = block.offset_at if part is Part.OFFSET else block.scale_at
                assert at is not None
                packed[..., at : at + 2] = rounded(values, torch.float16).cpu().unsqueeze(-1).view(torch.uint8)
        return {"weight": packed.view_as(parts["weight"])}

    def saved(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> Tensor:  # noqa: ARG002
        return rounded(weight.tuned_values.values, torch.float16).float()


@dataclass
class Checkpoint(ABC):
    """Memory-mapped tensors.

    Attributes:
        path: the file or folder.
        tensors: every tensor's place, in the file's order.
        layout: the layout of the packed matrices.
        contents: the tensors, by name, as views of the file in their own type; tensors in blocks as bytes.
        quantized: the packed matrices, by the name of their module's weight.
        floats: the floating-point tensors that are no part of a packed matrix, by name.
    """

    output_name: ClassVar[str]

    path: Path
    tensors: dict[str, TensorInfo] = field(repr=False)
    layout: Layout[Any]
    contents: dict[str, Tensor] = field(repr=False, init=False)
    quantized: dict[str, PackedWeight] = field(repr=False, init=False, default_factory=dict)
    floats: dict[str, Tensor] = field(repr=False, init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.contents = mapped(self.tensors)
        packed: set[str] = set()
        for name in self.layout.matrices(self.tensors):
            parts = self.parts(name)
            if missing := [part for part in self.layout.parts if part not in parts and part not in self.layout.optional]:
                raise GradlessError(f"{self.path} has no {missing[0]} for {name}; download or copy it again.")
            try:
                self.quantized[name] = self.layout.read(name, self._contents(name))
            except GradlessError as error:
                where = self.path if name in str(error) else f"{self.path}: {name}"
                raise GradlessError(f"{where}: {error}") from error
            except (ValueError, KeyError, IndexError, RuntimeError, TypeError) as error:
                raise GradlessError(
                    f"{self.path}: the tensors of {name} are not {self.layout.title} ({error}); download or quantize it again."
                ) from error
            packed.update(info.name for info in parts.values())
        for name, info in self.tensors.items():
            if info.type in FLOAT_TYPES and name not in packed:
                self.floats[name] = self.contents[name]

    def parts(self, name: str) -> dict[str, TensorInfo]:
        """The places of a packed matrix's tensors, by part."""
        stem = name.removesuffix("weight")
        return {part: self.tensors[stem + part] for part in self.layout.parts if stem + part in self.tensors}

    def _contents(self, name: str) -> dict[str, Tensor]:
        return {part: self.contents[info.name] for part, info in self.parts(name).items()}

    @property
    @abstractmethod
    def architecture(self) -> str:
        """transformers' or GGUF's name of the model's kind."""

    @property
    @abstractmethod
    def title(self) -> str:
        """The name that the checkpoint gives its model."""

    @abstractmethod
    def fingerprint(self) -> str:
        """One hash of all weights."""

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """The SHA-256 of each file beside the weights that matters to the model, by its name: configuration, tokenizer."""

    @abstractmethod
    def export(self, path: Path, floats: Mapping[str, Tensor] | None = None) -> None:
        """Write a copy with what was tuned.

        Args:
            path: of the new file or folder; replaced whole.
            floats: tuned values of float tensors by name, rounded to nearest in each tensor's own type.

        Raises:
            GradlessError: the disk is full; nothing is left behind.
        """

    def linear_layers(self) -> list[str]:
        """The packed matrices without those that the file's names show to be embeddings or a head."""
        return list(self.quantized)

    def saved(self, weight: PackedWeight) -> Tensor:
        """The tuned values as the checkpoint will hold them: fp32, of their shape."""
        return self.layout.saved(weight, self._contents(weight.name))

    def changes(self, floats: Mapping[str, Tensor]) -> Iterator[tuple[TensorInfo, Tensor]]:
        """The differences of a copy: tensors' places and their new contents."""
        for name, weight in self.quantized.items():
            if weight.tuned is not None:
                for part, content in self.layout.write(weight, self._contents(name)).items():
                    yield self.parts(name)[part], content
        for name, values in floats.items():
            yield self.tensors[name], values.cpu().to(FLOAT_TYPES[self.tensors[name].type])


def mapped(tensors: Mapping[str, TensorInfo]) -> dict[str, Tensor]:
    """Tensors as views of their files, in their own type; tensors in blocks as bytes. Copy-on-write: torch sees writable
    memory, written pages are copied, and the file itself never changes."""
    pages = cache(lambda path: np.memmap(path, dtype=np.uint8, mode="c"))
    found = {}
    for name, info in tensors.items():
        raw = torch.from_numpy(pages(info.file)[info.offset : info.offset + info.nbytes])
        shape = info.shape if info.type in TYPES else (*info.shape[:-1], -1)
        found[name] = raw.view(TYPES.get(info.type, torch.uint8)).view(shape)
    return found


def patch(path: Path, info: TensorInfo, content: Tensor) -> None:
    """Write a tensor over its place in a copy of its file."""
    raw = content.contiguous().flatten().view(torch.uint8)
    assert len(raw) == info.nbytes, info.name
    with path.open("rb+") as file:
        file.seek(info.offset)
        file.write(raw.numpy().tobytes())


def finite(name: str, scales: Tensor) -> Tensor:
    """The scales themselves.

    Raises:
        GradlessError: one is not a finite number.
    """
    if not scales.isfinite().all():
        raise GradlessError(f"{name} has a scale that is not a finite number; download or quantize the model again.")
    return scales


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to nearest in a file's type, saturating at its largest finite value."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)
