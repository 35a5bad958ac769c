"""Quantization blocks, ggml's and our own: how codes, scales and offsets lie in their bytes.

Every type that we tune is read by one formula. A block of `size` weights has `groups` equal groups. For a weight of group g

    w = (d * multiplier_g) * code + m * offset_multiplier_g

d and m are the block's fp16 fields, the values that QZO tunes. Codes and multipliers are integers and stay as they are.
The simple types (Q4_0 .. Q8_0) have one group, and both multipliers are 1. In the K-quants m is `dmin`, and the offset
multiplier is minus the group's 4- or 6-bit minimum. In IQ4_NL `code` in the formula is the level that the code stands for.
Types without an m have `offset_at` None.

Our own types (`grid_block`) hold the codes of any grid: d, then at most one more field, then the codes, two in a byte if the
grid has at most 16 levels (every 16 bytes hold 32 codes: the low nibbles first). If the grid is not uniform, `code` in the
formula is the level again. The other field is an m, or a zero point: w = d * (code - zero), which is the formula with m = d
and minus the zero point for its multiplier. A d that is fp32 in the file is fp32 here.

Over 400 lines, because the types are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass
from enum import IntEnum, auto
from functools import cache, cached_property
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from gradless.grids import GRIDS, Grid


class Kind(IntEnum):
    """How codes and fields lie in a block. The compiled kernels list the same kinds in the same order (`KINDS` in native.cpp);
    the two lists are compared when the library is loaded.

    Our own kinds are named by their codes (nibbles from -8, nibbles from 0, or signed bytes), the other field, and the size.
    """

    Q4_0 = 0
    Q4_1 = auto()
    Q5_0 = auto()
    Q5_1 = auto()
    Q8_0 = auto()
    Q2_K = auto()
    Q3_K = auto()
    Q4_K = auto()
    Q5_K = auto()
    Q6_K = auto()
    IQ4_NL = auto()
    SIGNED_NIBBLES_64 = auto()
    SIGNED_NIBBLES_32 = auto()
    NIBBLES_64 = auto()
    NIBBLES_32 = auto()
    NIBBLES_OFFSET_64 = auto()
    NIBBLES_OFFSET_32 = auto()
    NIBBLES_ZERO_64 = auto()
    NIBBLES_ZERO_32 = auto()
    NIBBLES_FP32_64 = auto()
    NIBBLES_FP32_32 = auto()
    BYTES_64 = auto()
    BYTES_32 = auto()
    BYTES_OFFSET_64 = auto()
    BYTES_OFFSET_32 = auto()
    BYTES_ZERO_64 = auto()
    BYTES_ZERO_32 = auto()
    BYTES_FP32_64 = auto()
    BYTES_FP32_32 = auto()


class Unpacked(NamedTuple):
    """The integers of n blocks, all fp32 (exact)."""

    codes: Tensor  # (n, groups, size / groups), zero point already subtracted
    multiplier: Tensor  # (n, groups)
    offset_multiplier: Tensor  # (n, groups); unused if the type has no offset


@dataclass(frozen=True)
class BlockType:
    """One type of block.

    Attributes:
        name: ggml's name, or our own.
        kind: the kind by which compiled kernels know it.
        size: weights in a block.
        nbytes: bytes of a block.
        scale_at: byte offset of the scale d.
        offset_at: byte offset of the fp16 offset m, or None; the offset of d if m is d itself (zero points).
        codes: the lowest and the highest code.
        unpack: (n, nbytes) uint8 -> the blocks' integers.
        offset_unit: the unit of a relative step of the offset, as a multiple of |d| (half the largest code, so that a step
            shifts the block's mean as far as the same step of the scale does); None: the unit is |m| itself.
        levels: the level of each code, from the lowest code on; None if codes are their own levels.
        scale_type: the type of d, fp16 or fp32.
    """

    name: str
    kind: Kind
    _: KW_ONLY
    size: int
    nbytes: int
    scale_at: int
    offset_at: int | None = None
    codes: tuple[int, int]
    unpack: Callable[[Tensor], Unpacked]
    offset_unit: float | None = None
    levels: tuple[float, ...] | None = None
    scale_type: torch.dtype = torch.float16

    @property
    def fields(self) -> dict[int, torch.dtype]:
        """The byte offsets and types of the tuned fields; d comes last."""
        return ({} if self.offset_at is None else {self.offset_at: torch.float16}) | {self.scale_at: self.scale_type}

    @property
    def has_zero_point(self) -> bool:
        """Whether m is d itself: one value moves both."""
        return self.offset_at == self.scale_at

    @property
    def is_centred(self) -> bool:
        """Whether d multiplies numbers of both signs. If it multiplies codes from zero on, the same relative step of d moves
        weights two to three times as far, measured by their spread, because it shifts their mean too."""
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
        """The levels of codes: fp32 of any shape. On a grid that is not uniform, codes beyond its ends count as its ends."""
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
            masks = torch.zeros(self.nbytes, dtype=torch.int32, device=packed.device).index_add_(0, byte, mask)
            kept = (kept & ~masks).index_add_(1, byte, (raw >> code_low << low) & mask)
        return kept.to(torch.uint8)

    @cache  # noqa: B019  (a handful of types, for ever)
    def layout(self) -> tuple[int, Pieces]:
        """The code of all-zero bits, and the places of each code's bits: found by unpacking blocks of a single one bit."""
        one_bit = torch.zeros(8 * self.nbytes + 1, self.nbytes, dtype=torch.uint8)
        for bit in range(8 * self.nbytes):
            one_bit[bit, bit // 8] = 1 << bit % 8
        codes = self.unpack(one_bit).codes.flatten(1).int()
        zero = int(codes[-1, 0])
        value = (codes[:-1] - zero) & 0xFF
        runs: list[list[list[int]]] = [[] for _ in range(self.size)]  # for each code: [byte, low, code_low, width]
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

    byte: Tensor  # the byte of the block
    low: Tensor  # the run's lowest bit in that byte
    code_low: Tensor  # the run's lowest bit in the code
    width: Tensor  # the number of bits; 0 for the second run of a code that has only one


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


def _iq4_nl(b: Tensor) -> Unpacked:
    return _simple(_nibbles(b[:, 2:]), 0)


IQ4_NL_LEVELS = tuple(map(float, (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)))
"""The levels of IQ4_NL's codes (ggml's `kvalues_iq4nl`)."""
BLOCK_TYPES = {
    block.name: block
    for block in (
        BlockType("Q4_0", Kind.Q4_0, size=32, nbytes=18, scale_at=0, codes=(-8, 7), unpack=_q4_0),
        BlockType("Q4_1", Kind.Q4_1, size=32, nbytes=20, scale_at=0, offset_at=2, codes=(0, 15), unpack=_q4_1, offset_unit=7.5),
        BlockType("Q5_0", Kind.Q5_0, size=32, nbytes=22, scale_at=0, codes=(-16, 15), unpack=_q5_0),
        BlockType(
            "Q5_1", Kind.Q5_1, size=32, nbytes=24, scale_at=0, offset_at=2, codes=(0, 31), unpack=_q5_1, offset_unit=15.5
        ),
        BlockType("Q8_0", Kind.Q8_0, size=32, nbytes=34, scale_at=0, codes=(-127, 127), unpack=_q8_0),
        BlockType("Q2_K", Kind.Q2_K, size=256, nbytes=84, scale_at=80, offset_at=82, codes=(0, 3), unpack=_q2_k),
        BlockType("Q3_K", Kind.Q3_K, size=256, nbytes=110, scale_at=108, codes=(-4, 3), unpack=_q3_k),
        BlockType("Q4_K", Kind.Q4_K, size=256, nbytes=144, scale_at=0, offset_at=2, codes=(0, 15), unpack=_q4_k),
        BlockType("Q5_K", Kind.Q5_K, size=256, nbytes=176, scale_at=0, offset_at=2, codes=(0, 31), unpack=_q5_k),
        BlockType("Q6_K", Kind.Q6_K, size=256, nbytes=210, scale_at=208, codes=(-32, 31), unpack=_q6_k),
        BlockType("IQ4_NL", Kind.IQ4_NL, size=32, nbytes=18, scale_at=0, codes=(0, 15), unpack=_iq4_nl, levels=IQ4_NL_LEVELS),
    )
}
"""ggml's types, by its names."""


GROUP_SIZES = (64, 32)
"""The sizes of our own blocks. If more weights share a scale, it is repeated in every block."""


def dividing_size(*lengths: int) -> int | None:
    """The size of our longest block that divides all these lengths, or None."""
    return next((size for size in GROUP_SIZES if all(length % size == 0 for length in lengths)), None)


Form = Literal["", "offset", "zero", "fp32"]
"""The fields of our own blocks before the codes: an fp16 d; d and an fp16 m; d and an int16 zero point; or an fp32 d."""
ZERO_AT = 2
"""The byte offset of the zero point."""


@cache
def grid_block(grid: Grid, size: int, form: Form = "") -> BlockType:
    """Our own type for the codes of a grid, in blocks of 32 or 64.

    Levels of a grid that is not uniform are multiples of a power of two, so that an fp16 scale suits them.
    """
    in_nibbles = len(grid.levels) <= 16 and -8 <= grid.lowest <= grid.highest <= (7 if grid.lowest < 0 else 15)
    signed_nibbles = in_nibbles and grid.lowest < 0 and form == ""
    codes_in = "SIGNED_NIBBLES" if signed_nibbles else "NIBBLES" if in_nibbles else "BYTES"
    at = 4 if form else 2

    def unpack(b: Tensor) -> Unpacked:
        if in_nibbles:
            runs = b[:, at:].reshape(-1, 16)
            codes = _simple(_nibbles(runs).view(len(b), size), 8 if signed_nibbles else 0)
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
        kind=Kind["_".join(filter(None, (codes_in, form.upper(), str(size))))],
        size=size,
        nbytes=at + (size // 2 if in_nibbles else size),
        scale_at=0,
        offset_at={"offset": 2, "zero": 0}.get(form),
        codes=(grid.lowest, grid.highest),
        offset_unit=(7.5 if in_nibbles else 127.5) if form == "offset" else None,
        unpack=unpack,
        levels=levels,
        scale_type=torch.float32 if form == "fp32" else torch.float16,
    )


def assemble(
    block: BlockType, codes: Tensor, scale: Tensor, *, offset: Tensor | None = None, zero: Tensor | None = None
) -> Tensor:
    """Blocks of one of our own types from their codes and fields.

    Args:
        block: made by `grid_block`.
        codes: integers, (..., size).
        scale: (...), exact in the type's own floats.
        offset: (...), if the type has one.
        zero: integers, (...), if the type has one.

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
