"""A checkpoint file that is mapped into memory as it is, and whose export patches only what was tuned.

Whatever the container, a file is tensors at offsets: packed matrices in some block type, and float tensors.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gradless import kernels
from gradless.blocks import block_type
from gradless.files import replacing
from gradless.tensor import Part, QuantTensor

FLOAT_TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FP16_MAX = 65504.0


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `shape` is in row-major order (rows first), `offset` and `nbytes` are in the file."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass
class TensorFile:
    """A memory-mapped file of tensors.

    Attributes:
        path: of the file.
        tensors: every tensor's place, in the file's order.
        quantized: the packed matrices, by name.
        floats: the F32, F16 and BF16 tensors, by name, as views of the file in their own type.
    """

    path: Path
    tensors: dict[str, TensorInfo]
    quantized: dict[str, QuantTensor] = field(repr=False, init=False, default_factory=dict)
    floats: dict[str, Tensor] = field(repr=False, init=False, default_factory=dict)

    def __post_init__(self) -> None:
        # Copy-on-write: torch sees writable memory, tuned codes get pages of their own, and the file itself never changes.
        data = np.memmap(self.path, dtype=np.uint8, mode="c")
        for info in self.tensors.values():
            raw = torch.from_numpy(data[info.offset : info.offset + info.nbytes])
            if info.type in FLOAT_TYPES:
                self.floats[info.name] = raw.view(FLOAT_TYPES[info.type]).view(info.shape)
            else:
                block = block_type(info.type)
                packed = raw.view(math.prod(info.shape[:-1]), info.shape[-1] // block.size, block.nbytes)
                self.quantized[info.name] = QuantTensor(info.name, block, packed)

    @property
    def architecture(self) -> str:
        """transformers' or GGUF's name of the model's kind."""
        return "unknown"

    @property
    def title(self) -> str:
        """What the file calls its model."""
        return self.path.stem

    def linear_layers(self) -> list[str]:
        """The packed matrices that are trained by default: all but the embeddings and the head."""
        return list(self.quantized)

    def export(self, path: Path, floats: dict[str, Tensor] | None = None) -> None:
        """Write a copy of the file with the tuned fields patched at their offsets.

        Args:
            path: of the new file; replaced whole.
            floats: tuned values of float tensors by name, rounded to nearest in each tensor's own type.

        Raises:
            GradlessError: the disk is full; nothing is left behind.
        """
        with replacing(path) as temporary:
            shutil.copyfile(self.path, temporary)
            with temporary.open("rb+") as file:
                for tensor in self.quantized.values():
                    if tensor.part is not None:
                        packed = tensor.packed.cpu().clone()
                        for at, values in tuned_fields(tensor):
                            packed[..., at : at + 2] = to_fp16(values).cpu().unsqueeze(-1).view(torch.uint8)
                        file.seek(self.tensors[tensor.name].offset)
                        file.write(packed.numpy().tobytes())
                for name, values in (floats or {}).items():
                    raw = values.cpu().to(FLOAT_TYPES[self.tensors[name].type]).contiguous()
                    file.seek(self.tensors[name].offset)
                    file.write(raw.view(torch.uint8).numpy().tobytes())


def tuned_fields(tensor: QuantTensor) -> Iterable[tuple[int, Tensor]]:
    """(byte offset in a block, fp32 values (rows, blocks)) of each field that tuning changed."""
    block = tensor.block
    if tensor.master is None:
        return
    if tensor.part is Part.OFFSET:
        assert block.offset_at is not None
        yield block.offset_at, tensor.master
        return
    yield block.scale_at, tensor.master
    if tensor.part is Part.BOTH and block.offset_at is not None:
        yield block.offset_at, kernels.exported_offset(tensor)


def to_fp16(values: Tensor) -> Tensor:
    """Round to nearest fp16, saturating at its largest finite value."""
    return values.clamp(-_FP16_MAX, _FP16_MAX).to(torch.float16)
