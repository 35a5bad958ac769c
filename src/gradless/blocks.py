"""Quantization blocks, ggml's and our own: how codes, scales and offsets lie in their bytes.

Every type we tune is read as one formula. A block of `size` weights has `groups` equal groups; for a weight of group g

    w = (d * multiplier_g) * code + m * offset_multiplier_g

d and m are the block's fp16 fields, the values that QZO tunes; codes and multipliers are integers and stay as they are.
In the simple types (Q4_0 .. Q8_0) there is one group and both multipliers are 1. In the K-quants m is `dmin` and the
offset multiplier is minus the group's 4- or 6-bit minimum. Types without an m have `offset_at` None.

Our own types (`grid_block`) hold the codes of any grid: d, then what else there is, then the codes, two in a byte where the
grid has at most 16 levels (every 16 bytes hold 32 codes: the low nibbles first). Where the grid is not uniform, `code` in the
formula is the level that the code stands for. What else there is: nothing; an m; or a zero point, w = d * (code - zero), which
is the formula with m = d and minus the zero point for its multiplier. Where d was fp32 in the file it is here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradless.grids import GRIDS, Grid


class Unpacked(NamedTuple):
    """The integers of n blocks, all fp32 (exact)."""

    codes: Tensor  # (n, groups, size / groups), zero point already subtracted
    multiplier: Tensor  # (n, groups)
    offset_multiplier: Tensor  # (n, groups); unused where the type has no offset


@dataclass(frozen=True)
class BlockType:
    """One type of block.

    Attributes:
        name: ggml's name, or our own.
        index: the number by which the C++ kernels know it.
        size: weights in a block.
        nbytes: bytes of a block.
        scale_at: byte offset of the scale d.
        offset_at: byte offset of the fp16 offset m, or None; that of d where m is d itself (zero points).
        codes: the lowest and the highest code.
        offset_unit: what a relative step of the offset is measured in, as a multiple of |d| (half the largest code, so
            that it shifts the block's mean as far as the same step of the scale does); None: a multiple of |m| itself.
        unpack: (n, nbytes) uint8 -> the blocks' integers.
        levels: what each code stands for, from the lowest on; None where codes are their own levels.
        scale_type: of d, fp16 or fp32.
    """

    name: str
    index: int
    size: int
    nbytes: int
    scale_at: int
    offset_at: int | None
    codes: tuple[int, int]
    offset_unit: float | None
    unpack: Callable[[Tensor], Unpacked]
    levels: tuple[float, ...] | None = None
    scale_type: torch.dtype = torch.float16

    @property
    def fields(self) -> dict[int, torch.dtype]:
        """Where the tuned fields lie and of which type they are; d comes last."""
        return ({} if self.offset_at is None else {self.offset_at: torch.float16}) | {self.scale_at: self.scale_type}

    @property
    def has_zero_point(self) -> bool:
        """Whether m is d itself: one value moves both."""
        return self.offset_at == self.scale_at

    @property
    def is_centred(self) -> bool:
        """Whether d multiplies numbers of both signs. Where it multiplies codes from zero on, the same relative step of d moves
        the weights two to three times as far, measured by their spread, for it shifts their mean too."""
        return self.has_zero_point or self.grid.levels[0] < 0

    @cached_property
    def grid(self) -> Grid:
        """The levels of its codes."""
        lowest, highest = self.codes
        return Grid(self.name, lowest, self.levels or tuple(map(float, range(lowest, highest + 1))))

    def step(self, packed: Tensor) -> float:
        """The mean size of a grid step in blocks (n, nbytes) uint8, in units of the weights."""
        multiplier = self.unpack(packed).multiplier.abs().mean(1)
        span = self.grid.levels[-1] - self.grid.levels[0]
        return float((self.field(packed, self.scale_at).abs() * multiplier).mean()) * span / self.grid.length

    def level(self, codes: Tensor) -> Tensor:
        """What codes stand for: fp32 of any shape; on a grid that is not uniform, codes beyond its ends are its ends."""
        if self.levels is None:
            return codes
        lowest, highest = self.codes
        return torch.tensor(self.levels, device=codes.device)[(codes.clamp(lowest, highest) - lowest).long()]

    def field(self, packed: Tensor, at: int) -> Tensor:
        """The field at byte `at` of blocks (..., nbytes) uint8, as fp32 (...)."""
        dtype = self.fields[at]
        return packed[..., at : at + dtype.itemsize].contiguous().view(dtype).squeeze(-1).float()

    def pack(self, packed: Tensor, codes: Tensor) -> Tensor:
        """Blocks with other codes and the same fields: (n, nbytes) uint8 and (n, size) codes -> (n, nbytes) uint8."""
        zero, pieces = self.layout()
        raw, kept = codes.to(torch.int32) - zero, packed.to(torch.int32)
        for byte, low, code_low, width in zip(*(field.to(packed.device) for field in pieces), strict=True):
            mask = ((1 << width) - 1) << low
            held = torch.zeros(self.nbytes, dtype=torch.int32, device=packed.device).index_add_(0, byte, mask)
            kept = (kept & ~held).index_add_(1, byte, (raw >> code_low << low) & mask)
        return kept.to(torch.uint8)

    @cache  # noqa: B019  (a handful of types, for ever)
    def layout(self) -> tuple[int, Pieces]:
        """The code that all-zero bits stand for, and where each code's bits lie: read off `unpack`, bit by bit."""
        one_bit = torch.zeros(8 * self.nbytes + 1, self.nbytes, dtype=torch.uint8)
        for bit in range(8 * self.nbytes):
            one_bit[bit, bit // 8] = 1 << bit % 8
        codes = self.unpack(one_bit).codes.flatten(1).int()
        zero = int(codes[-1, 0])
        value = (codes[:-1] - zero) & 0xFF
        runs: list[list[list[int]]] = [[] for _ in range(self.size)]  # of each code: [byte, low, code_low, width]
        for bit, i in value.nonzero().tolist():
            place = int(value[bit, i]).bit_length() - 1
            last = runs[i][-1] if runs[i] else None
            if last and last[0] == bit // 8 and last[1] + last[3] == bit % 8 and last[2] + last[3] == place:
                last[3] += 1
            else:
                runs[i].append([bit // 8, bit % 8, place, 1])
        assert max(map(len, runs)) <= 2
        filled = torch.tensor([[*each, [each[0][0], 0, 0, 0]][:2] for each in runs], dtype=torch.int32)
        return zero, Pieces(*(field.T.contiguous() for field in filled.unbind(-1)))


class Pieces(NamedTuple):
    """Where the bits of a block's codes lie: each code in at most two runs of bits, all int32 (2, size)."""

    byte: Tensor  # of the block
    low: Tensor  # the run's lowest bit in that byte
    code_low: Tensor  # and in the code
    width: Tensor  # its bits; 0 for a code of one run only


def _nibbles(q: Tensor) -> Tensor:
    """(n, k) bytes -> (n, 2k): all low nibbles, then all high ones."""
    return torch.cat([q & 15, q >> 4], dim=1)


def _fifth_bits(qh: Tensor) -> Tensor:
    """(n, 4) bytes -> (n, 32): bit i of the little-endian 32-bit word, times 16."""
    return ((qh.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=qh.device)) & 1).flatten(1) << 4


def _simple(codes: Tensor, zero: int) -> Unpacked:
    one = torch.ones(codes.shape[0], 1, device=codes.device)
    return Unpacked((codes.float() - zero).unsqueeze(1), one, one)


def _grouped(codes: Tensor, zero: int, multiplier: Tensor, minimum: Tensor | None = None) -> Unpacked:
    groups = multiplier.shape[1]
    offset = torch.zeros_like(multiplier, dtype=torch.float32) if minimum is None else -minimum.float()
    return Unpacked((codes.float() - zero).view(len(codes), groups, -1), multiplier.float(), offset)


def _q8_0(b: Tensor) -> Unpacked:
    return _simple(b[:, 2:].contiguous().view(torch.int8), 0)


def _q4_0(b: Tensor) -> Unpacked:
    return _simple(_nibbles(b[:, 2:]), 8)


def _q4_1(b: Tensor) -> Unpacked:
    return _simple(_nibbles(b[:, 4:]), 0)


def _q5_0(b: Tensor) -> Unpacked:
    return _simple(_nibbles(b[:, 6:]) | _fifth_bits(b[:, 2:6]), 16)


def _q5_1(b: Tensor) -> Unpacked:
    return _simple(_nibbles(b[:, 8:]) | _fifth_bits(b[:, 4:8]), 0)


def _two_bits(qs: Tensor) -> Tensor:
    """(n, 64) bytes -> (n, 256) codes: each half of 32 bytes holds four planes of 32."""
    half = qs.view(-1, 2, 1, 32)
    return ((half >> torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=qs.device).view(4, 1)) & 3).flatten(1)


def _q2_k(b: Tensor) -> Unpacked:
    scales = b[:, :16]
    return _grouped(_two_bits(b[:, 16:80]), 0, scales & 15, scales >> 4)


def _q3_k(b: Tensor) -> Unpacked:
    hmask, s = b[:, :32], b[:, 96:108]
    planes = torch.arange(8, dtype=torch.uint8, device=b.device).view(8, 1)
    high = ((hmask.unsqueeze(1) >> planes) & 1).flatten(1) << 2
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).view(4, 1)
    multiplier = _nibbles(s[:, :8]) | ((s[:, 8:].unsqueeze(1) >> pairs & 3).flatten(1) << 4)
    return _grouped(_two_bits(b[:, 32:96]) | high, 4, multiplier.float() - 32)


def _k_scales(s: Tensor) -> tuple[Tensor, Tensor]:
    """The eight 6-bit scales and minima that Q4_K and Q5_K keep in 12 bytes: both (n, 8)."""
    low, mid, high = s[:, :4], s[:, 4:8], s[:, 8:]
    multiplier = torch.cat([low & 63, (high & 15) | (low >> 6 << 4)], dim=1)
    minimum = torch.cat([mid & 63, (high >> 4) | (mid >> 6 << 4)], dim=1)
    return multiplier, minimum


def _four_bits(qs: Tensor) -> Tensor:
    """(n, 128) bytes -> (n, 256) codes: every 32 bytes hold 32 low nibbles, then 32 high ones."""
    run = qs.view(-1, 4, 32)
    return torch.cat([run & 15, run >> 4], dim=2).flatten(1)


def _q4_k(b: Tensor) -> Unpacked:
    return _grouped(_four_bits(b[:, 16:]), 0, *_k_scales(b[:, 4:16]))


def _q5_k(b: Tensor) -> Unpacked:
    planes = torch.arange(8, dtype=torch.uint8, device=b.device).view(8, 1)
    high = ((b[:, 16:48].unsqueeze(1) >> planes) & 1).flatten(1) << 4
    return _grouped(_four_bits(b[:, 48:]) | high, 0, *_k_scales(b[:, 4:16]))


def _q6_k(b: Tensor) -> Unpacked:
    low = b[:, :128].view(-1, 2, 2, 32)
    low = torch.cat([low & 15, low >> 4], dim=2)
    pairs = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=b.device).view(4, 1)
    high = (b[:, 128:192].view(-1, 2, 1, 32) >> pairs) & 3
    return _grouped((low | high << 4).flatten(1), 32, b[:, 192:208].contiguous().view(torch.int8))


BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("Q4_0", 0, 32, 18, 0, None, (-8, 7), None, _q4_0),
        BlockType("Q4_1", 1, 32, 20, 0, 2, (0, 15), 7.5, _q4_1),
        BlockType("Q5_0", 2, 32, 22, 0, None, (-16, 15), None, _q5_0),
        BlockType("Q5_1", 3, 32, 24, 0, 2, (0, 31), 15.5, _q5_1),
        BlockType("Q8_0", 4, 32, 34, 0, None, (-127, 127), None, _q8_0),
        BlockType("Q2_K", 5, 256, 84, 80, 82, (0, 3), None, _q2_k),
        BlockType("Q3_K", 6, 256, 110, 108, None, (-4, 3), None, _q3_k),
        BlockType("Q4_K", 7, 256, 144, 0, 2, (0, 15), None, _q4_k),
        BlockType("Q5_K", 8, 256, 176, 0, 2, (0, 31), None, _q5_k),
        BlockType("Q6_K", 9, 256, 210, 208, None, (-32, 31), None, _q6_k),
    )
}


GROUP_SIZES = (64, 32)
"""Of our own blocks; a coarser range repeats its scale in every block."""


def dividing_size(*lengths: int) -> int | None:
    """The longest block of ours that divides all these lengths, or None."""
    return next((size for size in GROUP_SIZES if all(length % size == 0 for length in lengths)), None)


Form = Literal["", "offset", "zero", "fp32"]
"""What our own blocks hold beside an fp16 d and codes: nothing, an fp16 m, an int16 zero point; or d in fp32."""
ZERO_AT = 2
"""Byte offset of the zero point."""


@cache
def grid_block(grid: Grid, size: int, form: Form = "") -> BlockType:
    """Our own type for the codes of a grid, in blocks of 32 or 64.

    Levels of a grid that is not uniform are held as multiples of a power of two, so that an fp16 scale suits them.
    """
    few, signed = len(grid.levels) <= 16, grid.lowest < 0
    if few and not -8 <= grid.lowest <= grid.highest <= (7 if signed else 15):
        few = False
    kind = {"": (0 if signed else 1) if few else 3, "offset": 2 if few else 4, "zero": 6 - few, "fp32": 8 - few}[form]
    at = 4 if form else 2

    def unpack(b: Tensor) -> Unpacked:
        if few:
            runs = b[:, at:].reshape(-1, 16)
            codes = _simple(_nibbles(runs).view(len(b), size), 8 if signed and form == "" else 0)
        else:
            codes = _simple(b[:, at:].contiguous().view(torch.int8), 0)
        if form != "zero":
            return codes
        return codes._replace(offset_multiplier=-b[:, ZERO_AT : ZERO_AT + 2].contiguous().view(torch.int16).float())

    levels = None
    if not grid.uniform:
        unit = 2.0 ** math.floor(math.log2(max(grid.levels)))
        levels = tuple(level / unit for level in grid.levels)
    return BlockType(
        name="+".join(filter(None, (f"{grid.name}/{size}", form))),
        index=10 + 2 * kind + GROUP_SIZES.index(size),
        size=size,
        nbytes=at + (size // 2 if few else size),
        scale_at=0,
        offset_at={"offset": 2, "zero": 0}.get(form),
        codes=(grid.lowest, grid.highest),
        offset_unit=(7.5 if few else 127.5) if form == "offset" else None,
        unpack=unpack,
        levels=levels,
        scale_type=torch.float32 if form == "fp32" else torch.float16,
    )


def assemble(
    block: BlockType, codes: Tensor, scale: Tensor, *, offset: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Blocks of one of our own types from what they hold.

    Args:
        block: made by `grid_block`.
        codes: integers, (..., size).
        scale: (...), of values that its type holds.
        offset: (...), where the type has one.
        zero: integers, (...), where the type has one.

    Returns:
        uint8, (..., nbytes).
    """
    fields = [scale.to(block.scale_type)]
    if offset is not None:
        fields.append(offset.half())
    if zero is not None:
        fields.append(zero.to(torch.int16))
    raw = (codes - block.layout()[0]).to(torch.uint8)
    if block.nbytes - sum(field.dtype.itemsize for field in fields) < block.size:
        low, high = raw.view(*raw.shape[:-1], -1, 2, 16).unbind(-2)
        raw = (low | high << 4).flatten(-2)
    return torch.cat([*(field.unsqueeze(-1).contiguous().view(torch.uint8) for field in fields), raw], dim=-1)


def block_type(name: str) -> BlockType:
    """The type of this name, ggml's or our own.

    Raises:
        KeyError: there is none.
    """
    if name in BLOCK_TYPES:
        return BLOCK_TYPES[name]
    grid, _, rest = name.partition("/")
    size, _, form = rest.partition("+")
    if size not in map(str, GROUP_SIZES) or form not in get_args(Form):
        raise KeyError(name)
    return grid_block(GRIDS[grid], int(size), form)
