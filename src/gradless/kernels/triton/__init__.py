"""The kernels of a GPU, in Triton: `reference`'s functions to the bit, with the noise drawn inside (`programs.py`).

Functions that take a small part of a step are the reference's own, on the same device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gradless.blocks import BlockType
from gradless.kernels import reference
from gradless.kernels.reference import add_shifts, attention, coordinates_of_each, dither, gate, rms_norm, vectors
from gradless.kernels.triton import programs
from gradless.noise import Direction, Gaussian, Integers, Rademacher, RoundedGaussian, Signs, Stream, normal_table
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, TunedValues

__all__ = [
    "NAME",
    "add_shifts",
    "attention",
    "coordinates",
    "coordinates_of_each",
    "dequantize",
    "dither",
    "gate",
    "instructions",
    "linear",
    "linear_int8",
    "move_blocks",
    "move_codes",
    "moved",
    "rms_norm",
    "vectors",
    "whole_steps",
]

NAME = "triton"
FEW_TOKENS = 64
"""The most tokens of a view that are multiplied with weights which are unpacked on the way and never stored."""
WIDTH = 1024
"""The number of elements that one program handles."""
LEAST_K = 32
"""The least number of a row's codes that a product of bytes takes at once."""
MOST_K = 64
"""The most codes of a row that a product takes at once, so that its tiles fit into shared memory."""
_PARTS, _CODE = {Part.SCALE: 1, Part.OFFSET: 2, Part.BOTH: 3}, 4
_multipliers: WeakKeyDictionary[BlockWeight, tuple[Tensor, Tensor | None]] = WeakKeyDictionary()


class Program(Protocol):
    """One of `programs`, as Triton compiles it."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., object]: ...


def coordinates(direction: Direction | Signs, name: str, n: int, device: torch.device) -> Tensor:
    """See `reference.coordinates`."""
    if isinstance(direction, Signs):
        total = torch.zeros(n, device=device)
        for term, weight in direction.terms:
            total = total + coordinates(term, name, n, device) * reference.f32(weight)
        return total.sign()
    out = torch.empty(n, device=device)
    _run(programs.coordinates, n, out=out, **_drawn(direction, name, device))
    return out


def dequantize(weight: BlockWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    out = torch.empty(weight.views.count, len(rows), weight.columns, dtype=dtype, device=rows.device)
    tuned = weight.tuned
    for moves, (share,) in _launches(weight.views.moves, out):
        blocks = weight.packed.shape[1]
        p = max(1, WIDTH // weight.block.size)
        grid = (len(rows), -(-blocks // p))
        clamps = isinstance(tuned, TunedCodes) and tuned.clamp and bool(moves)
        numbers = {
            "rows": rows,
            "out": share,
            "n": len(rows),
            "blocks": blocks,
            "stride": _stride(weight),
            "CLAMP": clamps,
            "P": p,
        }
        _launch(programs.dequantize, grid, **numbers, **_read(weight, moves))
    return out


def linear(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """See `reference.linear`; few tokens meet weights that are never stored, unless codes move or the product is in fp32."""
    moves_codes = isinstance(weight.tuned, TunedCodes) and bool(weight.views.moves)
    if x.shape[1] > FEW_TOKENS or moves_codes or x.dtype is torch.float32:
        return reference.products(x, dequantize(weight, rows, x.dtype))
    out = torch.empty(*x.shape[:-1], len(rows), dtype=x.dtype, device=x.device)
    x, tile, tokens = x.contiguous(), 32, max(16, 1 << (x.shape[1] - 1).bit_length())
    for moves, (y, inputs) in _launches(weight.views.moves, out, x):
        numbers = {"x": inputs, "rows": rows, "out": y, "tokens": x.shape[1], "n": len(rows), "blocks": weight.packed.shape[1]}
        shape = {"TOKENS": tokens, "ROWS": tile, "K": min(MOST_K, weight.block.size)}
        _launch(programs.linear, (-(-len(rows) // tile), 1), **numbers, **shape, **_read(weight, moves))
    return out


def linear_int8(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """See `reference.linear_int8`."""
    out = torch.empty(*x.shape[:-1], len(rows), dtype=x.dtype, device=x.device)
    inputs, s = reference.quantized_tokens(x)
    tile = 64
    clamps = isinstance(weight.tuned, TunedCodes) and weight.tuned.clamp
    for moves, (y, share, scale) in _launches(weight.views.moves, out, inputs.to(torch.int8), s):
        read = _read(weight, moves)
        del read["levels"], read["LEVELS"]
        grid = (-(-len(rows) // tile), -(-x.shape[1] // tile), max(1, len(moves)))
        _launch(
            programs.linear_int8,
            grid,
            x=share,
            s=scale,
            rows=rows,
            out=y,
            tokens=x.shape[1],
            n=len(rows),
            blocks=weight.packed.shape[1],
            stride=_stride(weight),
            CLAMP=clamps,
            TOKENS=tile,
            ROWS=tile,
            K=max(LEAST_K, weight.block.size // _groups(weight.block)),
            **read,
            num_stages=1,
        )
    return out


def move_blocks(weight: BlockWeight, moves: Sequence[Move]) -> None:
    """See `reference.move_blocks`."""
    values = weight.tuned_values.values
    for move in moves:
        if isinstance(move.direction, Signs):
            reference.move_blocks(weight, [move])
            continue
        drawn = _drawn(move.direction, weight.name, values.device)
        numbers = {"coefficient_0": move.coefficient, "decay_0": move.decay, "blocks": weight.packed.shape[1]}
        _run(programs.move_blocks, values.numel(), tuned=values, **numbers, **drawn, **_fields(weight))


def move_codes(weight: BlockWeight, move: Move) -> int:
    """See `reference.move_codes`."""
    tuned, blocks, size = weight.tuned_codes, weight.packed.shape[1], weight.block.size
    p = max(1, WIDTH // size)
    grid = (weight.tuned_rows, -(-blocks // p))
    count = torch.zeros(1, dtype=torch.int32, device=weight.packed.device)
    lowest, highest = map(float, weight.block.codes)
    zero, pieces, _ = _layout(weight.block, weight.packed.device)
    _launch(
        programs.move_codes,
        grid,
        packed=weight.packed,
        residual=tuned.residual,
        RESIDUAL=tuned.residual is not None,
        count=count,
        pieces=pieces,
        coefficient_0=move.coefficient,
        blocks=blocks,
        zero=zero,
        lowest=lowest,
        highest=highest,
        stride=tuned.stride,
        NBYTES=weight.block.nbytes,
        SIZE=size,
        P=p,
        **_given_or_drawn(move, weight.name, weight.rows * weight.columns, weight.packed.device),
    )
    return int(count)


def whole_steps(name: str, move: Move, n: int, device: torch.device, residual: Tensor | None) -> Tensor:
    """See `reference.whole_steps`."""
    out = torch.empty(n, device=device)
    u = coordinates(move.direction, name, n, device)
    _run(
        programs.whole_steps,
        out=out,
        u=u,
        residual=residual,
        RESIDUAL=residual is not None,
        coefficient_0=move.coefficient,
        n=n,
        **_rounding(move, name),
    )
    return out


def moved(values: Tensor, name: str, move: Move, dtype: torch.dtype, *, stochastic: bool = False) -> Tensor:
    """See `reference.moved`."""
    values = values.contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    _run(
        programs.moved_values,
        values=values,
        out=out,
        coefficient_0=move.coefficient,
        decay_0=move.decay,
        n=values.numel(),
        STOCHASTIC=stochastic and dtype is torch.bfloat16,
        **_given_or_drawn(move, name, values.numel(), values.device),
    )
    return out


def instructions() -> dict[str, str]:
    """See `reference.instructions`."""
    return dict.fromkeys(("int8", "bf16"), NAME)


def _run(program: Program, n: int, **arguments: object) -> None:
    """A program over n elements in a row."""
    _launch(program, (-(-n // WIDTH),), n=n, **arguments, P=WIDTH)


def _launch(program: Program, grid: tuple[int, ...], **arguments: object) -> None:
    """Launch a program on the tensors' device, without contraction, which would change bits."""
    device = next(value.device for value in arguments.values() if isinstance(value, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        program[grid](**arguments, enable_fp_fusion=False)


def _launches(moves: tuple[Move, ...], *tensors: Tensor) -> list[tuple[tuple[Move, ...], tuple[Tensor, ...]]]:
    """The views of each launch, with their shares of some tensors: at most two of one direction, else one view a launch."""
    if len(moves) < 2 or (len(moves) == 2 and moves[0].direction == moves[1].direction):
        return [(moves, tensors)]
    return [((move,), tuple(tensor[i] for tensor in tensors)) for i, move in enumerate(moves)]


def _stride(weight: BlockWeight) -> int:
    """The distance between rows with tuned codes."""
    return weight.tuned.stride if isinstance(weight.tuned, TunedCodes) else 1


def _read(weight: BlockWeight, views: tuple[Move, ...]) -> dict[str, object]:
    """The arguments with which a program reads a weight under views of one direction."""
    device = weight.packed.device
    zero, pieces, levels = _layout(weight.block, device)
    multiplier, offset_multiplier = _multipliers_of(weight)
    moves = [*views, *[Move(Direction(0, 0), 0.0)] * (2 - len(views))]
    lowest, highest = map(float, weight.block.codes)
    return {
        **_fields(weight),
        **_drawn(moves[0].direction, weight.name, device),
        "tuned": weight.tuned.values if isinstance(weight.tuned, TunedValues) else None,
        "multiplier": multiplier,
        "offset_multiplier": offset_multiplier,
        "levels": levels,
        "LEVELS": levels is not None,
        "pieces": pieces,
        "zero": zero,
        "lowest": lowest,
        "highest": highest,
        "coefficient_0": moves[0].coefficient,
        "decay_0": moves[0].decay,
        "coefficient_1": moves[1].coefficient,
        "decay_1": moves[1].decay,
        "SIZE": weight.block.size,
        "GROUPS": _groups(weight.block),
        "VIEWS": len(views),
    }


def _fields(weight: BlockWeight) -> dict[str, object]:
    """Where a weight's block values lie, and how they move."""
    block, part, relative = weight.block, 0, True
    match weight.tuned:
        case TunedValues(of_values, relative):
            part = _PARTS[of_values]
        case TunedCodes():
            part = _CODE
    return {
        "packed": weight.packed,
        "unit_of_offset": 0.0 if block.offset_unit is None else block.offset_unit,
        "NBYTES": block.nbytes,
        "SCALE_AT": block.scale_at,
        "OFFSET_AT": -1 if block.offset_at is None else block.offset_at,
        "BLOCKS_PER_VALUE": weight.blocks_per_value,
        "WIDE": block.scale_type is torch.float32,
        "PART": part,
        "RELATIVE": relative,
        "KEEPS_SIGN": weight.keeps_sign,
    }


def _drawn(direction: Direction | Signs, name: str, device: torch.device) -> dict[str, object]:
    """A direction as the programs take it."""
    assert isinstance(direction, Direction)
    words, second, kind = direction.words(name), 0, 0
    edges, m, eps = None, 0, 0.0
    match direction.distribution:
        case Rademacher():
            kind = 1
        case Integers() as integers:
            kind, m, edges = 2, integers.m, _edges(integers, device)
        case RoundedGaussian(eps, stream):
            kind, second = 3, direction.words(name, stream).query_and_stream
        case Gaussian():
            pass
        case other:
            raise NotImplementedError(f"no draw in Triton for {other}")
    return {
        "key_low": _signed(words.key),
        "key_high": _signed(words.key >> 32),
        "step": _signed(words.step),
        "query": _signed(words.query_and_stream),
        "second": _signed(second),
        "normal": _normal(device),
        "edges": edges,
        "m": m,
        "eps": eps,
        "DISTRIBUTION": kind,
        "SPAN": direction.span,
    }


def _rounding(move: Move, name: str) -> dict[str, object]:
    """The random words that round an update, as the programs take them."""
    words = move.direction.words(name, Stream.ROUNDING)
    return {
        "key_low": _signed(words.key),
        "key_high": _signed(words.key >> 32),
        "step": _signed(words.step),
        "rounding": _signed(words.query_and_stream),
    }


def _given_or_drawn(move: Move, name: str, n: int, device: torch.device) -> dict[str, object]:
    """An update's coordinates: drawn in the program, or, if they are the signs of a sum of several directions, given to it."""
    terms = move.direction.terms if isinstance(move.direction, Signs) else ((move.direction, 1.0),)
    u = coordinates(move.direction, name, n, device) if len(terms) > 1 else None
    signs = {"weight": terms[0][1], "SIGNS": isinstance(move.direction, Signs)}
    return {**_drawn(terms[0][0], name, device), **_rounding(move, name), **signs, "u": u, "GIVEN": u is not None}


def _signed(word: int) -> int:
    """The 32-bit integer with a word's bits."""
    word &= 0xFFFFFFFF
    return word - (word >> 31 << 32)


@cache
def _normal(device: torch.device) -> Tensor:
    return (torch.from_numpy(normal_table().astype("float32")) * 2.0**-13).to(device)


@cache
def _edges(distribution: Integers, device: torch.device) -> Tensor:
    return torch.tensor(distribution.edges, dtype=torch.int32, device=device)


@cache
def _layout(block: BlockType, device: torch.device) -> tuple[int, Tensor, Tensor | None]:
    """The code of all-zero bits, the places of codes, and their levels if these are not the codes themselves."""
    zero, pieces = block.layout()
    levels = None if block.levels is None else torch.tensor(block.levels, device=device)
    return zero, torch.stack(pieces).to(device), levels


def _multipliers_of(weight: BlockWeight) -> tuple[Tensor | None, Tensor | None]:
    """The multipliers of each group, (blocks, groups), which no update changes. None for multipliers that are all 1, and for
    offset multipliers if there is no offset."""
    if _groups(weight.block) == 1 and not weight.block.has_zero_point:
        return None, None
    if weight not in _multipliers or _multipliers[weight][0].device != weight.packed.device:
        unpacked = [weight.block.unpack(some)[1:] for some in torch.split(weight.packed.flatten(0, 1), 1 << 14)]
        dtype = torch.int16 if weight.block.has_zero_point else torch.int8
        multiplier, offset_multiplier = (torch.cat(each).to(dtype) for each in zip(*unpacked, strict=True))
        _multipliers[weight] = multiplier, None if weight.block.offset_at is None else offset_multiplier
    return _multipliers[weight]


@cache
def _groups(block: BlockType) -> int:
    return block.unpack(torch.zeros(1, block.nbytes, dtype=torch.uint8)).multiplier.shape[1]
