"""A packed weight matrix (`PackedWeight`), what is tuned of it (`Tuned`), and how forwards read it now (`Views`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gradless.blocks import BlockType
from gradless.errors import GradlessError
from gradless.noise import Direction, Signs

RESIDUAL_UNIT = 1 / 256
"""The unit of a residual in grid steps. A signed byte then reaches from half a step below its code to half a step above."""


class Move(NamedTuple):
    """x -> decay * x + coefficient * u: a query's view of a point x, and an update of it, are both one of these.

    Attributes:
        direction: which u, or the signs of a sum of several.
        coefficient: +eps or -eps in a query, -lr * d in an update; rounded to fp32 where it is used.
        decay: 1 - lr * weight_decay in an update, 1 in a query.
    """

    direction: Direction | Signs
    coefficient: float | Tensor
    decay: float = 1.0


class Part(StrEnum):
    """Which fp32 values of a weight are tuned."""

    SCALE = "scale"  # the d of each block
    OFFSET = "offset"  # the m of each block; types without an m fall back to d
    BOTH = "both"  # d and m by one factor: the Delta of QZO's equations
    CODEBOOK = "codebook"  # the entries of the weight's own codebooks


@dataclass(eq=False)
class TunedValues:
    """Values that are tuned in fp32 beside the packed bytes.

    Attributes:
        part: which values.
        relative: whether a move is measured in each value's own unit (`PackedWeight.unit`) or absolutely.
        values: fp32, (rows, values of a row), in file order; for codebooks (codebooks * entries, size).
    """

    part: Part
    relative: bool
    values: Tensor = field(repr=False)


@dataclass(eq=False)
class TunedCodes:
    """Integer codes that are tuned in place, in steps of their grid.

    Attributes:
        stride: the codes of file rows 0, stride, 2 * stride ... are tuned, and no others.
        clamp: whether a query's codes stop at the grid's ends; otherwise they are read in a wider integer.
        residual: int8, (tuned rows, columns), in file order: what updates still owe each code, in `RESIDUAL_UNIT`; None if
            every update is rounded to whole steps at once.
    """

    stride: int = 1
    clamp: bool = False
    residual: Tensor | None = field(default=None, repr=False)


Tuned = TunedValues | TunedCodes


@dataclass(frozen=True, eq=False)
class Views:
    """How forwards read a weight now.

    Attributes:
        moves: a forward reads the weight under each of these; as it is if there are none.
        example_of_token: int64, (tokens,): token i of the batch reads the weight under `moves[example_of_token[i]]`. None:
            each move serves an equal share of the tokens, in their order.
    """

    moves: tuple[Move, ...] = ()
    example_of_token: Tensor | None = None

    @property
    def count(self) -> int:
        """How many weights a forward reads: one for each move, or the weight as it is."""
        return max(1, len(self.moves))

    @property
    def shares(self) -> int:
        """Into how many equal shares a forward's tokens are divided."""
        return self.count if self.example_of_token is None else 1


UNMOVED = Views()
"""A weight is read as it is."""


class PackedWeight(ABC):
    """A weight matrix as its file packs it.

    Attributes:
        name: the tensor's name in its file; with the seed it determines the noise.
        packed: the codes as in the file, (rows, ...); written by updates of codes only (memory-mapped copy-on-write: the
            file itself never changes).
        row_order: int64, (rows,): the file row that model row i reads, or None for the same order. Noise follows the file.
        column_order: int64, (columns,): the model column that each packed column is, or None for the same order.
        tuned: what is tuned of it; None if nothing is.
        views: how forwards read it now.
        has_grid: whether its codes are steps of a grid.
        has_integers: whether its codes are their own levels.
        has_offset: whether a block holds an offset of its own.
        is_centred: whether its scales multiply numbers of both signs.
    """

    has_grid: bool
    has_integers: bool
    has_offset: bool
    is_centred: bool

    def __init__(self, name: str, packed: Tensor, column_order: Tensor | None = None) -> None:
        self.name, self.packed = name, packed
        self.row_order: Tensor | None = None
        self.column_order = column_order
        self.tuned: Tuned | None = None
        self.views = UNMOVED

    @property
    @abstractmethod
    def type_name(self) -> str:
        """The block type, or the codebooks' shape."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """Columns of the matrix."""

    @property
    @abstractmethod
    def values_per_row(self) -> int:
        """How many values of a row are tuned, unless codes or codebooks are."""

    @property
    @abstractmethod
    def columns_per_value(self) -> int:
        """How many neighbouring columns share a tuned value."""

    @property
    @abstractmethod
    def keeps_sign(self) -> bool:
        """Whether the tuned values are scales, which stop at zero instead of crossing it."""

    @abstractmethod
    def _tunable(self, part: Part) -> Part:
        """The part that is tuned if this one is asked for."""

    @abstractmethod
    def file_values(self, part: Part) -> Tensor:
        """The values that the file holds, of BOTH the scales: fp32, of the shape of `TunedValues.values`."""

    @abstractmethod
    def _relative_unit(self, part: Part) -> Tensor:
        """What a relative move of 1 means for each value: fp32, of the same shape."""

    @property
    def rows(self) -> int:
        return self.packed.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of what the file gave."""
        return self.packed.nbytes

    @property
    def file_rows(self) -> Tensor:
        """The file row behind each model row: int64, (rows,)."""
        return torch.arange(self.rows, device=self.packed.device) if self.row_order is None else self.row_order

    @property
    def part(self) -> Part | None:
        """Which values are tuned; None if none are."""
        return self.tuned.part if isinstance(self.tuned, TunedValues) else None

    @property
    def tuned_values(self) -> TunedValues:
        """What is tuned, if it is values.

        Raises:
            ValueError: it is codes, or nothing.
        """
        if not isinstance(self.tuned, TunedValues):
            raise ValueError(f"no values of {self.name} are tuned")
        return self.tuned

    @property
    def is_additive_offset(self) -> bool:
        """Whether a move adds a number to each weight of a group, so that sums of a token's inputs tell what it changes."""
        return self.part is Part.OFFSET and self.has_offset

    def in_blocks(self) -> BlockWeight:
        """The weight itself, if its codes are steps of a grid.

        Raises:
            GradlessError: its codes name vectors.
        """
        raise GradlessError(f"{self.name} is {self.type_name}, whose codes name vectors and are no steps of a grid.")

    def unit(self) -> Tensor:
        """What a move of 1 means for each tuned value: fp32, of their shape; all ones if moves are absolute."""
        tuned = self.tuned_values
        return self._relative_unit(tuned.part) if tuned.relative else torch.ones_like(tuned.values)

    def tune(self, part: Part | str, *, relative: bool = True) -> None:
        """Tune values, beginning with the file's; see `TunedValues`."""
        part = self._tunable(Part(part))
        self.tuned = TunedValues(part, relative, self.file_values(part).clone())

    def under(self, *moves: Move) -> Self:
        """This weight as forwards would read it under these moves, or as it is if there are none; it shares all memory."""
        other = copy(self)
        other.views = Views(moves)
        return other

    def at(self, values: Tensor) -> Self:
        """This weight as if its tuned values were these, under no moves; it shares all other memory."""
        other = self.under()
        other.tuned = replace(self.tuned_values, values=values)
        return other

    @contextmanager
    def read_at(self, values: Tensor) -> Iterator[None]:
        """Inside the context everything reads these values in place of the tuned ones, and writes them."""
        tuned = self.tuned_values
        self.tuned = replace(tuned, values=values)
        try:
            yield
        finally:
            self.tuned = tuned

    def to(self, device: torch.device) -> None:
        """Move everything it holds to a device."""
        self.packed = self.packed.to(device)
        self.row_order = None if self.row_order is None else self.row_order.to(device)
        self.column_order = None if self.column_order is None else self.column_order.to(device)
        match self.tuned:
            case TunedValues() as tuned:
                tuned.values = tuned.values.to(device)
            case TunedCodes(residual=Tensor() as residual) as tuned:
                tuned.residual = residual.to(device)


class BlockWeight(PackedWeight):
    """A weight matrix in blocks along its rows.

    Attributes:
        packed: uint8, (rows, blocks, block.nbytes).
        block: the block type.
        blocks_per_value: how many consecutive blocks of a row share one tuned value (a file's group may be longer than a
            block).
    """

    def __init__(
        self,
        name: str,
        block: BlockType,
        packed: Tensor,
        *,
        column_order: Tensor | None = None,
        blocks_per_value: int = 1,
    ) -> None:
        super().__init__(name, packed, column_order)
        self.block, self.blocks_per_value = block, blocks_per_value
        self.has_grid, self.has_integers = True, block.levels is None
        self.has_offset = block.offset_at is not None and not block.has_zero_point
        self.is_centred = block.is_centred

    @property
    def type_name(self) -> str:
        return self.block.name

    @property
    def columns(self) -> int:
        return self.packed.shape[1] * self.block.size

    @property
    def values_per_row(self) -> int:
        return -(-self.packed.shape[1] // self.blocks_per_value)

    @property
    def columns_per_value(self) -> int:
        return min(self.columns, self.blocks_per_value * self.block.size)

    @property
    def keeps_sign(self) -> bool:
        return self.part is not Part.OFFSET or self.block.offset_unit is None

    @property
    def tuned_codes(self) -> TunedCodes:
        """What is tuned, if it is codes.

        Raises:
            ValueError: it is values, or nothing.
        """
        if not isinstance(self.tuned, TunedCodes):
            raise ValueError(f"no codes of {self.name} are tuned")
        return self.tuned

    @property
    def tuned_rows(self) -> int:
        """How many rows have codes that are tuned."""
        return -(-self.rows // self.tuned_codes.stride)

    def in_blocks(self) -> BlockWeight:
        return self

    def _tunable(self, part: Part) -> Part:
        return part if self.has_offset and part is not Part.CODEBOOK else Part.SCALE

    def file_values(self, part: Part) -> Tensor:
        at = self.block.offset_at if part is Part.OFFSET else self.block.scale_at
        assert at is not None
        return self.block.field(self.packed[:, :: self.blocks_per_value], at)

    def _relative_unit(self, part: Part) -> Tensor:
        if part is Part.OFFSET and self.block.offset_unit is not None:
            return self.file_values(Part.SCALE).abs() * self.block.offset_unit
        return self.file_values(part).abs()


class CodebookWeight(PackedWeight):
    """A weight matrix whose codes name vectors (AQLM): a row is its scale times, for each group of columns, the sum of the
    vectors that the group's codes name, one in each codebook.

    Attributes:
        packed: int8 or int16, (rows, groups, codebooks): codes modulo the entries of a codebook.
        scales: fp32, (rows, 1).
        codebooks: the file's own type, (codebooks, entries, size).
    """

    def __init__(self, name: str, packed: Tensor, scales: Tensor, codebooks: Tensor) -> None:
        super().__init__(name, packed)
        self.scales, self.codebooks = scales, codebooks
        self.has_grid = self.has_integers = self.has_offset = False
        self.is_centred = True

    @property
    def type_name(self) -> str:
        codebooks, entries, size = self.codebooks.shape
        return f"{codebooks}x{(entries - 1).bit_length()}/{size}"

    @property
    def columns(self) -> int:
        return self.packed.shape[1] * self.codebooks.shape[2]

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes + self.scales.nbytes + self.codebooks.nbytes

    @property
    def values_per_row(self) -> int:
        return 1

    @property
    def columns_per_value(self) -> int:
        return self.columns

    @property
    def keeps_sign(self) -> bool:
        return self.part is not Part.CODEBOOK

    def _tunable(self, part: Part) -> Part:
        return Part.CODEBOOK if part is Part.CODEBOOK else Part.SCALE

    def file_values(self, part: Part) -> Tensor:
        return self.codebooks.float().flatten(0, 1) if part is Part.CODEBOOK else self.scales

    def _relative_unit(self, part: Part) -> Tensor:
        """The size of each scale; for an entry, the mean size of its codebook's numbers."""
        if part is Part.CODEBOOK:
            return self.codebooks.float().abs().mean((1, 2), keepdim=True).expand(self.codebooks.shape).flatten(0, 1)
        return self.scales.abs()

    def to(self, device: torch.device) -> None:
        super().to(device)
        self.scales, self.codebooks = self.scales.to(device), self.codebooks.to(device)
