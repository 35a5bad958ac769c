"""`QuantTensor`: a packed weight matrix, the fp32 values that are tuned in it, and what a forward reads instead of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from gradless.blocks import BlockType
from gradless.noise import Direction, Signs

RESIDUAL_UNIT = 1 / 256
"""Of a grid step: a residual, a signed byte, reaches from half a step below its code to half a step above."""


class Move(NamedTuple):
    """x -> decay * x + coefficient * u: a query's view of a point x, and an update of it, are both one of these.

    Attributes:
        direction: which u, or the signs of a sum of several.
        coefficient: +eps or -eps in a query, -lr * d in an update; rounded to fp32 where it is used.
        decay: 1 - lr * weight_decay in an update, 1 in a query.
    """

    direction: Direction | Signs
    coefficient: float
    decay: float = 1.0


class Part(StrEnum):
    """What is tuned: fields of a block, one fp32 value each; its integer codes, in place; or what codes stand for."""

    SCALE = "scale"  # d alone
    OFFSET = "offset"  # m alone; types without an m fall back to d
    BOTH = "both"  # d and m by one factor: the Delta of QZO's equations
    CODE = "code"  # the codes, in whole steps
    CODEBOOK = "codebook"  # the entries of a weight's own codebooks


@dataclass(eq=False)
class QuantTensor:
    """A weight matrix in packed blocks along its rows.

    Attributes:
        name: the tensor's name in its file; with the seed it determines the noise.
        block: the block type.
        packed: uint8, (rows, blocks, block.nbytes), as in the file; written by updates of codes only (memory-mapped
            copy-on-write: the file itself never changes).
        row_order: int64, (rows,): the file row that model row i reads, or None for the same order. Noise follows the file.
        column_order: int64, (columns,): the model column that each packed column is, or None for the same order.
        share: so many consecutive blocks of a row share one tuned value (a file's group may be longer than a block).
        part: what is tuned, or None while nothing is.
        relative: whether a move is measured in each block's own unit (`unit`) or absolutely.
        master: fp32, (rows, values), in file order: the tuned block values; None where there are none.
        views: the moves under which a forward reads what is tuned; none to read it as it is.
        owners: int64, (tokens,): which of the views each token of the batch reads it under; None: each view serves its equal
            share of the tokens, in their order.
        clamp: whether a query's codes stop at the grid's ends; otherwise they are read in a wider integer.
        stride: the codes of file rows 0, stride, 2 * stride ... are tuned, and no others.
        residual: int8, (tuned rows, columns), in file order: what updates still owe each code, in units of `RESIDUAL_UNIT`
            steps; None where an update is rounded to whole steps at once.
    """

    name: str
    block: BlockType
    packed: Tensor
    row_order: Tensor | None = None
    column_order: Tensor | None = None
    share: int = 1
    part: Part | None = None
    relative: bool = True
    master: Tensor | None = field(default=None, repr=False)
    views: tuple[Move, ...] = ()
    owners: Tensor | None = None
    clamp: bool = False
    stride: int = 1
    residual: Tensor | None = field(default=None, repr=False)

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @property
    def file_rows(self) -> Tensor:
        """The file row behind each model row: int64, (rows,)."""
        return torch.arange(self.rows, device=self.packed.device) if self.row_order is None else self.row_order

    @property
    def columns(self) -> int:
        return self.packed.shape[1] * self.block.size

    @property
    def nbytes(self) -> int:
        """Of what the file gave it."""
        return self.packed.nbytes

    @property
    def values(self) -> int:
        """How many values of a row are tuned, where codes are not."""
        return -(-self.packed.shape[1] // self.share)

    @property
    def has_codes(self) -> bool:
        """Whether each weight has an integer code of its own, which can be tuned."""
        return True

    @property
    def has_integers(self) -> bool:
        """Whether codes are their own levels."""
        return self.block.levels is None

    @property
    def is_centred(self) -> bool:
        """Whether scales multiply numbers of both signs."""
        return self.block.is_centred

    @property
    def tuned_rows(self) -> int:
        """How many rows have codes that are tuned."""
        return -(-self.rows // self.stride)

    @property
    def has_offset(self) -> bool:
        """Whether a block holds an offset of its own."""
        return self.block.offset_at is not None and not self.block.has_zero_point

    @property
    def shifts(self) -> bool:
        """Whether a move adds a number to each weight of a group, so that sums of a token's inputs tell what it changes."""
        return self.part is Part.OFFSET and self.has_offset

    @property
    def keeps_sign(self) -> bool:
        """Whether the tuned value is a scale, which stops at zero instead of crossing it; a plain offset may cross."""
        return self.part is not Part.OFFSET or self.block.offset_unit is None

    def to(self, device: torch.device) -> None:
        """Move everything it holds to a device."""
        for name in ("packed", "row_order", "column_order", "master", "residual"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value.to(device))

    def base(self) -> Tensor:
        """The values of the tuned field that the file holds: fp32, (rows, values)."""
        at = self.block.offset_at if self.part is Part.OFFSET else self.block.scale_at
        assert at is not None
        return self.block.field(self.packed[:, :: self.share], at)

    def unit(self) -> Tensor:
        """What a move of 1 means for each value: fp32, (rows, values); all ones where moves are absolute."""
        if not self.relative:
            return torch.ones(self.rows, self.values, device=self.packed.device)
        if self.part is Part.OFFSET and self.block.offset_unit is not None:
            return self.block.field(self.packed[:, :: self.share], self.block.scale_at).abs() * self.block.offset_unit
        return self.base().abs()

    def tune(self, part: Part | str, *, relative: bool = True) -> None:
        """Choose what is tuned; a block value gets an fp32 master, starting at the file's values."""
        self.part = Part(part)
        if self.part is not Part.CODE:
            one_value = self.block.offset_at is None or self.block.has_zero_point or self.part is Part.CODEBOOK
            self.part = Part.SCALE if one_value else self.part
            self.relative = relative
            self.master = self.base()


@dataclass(eq=False)
class CodebookTensor(QuantTensor):
    """A weight matrix whose codes stand for vectors (AQLM): a row is its scale times, for each group of columns, the sum of the
    vectors that the group's codes name, one in each codebook.

    Attributes:
        packed: int8 or int16, (rows, groups, codebooks), as in the file: codes modulo the entries of a codebook.
        block: of one group; of its fields only name and size are read.
        scales: fp32, (rows, 1).
        codebooks: the file's own type, (codebooks, entries, size).
        master: fp32, (rows, 1) where scales are tuned, or (codebooks * entries, size) where codebooks are.
    """

    scales: Tensor = field(kw_only=True, repr=False)
    codebooks: Tensor = field(kw_only=True, repr=False)

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.codebooks.nbytes

    @property
    def values(self) -> int:
        return 1

    @property
    def has_codes(self) -> bool:
        return False

    @property
    def has_integers(self) -> bool:
        return False

    @property
    def is_centred(self) -> bool:
        return True

    @property
    def has_offset(self) -> bool:
        return False

    @property
    def keeps_sign(self) -> bool:
        return self.part is not Part.CODEBOOK

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.scales, self.codebooks = self.scales.to(device), self.codebooks.to(device)

    def base(self) -> Tensor:
        return self.codebooks.float().flatten(0, 1) if self.part is Part.CODEBOOK else self.scales

    def unit(self) -> Tensor:
        """As of a matrix in blocks; for an entry, its codebook's mean size."""
        base = self.base()
        if not self.relative:
            return torch.ones_like(base)
        if self.part is Part.CODEBOOK:
            return self.codebooks.float().abs().mean((1, 2), keepdim=True).expand(self.codebooks.shape).flatten(0, 1)
        return base.abs()

    def tune(self, part: Part | str, *, relative: bool = True) -> None:
        self.part = Part.CODEBOOK if part == Part.CODEBOOK else Part.SCALE
        self.relative, self.master = relative, self.base().clone()
