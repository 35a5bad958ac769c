"""AQLM's checkpoints: a scale a row, and groups of columns that are sums of codebooks' vectors (1x16, 2x8, 8x8 ...).

`codes` are rows by groups by codebooks, `codebooks` (codebooks, entries, 1, columns of a group), `scales` (rows, 1, 1, 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.account import understood
from gradless.formats.checkpoint import Layout, finite, rounded
from gradless.readers.json import whole
from gradless.tensor import CodebookWeight, Part

USED = ("in_group_size", "out_group_size", "num_codebooks", "nbits_per_codebook")
NEUTRAL = ("linear_weights_not_to_quantize", "bits", "group_size")


@dataclass(frozen=True)
class AQLM(Layout[CodebookWeight]):
    """A layer's tensors as AQLM writes them.

    Attributes:
        codebooks: how many vectors are added up.
        bits: bits of a code.
        size: columns of a group.
    """

    parts: ClassVar[tuple[str, ...]] = ("codes", "codebooks", "scales")

    codebooks: int
    bits: int
    size: int

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """From `quantization_config`.

        Raises:
            GradlessError: groups hold several rows, or a setting is not known.
        """
        understood(config, "AQLM", USED, NEUTRAL)
        if config.get("out_group_size", 1) != 1:
            raise GradlessError(f"AQLM with groups of {config['out_group_size']} rows; groups within a row are supported.")
        return cls(
            whole(config, "num_codebooks", "AQLM", least=1, most=256, default=1),
            whole(config, "nbits_per_codebook", "AQLM", least=1, most=16, default=16),
            whole(config, "in_group_size", "AQLM", least=1, most=1 << 10, default=8),
        )

    @property
    def title(self) -> str:
        return f"AQLM, {self.codebooks}x{self.bits}, groups of {self.size}"

    def read(self, name: str, parts: Mapping[str, Tensor]) -> CodebookWeight:
        rows, groups, _ = parts["codes"].shape
        expected = {
            "codes": (rows, groups, self.codebooks),
            "codebooks": (self.codebooks, 2**self.bits, 1, self.size),
            "scales": (rows, 1, 1, 1),
        }
        for part, shape in expected.items():
            if parts[part].shape != shape:
                raise GradlessError(f"{name}: its {part} are {tuple(parts[part].shape)}; config.json says {shape}.")
        for part in ("codebooks", "scales"):
            finite(name, parts[part])
        return CodebookWeight(
            name,
            parts["codes"],
            scales=parts["scales"].float().view(rows, 1),
            codebooks=parts["codebooks"].view(self.codebooks, -1, self.size),
        )

    def write(self, weight: CodebookWeight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        tuned = weight.tuned_values
        part = "codebooks" if tuned.part is Part.CODEBOOK else "scales"
        return {part: rounded(tuned.values.cpu(), parts[part].dtype).view(parts[part].shape)}

    def saved(self, weight: CodebookWeight, parts: Mapping[str, Tensor]) -> Tensor:
        (written,) = self.write(weight, parts).values()
        return written.float().view_as(weight.tuned_values.values)
