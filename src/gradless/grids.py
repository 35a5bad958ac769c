"""Number formats as ordered levels.

A grid is a finite set of levels in ascending order, in units of a scale. A code is a level's place in that order; on an integer
grid it is the level itself. Tuning codes means moving along that order, one level up or down, whatever the distance between two
levels is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
import torch
from torch import Tensor

from gradless.noise import Words, uniform


@dataclass(frozen=True)
class Grid:
    """Ordered levels.

    Attributes:
        name: the format's name.
        lowest: the code of the first level.
        levels: ascending, in units of the scale.
    """

    name: str
    lowest: int
    levels: tuple[float, ...]

    @property
    def highest(self) -> int:
        """The code of the last level."""
        return self.lowest + len(self.levels) - 1

    @cached_property
    def uniform(self) -> bool:
        """Whether every level is its own code."""
        return self.levels == tuple(range(self.lowest, self.highest + 1))

    @cached_property
    def length(self) -> float:
        """Number of steps from end to end, if all were as long as those a third of the way out from zero. Most weights lie
        there: the largest of 64 normal values is about three times their standard deviation."""
        third = next(i for i, level in enumerate(self.levels) if 3 * level >= self.levels[-1])
        return (self.levels[-1] - self.levels[0]) / (self.levels[third] - self.levels[third - 1])

    @property
    def symmetric(self) -> bool:
        """Whether the levels reach as far below zero as above."""
        return self.levels[0] == -self.levels[-1]

    def table(self, device: torch.device | str = "cpu") -> Tensor:
        """The levels: fp32, (n,)."""
        return _table(self.levels, device)

    def values(self, codes: Tensor) -> Tensor:
        """The levels of codes: integers of any shape -> fp32."""
        return self.table(codes.device)[(codes - self.lowest).long()]

    def nearest(self, x: Tensor) -> Tensor:
        """Codes of the nearest levels, ties to even codes, saturating: fp32 of any shape -> int64."""
        if self.uniform:
            return x.round().clamp(self.lowest, self.highest).long()
        below, share = self._neighbours(x)
        odd = (below + self.lowest) % 2 == 1
        return below + ((share > 0.5) | ((share == 0.5) & odd)) + self.lowest

    def stochastic(self, x: Tensor, words: Words, start: int = 0) -> Tensor:
        """Codes of one of the two neighbouring levels, drawn so that E[values(codes)] = x inside the grid; saturating.

        Args:
            x: fp32, any shape, in units of the scale; element i of its flattened order takes draw start + i.
            words: the random words.
        """
        below, share = self._neighbours(x)
        r = uniform(words, start, x.numel(), x.device).view_as(x)
        return below + (r < share) + self.lowest

    def step(self, codes: Tensor, k: Tensor | int) -> Tensor:
        """The codes k levels up (down if k is negative), stopped at the grid's ends."""
        return (codes + k).clamp(self.lowest, self.highest)

    def _neighbours(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the level at or below x, int64, and the position of x between it and the next one, fp32 in [0, 1]."""
        table = self.table(x.device)
        x = x.clamp(table[0], table[-1])
        below = (torch.searchsorted(table, x.contiguous(), right=True) - 1).clamp(0, len(table) - 2)
        low, high = table[below], table[below + 1]
        return below, (x - low) / (high - low)


@cache
def _table(levels: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(levels, dtype=torch.float32, device=device)


@cache
def integers(bits: int, *, symmetric: bool = True) -> Grid:
    """int2 to int8: -(2**(b-1) - 1) .. 2**(b-1) - 1 if symmetric, else all 2**b (0 .. 2**b - 1; 8 bits: -128 .. 127)."""
    if not 2 <= bits <= 8:
        raise ValueError(f"integers of {bits} bits: 2 to 8 are supported")
    top = 2 ** (bits - 1) - 1
    if symmetric:
        return Grid(f"int{bits}", -top, tuple(map(float, range(-top, top + 1))))
    lowest = -128 if bits == 8 else 0  # codes are signed bytes
    return Grid(f"uint{bits}", lowest, tuple(map(float, range(lowest, lowest + 2**bits))))


def mid_tread(bits: int, low: float, high: float) -> tuple[Grid, float]:
    """ZOQO's grid over [low, high]: the multiples of s = (high - low) / (2**b - 1) that lie inside, zero among them.

    Returns:
        The grid, in units of s, and s.
    """
    if not low <= 0 <= high or low == high:
        raise ValueError(f"a mid-tread grid needs a range around zero, not [{low}, {high}]")
    s = (high - low) / (2**bits - 1)
    first, last = -int(-low / s + 1e-9), int(high / s + 1e-9)
    return Grid(f"mid-tread int{bits}", first, tuple(map(float, range(first, last + 1)))), s


@cache
def floating(dtype: torch.dtype) -> Grid:
    """The finite values of an 8-bit floating-point type, in order; a code is the byte without sign bit, or minus that."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    positive = values[:128][torch.isfinite(values[:128])].tolist()
    levels = [-value for value in reversed(positive[1:])] + positive
    return Grid({torch.float8_e4m3fn: "fp8-e4m3", torch.float8_e5m2: "fp8-e5m2"}[dtype], 1 - len(positive), tuple(levels))


def codebook(name: str, levels: tuple[float, ...]) -> Grid:
    """A grid of any sorted levels."""
    if sorted(set(levels)) != list(levels) or not 2 <= len(levels) <= 256:
        raise ValueError("a codebook is 2 to 256 different levels in ascending order")
    return Grid(name, 0, levels)


# The quantiles of QLoRA (arXiv 2305.14314, appendix E), normalized to [-1, 1].
NF4 = codebook(
    "nf4",
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
)

# bitsandbytes' 4-bit floats, in twelfths; their two zeros are one level here.
_FP4 = (0.0625, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
FP4 = codebook("fp4", tuple(float(np.float32(level / 12)) for level in (*(-x for x in reversed(_FP4)), 0.0, *_FP4)))

GRIDS: dict[str, Grid] = {
    **{grid.name: grid for bits in range(2, 9) for grid in (integers(bits), integers(bits, symmetric=False))},
    **{grid.name: grid for grid in (floating(torch.float8_e4m3fn), floating(torch.float8_e5m2), NF4, FP4)},
}
"""The named grids."""


def scale_and_offset(x: Tensor, grid: Grid, *, search: bool = False) -> tuple[Tensor, Tensor]:
    """The affine map from levels to values, group by group.

    Args:
        x: fp32, (groups, n): the values of each group.
        grid: the levels; a symmetric grid gets no offset.
        search: try ranges down to half of the largest value and keep each group's best by squared error.

    Returns:
        Scale and offset, fp32 (groups,): value = scale * level + offset.
    """
    levels = grid.table(x.device)
    if grid.symmetric:
        middle, reach = torch.zeros(len(x), device=x.device), x.abs().amax(1)
        centre, half = levels.new_zeros(()), levels.abs().max()
    else:
        middle, reach = (x.amax(1) + x.amin(1)) / 2, (x.amax(1) - x.amin(1)) / 2
        centre, half = (levels[-1] + levels[0]) / 2, (levels[-1] - levels[0]) / 2

    def affine(shrink: Tensor | float) -> tuple[Tensor, Tensor]:
        scale = torch.where(reach == 0, 1.0, reach * shrink / half)
        return scale, torch.where(reach == 0, middle - grid.values(grid.nearest(centre)), middle - scale * centre)

    best = torch.full((len(x),), torch.inf, device=x.device)
    chosen = torch.ones(len(x), device=x.device)
    for shrink in torch.linspace(1.0, 0.5, 26).tolist() if search else [1.0]:
        error = (round_trip(x, grid, *affine(shrink)) - x).square().sum(1)
        better = error < best
        best, chosen = torch.where(better, error, best), torch.where(better, shrink, chosen)
    return affine(chosen)


def round_trip(x: Tensor, grid: Grid, scale: Tensor, offset: Tensor) -> Tensor:
    """x, fp32 (groups, n), rounded to the grid."""
    codes = grid.nearest((x - offset.unsqueeze(1)) / scale.unsqueeze(1))
    return grid.values(codes) * scale.unsqueeze(1) + offset.unsqueeze(1)


def lora_scale(a: Tensor, grid: Grid) -> float:
    """One scale for both factors of an adapter. Its range is twice A's, because B starts at zero and needs room. If the grid
    has one level on each side, it is A's, because A would round to nothing in a larger one."""
    room = 2 if len(grid.levels) > 3 else 1
    return room * float(a.abs().max()) / float(grid.table().abs().max())
