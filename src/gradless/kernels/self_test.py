"""The self-test of a set of kernels: every one of them on small tensors, against the reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from gradless import noise
from gradless.blocks import BLOCK_TYPES, BlockType, block_type
from gradless.kernels import reference
from gradless.kernels.protocol import Ops
from gradless.noise import Direction
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, Views

EVERY_TYPE = (
    *BLOCK_TYPES,
    *("int4/64", "nf4/32", "uint4/64+offset", "uint3/32+offset", "fp8-e4m3/64", "int8/32", "uint8/64+offset"),
    *("uint4/64+zero", "uint8/32+zero", "nf4/64+fp32", "int8/64+fp32"),
)
"""The names of ggml's block types, and one of our own for each case that kernels tell apart."""
VALUE_MOVE = Move(Direction(7, 1, 2), -0.03, 0.99)
CODE_MOVE = Move(Direction(7, 1, 2, noise.uniform_grid(2)), -0.3)


def first_difference(ops: Ops, device: str = "cpu", types: Sequence[str] = EVERY_TYPE) -> str | None:
    """Where kernels first differ from the reference (in a bit, if the protocol asks for bits), in a few words; or None."""
    return next(_differences(ops, device, types), None)


def _differences(ops: Ops, device: str, types: Sequence[str]) -> Iterator[str]:
    for block in map(block_type, types):
        for part in (Part.SCALE, Part.OFFSET, Part.BOTH):
            ours, theirs = (_moved_values(each, block, part, device) for each in (ops, reference))
            same = torch.equal(ours.tuned_values.values, theirs.tuned_values.values)
            if not same or not _read_alike(ops, ours, theirs, device):
                yield f"{block.name}, {part}"
        ours, theirs = (_moved_codes(each, block, device) for each in (ops, reference))
        same = torch.equal(ours.packed, theirs.packed)
        one, two = ours.tuned_codes.residual, theirs.tuned_codes.residual
        same &= one is not None and two is not None and torch.equal(one, two)
        if not same or not _read_alike(ops, ours, theirs, device):
            yield f"{block.name}, codes"
    yield from _differences_of_vectors(ops, device)
    yield from _differences_of_noise(ops, device)
    if not torch.allclose(_fused(ops), _fused(reference), rtol=2.0**-7, atol=2.0**-7):
        yield "the fused passes"


def _weight(block: BlockType, device: str) -> BlockWeight:
    """A small weight of any codes and finite fields."""
    packed = some_bytes((3, 5, block.nbytes)).to(device)
    for top in (at + dtype.itemsize - 1 for at, dtype in block.fields.items()):
        packed[..., top] = packed[..., top] % 60 + packed[..., top] // 128 * 128
    return BlockWeight("self-test", block, packed, blocks_per_value=2 if block.has_zero_point else 1)


def _moved_values(ops: Ops, block: BlockType, part: Part, device: str) -> BlockWeight:
    """A weight whose values these kernels moved, under the two sides of a query."""
    weight = _weight(block, device)
    weight.tune(part)
    ops.move_blocks(weight, [VALUE_MOVE, VALUE_MOVE])
    weight.views = Views((VALUE_MOVE, VALUE_MOVE._replace(coefficient=0.03)))
    return weight


def _moved_codes(ops: Ops, block: BlockType, device: str) -> BlockWeight:
    """A weight whose codes these kernels moved, without and with a residual, under the two sides of a query."""
    weight = _weight(block, device)
    weight.tuned = TunedCodes()
    ops.move_codes(weight, CODE_MOVE)
    weight.tuned = TunedCodes(stride=2, residual=ops.dither("self-test", torch.Size((2, weight.columns))).to(device))
    ops.move_codes(weight, CODE_MOVE)
    weight.views = Views((CODE_MOVE._replace(coefficient=1.0), CODE_MOVE._replace(coefficient=-1.0)))
    return weight


def _read_alike(ops: Ops, ours: BlockWeight, theirs: BlockWeight, device: str) -> bool:
    """Whether these kernels read `ours` as the reference reads `theirs`."""
    rows, same = torch.tensor([2, 0, 1], device=device), True
    x = Direction(8, 0).values("x", 0, 4 * ours.columns, device).view(2, 2, -1)
    for dtype in (torch.float32, torch.bfloat16):
        same &= torch.equal(ops.dequantize(ours, rows, dtype), reference.dequantize(theirs, rows, dtype))
        if ours.has_integers:
            integers = (each.linear_int8(weight, rows, x.to(dtype)) for each, weight in ((ops, ours), (reference, theirs)))
            same &= torch.equal(*integers)
    same &= torch.allclose(ops.linear(ours, rows, x), reference.linear(theirs, rows, x), rtol=1e-4, atol=1e-3)
    if ours.is_additive_offset:
        of_token = torch.tensor([1, 0, 0, 1], device=device)
        one, two = torch.zeros(4, 3, device=device), torch.zeros(4, 3, device=device)
        for each, weight, y in ((ops, ours, one), (reference, theirs, two)):
            weight.views = Views(weight.views.moves, of_token)
            each.add_shifts(weight, rows, x.flatten(0, 1), y)
        same &= torch.allclose(one, two, rtol=1e-4, atol=1e-3)
    return same


def _differences_of_vectors(ops: Ops, device: str) -> Iterator[str]:
    table = Direction(8, 0).values("table", 0, 3 * 64 * 8, device).view(-1, 8)
    for of_codes in (torch.int8, torch.int16):
        codes = some_bytes((24,)).view(of_codes).view(2, -1, 3).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            if not torch.equal(ops.vectors(codes, table, dtype), reference.vectors(codes, table, dtype)):
                yield f"sums of vectors named by {of_codes}"


def _differences_of_noise(ops: Ops, device: str) -> Iterator[str]:
    n, where = 300, torch.device(device)
    for distribution in (*noise.NAMED.values(), noise.uniform_grid(2), noise.RoundedGaussian(0.3)):
        move = Move(Direction(7, 1, 2, distribution), -0.03, 0.99)
        drawn = (each.coordinates(move.direction, "self-test", n, where) for each in (ops, reference))
        steps = (each.whole_steps("self-test", move, n, where, None) for each in (ops, reference))
        if not torch.equal(*drawn) or not torch.equal(*steps):
            yield f"{distribution}"
        for source in (torch.float32, torch.bfloat16):
            values = Direction(8, 0).values("values", 0, n, device).to(source)
            for dtype in (torch.float32, torch.bfloat16):
                moved = (each.moved(values, "self-test", move, dtype, stochastic=True) for each in (ops, reference))
                if not torch.equal(*moved):
                    yield f"moved by {distribution}, {source} to {dtype}"


def _fused(ops: Ops) -> Tensor:
    """Some outputs of the passes between linear layers: fp32, (n,)."""
    q = Direction(9, 0).values("q", 0, 4 * 40 * 32).bfloat16().view(1, 4, 40, 32)
    norm = ops.rms_norm(q, q[0, 0, 0], 1e-5, 1.0)
    gated = ops.gate(q, q, gelu=True)
    attended = ops.attention(q, q[:, :2], q[:, 2:], None, 0.2)
    return torch.cat([norm.flatten(), gated.flatten(), attended.flatten()]).float()


def some_bytes(shape: tuple[int, ...]) -> Tensor:
    """Random bytes, the same on every machine: uint8."""
    n = torch.Size(shape).numel()
    return (Direction(1, 0).words("self-test")(0, n) & 255).to(torch.uint8).view(shape)
