"""The meaning of every kernel, in plain torch, on any device. Every fast path equals these to the bit.

One multiplication or addition rounds once (no fused multiply-add), in the order in which it is written.

Over 400 lines, because one file says what every kernel means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gradless import noise
from gradless.noise import Direction, Signs, Stream
from gradless.tensor import RESIDUAL_UNIT, BlockWeight, Move, PackedWeight, Part, TunedCodes, TunedValues

NAME = "torch"


def dequantize(weight: BlockWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of the weight under each of its views.

    Args:
        weight: the packed weight.
        rows: int64, (n,): file rows.
        dtype: fp32 or bf16; values are computed in fp32 and rounded once, to nearest even.

    Returns:
        (views, n, columns) in `dtype`.
    """
    views = []
    for codes, scale, offset in _read(weight, rows):
        w = scale * weight.block.level(codes)
        w = w if offset is None else w + offset
        views.append(w.reshape(len(rows), weight.columns).to(dtype))
    return torch.stack(views)


def linear(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """Each share of x times the weight under its view: `dequantize`, then a library's product in x's dtype.

    Args:
        weight: the packed weight.
        rows: int64, (n,): file rows.
        x: fp32 or bf16, (views, m, columns).

    Returns:
        (views, m, n), in x's dtype; another kernel's agrees within the rounding of its sum.
    """
    return products(x, dequantize(weight, rows, x.dtype))


WIDENED_ROWS = 1024
"""The number of rows of a bf16 weight that are held as fp32 at once."""


def widens_bf16(device: torch.device) -> bool:
    """Whether bf16 is best multiplied as fp32: on processors without instructions for it, torch widens every product."""
    supported: bool = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return device.type == "cpu" and not supported


def products(x: Tensor, weights: Tensor) -> Tensor:
    """Each share's x @ W.T: (views, m, columns) and (views, n, columns) -> (views, m, n)."""
    if x.dtype is torch.bfloat16 and widens_bf16(x.device):
        wide, some = x.float(), torch.split(weights, WIDENED_ROWS, dim=1)
        return torch.cat([products(wide, rows.float()).to(x.dtype) for rows in some], dim=-1)
    if len(x) == 1:
        return F.linear(x[0], weights[0]).unsqueeze(0)
    y = x.new_empty(*x.shape[:-1], weights.shape[1])
    for share, weight, into in zip(x, weights, y, strict=True):
        torch.mm(share, weight.T, out=into)
    return y


def add_shifts(weight: BlockWeight, rows: Tensor, x: Tensor, y: Tensor) -> None:
    """Add to each token's outputs the change that its own view of the offsets makes. With v the view that token i reads,

        y_ir += coefficient_v * sum_g z_vr,g unit_r,g m_rg * sum over j in group g of x_ij

    where m is a group's offset multiplier. This is 1/size of a product's work. It stops no offset at zero: either the view
    moves an offset by less than its size, or the offset may cross zero.

    Args:
        weight: its views move additive offsets (`PackedWeight.is_additive_offset`), and each token has one of its own.
        rows: int64, (n,): file rows.
        x: fp32 or bf16, (tokens, columns).
        y: the same type, (tokens, n): the product of x and the weight without its views; written.
    """
    example_of_token = weight.views.example_of_token
    assert example_of_token is not None
    blocks = weight.packed.shape[1]
    multiplier = weight.block.unpack(weight.packed[rows].flatten(0, 1)).offset_multiplier.view(len(rows), blocks, -1)
    pooled = x.float().view(len(x), multiplier[0].numel(), -1).sum(-1)

    def of_groups(values: Tensor) -> Tensor:
        """Tuned values (n, values) -> (n, blocks, 1)."""
        return values.repeat_interleave(weight.blocks_per_value, 1)[:, :blocks].unsqueeze(-1)

    add = of_groups(weight.unit()[rows]) * multiplier
    for v, move in enumerate(weight.views.moves):
        mine = example_of_token == v
        z = coordinates(move.direction, weight.name, weight.rows * weight.values_per_row, x.device)
        z = z.view(weight.rows, -1)[rows]
        more = (pooled[mine] * f32(move.coefficient)) @ (add * of_groups(z)).flatten(1).T
        y[mine] = (y[mine].float() + more).to(y.dtype)


def instructions() -> dict[str, str]:
    """The instructions that multiply int8 and bf16 activations with packed weights, by the activations' type."""
    return dict.fromkeys(("int8", "bf16"), NAME)


def linear_int8(weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T of integer activations and the integer codes of the weight under each of its views.

    A token i is quantized by itself: s = max_j |x_ij| / 127, or 1 if that is no normal number, and xq_j = x_ij * (1 / s),
    rounded to nearest even. For an output, each group of the weight's columns has a scale and, in some types, an offset. Group
    after group, from y = 0 on,

        acc = sum of xq * code,  sum = sum of xq,  y <- scale * acc + y,  y <- offset * sum + y

    without the last term if the type has no offset. acc and sum are exact integers, rounded to fp32 once, and each product is
    added to y before it is rounded, as a fused multiply-add does; the result is s * y.

    Args:
        weight: the packed weight, of a type whose codes are their own levels; a view of its codes moves them by whole numbers.
        rows: int64, (n,): file rows.
        x: fp32 or bf16, (views, m, columns): each view's share of the batch.

    Returns:
        (views, m, n), in x's dtype.
    """
    assert weight.block.levels is None
    return torch.stack([_linear_int8(share, *read) for share, read in zip(x, _read(weight, rows), strict=True)])


def quantized_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (..., columns) as integers of at most 127, fp32, and the scale of each, fp32 (..., 1)."""
    x = x.float()
    s = x.abs().amax(-1, keepdim=True)
    s = s / torch.full_like(s, 127)  # by a number a GPU multiplies with its reciprocal
    s = torch.where(s < torch.finfo(torch.float32).tiny, 1.0, s)
    return (x * (1 / s)).round(), s


def _linear_int8(x: Tensor, codes: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """x @ W.T of one view: (m, columns) -> (m, n)."""
    xq, s = quantized_tokens(x)
    xq = xq.double()  # sums of integers far below 2**53: exact in any order
    groups = x.shape[1] // codes.shape[-1]
    xq = xq.view(len(x), groups, codes.shape[-1])
    codes = codes.double().view(-1, groups, codes.shape[-1])
    y = torch.zeros(len(x), len(codes), device=x.device)
    for g in range(groups):
        y = fma(scale.view(-1, groups)[:, g], (xq[:, g] @ codes[:, g].T).float(), y)
        if offset is not None:
            y = fma(offset.view(-1, groups)[:, g], xq[:, g].sum(1, keepdim=True).float(), y)
    return (y * s).to(x.dtype)


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c, rounded to fp32 once.

    The product of two fp32 is exact in fp64. Where the sum is not, it is set to the odd one of its two fp64 neighbours: then
    rounding it once more, to fp32, gives what rounding the exact sum gives (Boldo and Melquiond, 2008).
    """
    product, c = a.double() * b.double(), c.double()
    total = product + c
    virtual = total - product
    error = (product - (total - virtual)) + (c - virtual)
    even = total.view(torch.int64) % 2 == 0
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    odd = (total.view(torch.int64) + towards).view(torch.float64)
    return torch.where((error != 0) & even & error.isfinite(), odd, total).float()


def _read(weight: BlockWeight, rows: Tensor) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows of the weight under each view: codes (n * blocks, groups, size / groups), and each group's scale and offset."""
    return [_read_under(weight, move, rows) for move in weight.views.moves or (None,)]


def _read_under(weight: BlockWeight, move: Move | None, rows: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    block, packed = weight.block, weight.packed[rows]
    scale = block.field(packed, block.scale_at)
    offset = None if block.offset_at is None else block.field(packed, block.offset_at)
    if isinstance(weight.tuned, TunedValues):
        values = (weight.tuned.values if move is None else moved_blocks(weight, move))[rows]
        values = values.repeat_interleave(weight.blocks_per_value, 1)[:, : packed.shape[1]]
        match weight.tuned.part:
            case Part.SCALE:
                scale = values
            case Part.OFFSET:
                offset = values
            case Part.BOTH:
                offset, scale = _scaled_offset(offset, values, scale), values
    if block.has_zero_point:
        offset = scale
    codes, multiplier, offset_multiplier = block.unpack(packed.flatten(0, 1))
    if isinstance(weight.tuned, TunedCodes) and move is not None:
        moved = codes + (move.coefficient * _noise(weight, move)[rows]).view_as(codes)
        tuned = (rows % weight.tuned.stride == 0).repeat_interleave(weight.packed.shape[1]).view(-1, 1, 1)
        codes = torch.where(tuned, moved.clamp(*block.codes) if weight.tuned.clamp else moved, codes)
    scale = (scale.reshape(-1, 1) * multiplier).unsqueeze(-1)
    return codes, scale, None if offset is None else (offset.reshape(-1, 1) * offset_multiplier).unsqueeze(-1)


def _scaled_offset(offset: Tensor | None, scale: Tensor, base: Tensor) -> Tensor | None:
    """m by the same factor as d: m * (d' / d); a block whose d is zero keeps its m."""
    if offset is None:
        return None
    return offset * torch.where(base == 0, 1.0, scale / base)


def exported_offset(weight: BlockWeight) -> Tensor:
    """The offset that goes with the tuned scale if one factor tunes both: fp32, (rows, blocks)."""
    offset = _scaled_offset(weight.file_values(Part.OFFSET), weight.tuned_values.values, weight.file_values(Part.SCALE))
    assert offset is not None
    return offset


def _noise(weight: BlockWeight, move: Move) -> Tensor:
    """One coordinate a weight: fp32, (rows, columns)."""
    n = weight.rows * weight.columns
    return coordinates(move.direction, weight.name, n, weight.packed.device).view(weight.rows, weight.columns)


def move_codes(weight: BlockWeight, move: Move) -> int:
    """Update the packed codes in place: q <- clamp(q + k), between the grid's ends; see `whole_steps` for k.

    Args:
        weight: its codes are tuned; their residual is updated too.
        move: over an integer distribution.

    Returns:
        How many codes changed.
    """
    tuned, residual = weight.tuned_codes, None
    if tuned.residual is not None:
        residual = tuned.residual.new_zeros(weight.rows, weight.columns)
        residual[:: tuned.stride] = tuned.residual
    n, device = weight.rows * weight.columns, weight.packed.device
    step = whole_steps(weight.name, move, n, device, residual).view(weight.rows, weight.columns)
    step[torch.arange(weight.rows, device=device) % tuned.stride != 0] = 0
    if tuned.residual is not None and residual is not None:
        tuned.residual.copy_(residual[:: tuned.stride])
    blocks = weight.packed.flatten(0, 1)
    before = weight.block.unpack(blocks).codes.flatten(1)
    step = step.view_as(before)
    after = torch.where(step == 0, before, (before + step).clamp(*weight.block.codes))
    blocks.copy_(weight.block.pack(blocks, after))
    return int((after != before).sum())


def coordinates(direction: Direction | Signs, name: str, n: int, device: torch.device) -> Tensor:
    """The first n coordinates of a direction for a tensor: fp32, (n,)."""
    return direction.values(name, 0, n, device)


def coordinates_of_each(direction: Direction, names: Sequence[str], n: int, device: torch.device) -> Tensor:
    """The first n coordinates of a direction for each of some tensors: fp32, (names, n)."""
    return torch.stack([coordinates(direction, name, n, device) for name in names])


def whole_steps(name: str, move: Move, n: int, device: torch.device, residual: Tensor | None) -> Tensor:
    """The whole steps k by which an update of coefficient * u moves codes.

    Without a residual k = SR(coefficient * u). With one, the update is added to it, and k is the whole steps in the sum:

        r <- r + SR(256 * coefficient * u),  k = round(r / 256),  r <- r - 256 * k

    Args:
        name: the tensor's name, for its noise.
        move: the update.
        n: how many codes the tensor has.
        device: where to draw.
        residual: int8, n elements, updated in place; or None.

    Returns:
        Whole numbers, fp32, (n,).
    """
    u = coordinates(move.direction, name, n, device)
    words = move.direction.words(name, Stream.ROUNDING)
    if residual is None:
        return noise.stochastic_round(u * f32(move.coefficient), words)
    owed = residual.flatten() + noise.stochastic_round(u * (f32(move.coefficient) / RESIDUAL_UNIT), words)
    whole = torch.floor(owed * RESIDUAL_UNIT + 0.5)
    residual.copy_((owed - whole / RESIDUAL_UNIT).view_as(residual))
    return whole


def dither(name: str, shape: torch.Size) -> Tensor:
    """The first residuals of a tensor's codes: uniform over their range, int8.

    If they were all zero, no code would move before half a step had come together. As they are spread evenly, an update of a
    thousandth of a step moves one code in a thousand.
    """
    words = Direction(0, 0).words(name, Stream.DITHER)(0, -(-shape.numel() // 4))
    return words.to(torch.uint32).view(torch.int8)[: shape.numel()].view(shape)


def vectors(codes: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    """Groups of columns as sums of codebooks' vectors, added up in fp32.

    Args:
        codes: int8 or int16, (n, groups, codebooks), modulo the entries of a codebook.
        table: fp32, (codebooks * entries, size).
        dtype: of the result, bf16 or fp32.

    Returns:
        (n, groups * size).
    """
    entries = len(table) // codes.shape[-1]
    first = torch.arange(0, len(table), entries, device=codes.device)
    chosen = (codes.long() % entries + first).unbind(-1)
    total = table[chosen[0]]
    for entry in chosen[1:]:
        total += table[entry]
    return total.flatten(-2).to(dtype)


def moved_blocks(weight: PackedWeight, move: Move) -> Tensor:
    """decay * x + (coefficient * z) * unit, stopped at zero if a sign is kept: fp32, of the tuned values' shape."""
    x = weight.tuned_values.values
    z = move.direction.values(weight.name, 0, x.numel(), x.device).view_as(x)
    return stopped(weight, x * f32(move.decay) + (z * f32(move.coefficient)) * weight.unit())


def stopped(weight: PackedWeight, values: Tensor) -> Tensor:
    """New tuned values, stopped at zero if they keep their sign."""
    if not weight.keeps_sign:
        return values
    base = weight.file_values(weight.tuned_values.part)
    return torch.where(base > 0, values.clamp(min=0), torch.where(base < 0, values.clamp(max=0), 0.0))


def move_blocks(weight: PackedWeight, moves: Sequence[Move]) -> None:
    """Update every tuned value in place, by one move after the other."""
    values = weight.tuned_values.values
    for move in moves:
        values.copy_(moved_blocks(weight, move))


def moved(values: Tensor, name: str, move: Move, dtype: torch.dtype, *, stochastic: bool = False) -> Tensor:
    """decay * x + coefficient * z of a plain tensor, computed in fp32.

    Args:
        values: fp32 or bf16, any shape, contiguous.
        name: the tensor's name, for its noise.
        move: the move.
        dtype: of the result, fp32 or bf16.
        stochastic: round to bf16 stochastically (unbiased) instead of to nearest.

    Returns:
        A new tensor of the same shape.
    """
    n = values.numel()
    z = move.direction.values(name, 0, n, values.device).view_as(values)
    result = values.float() * f32(move.decay) + z * f32(move.coefficient)
    if stochastic and dtype is torch.bfloat16:
        random = noise.halves(move.direction.words(name, Stream.ROUNDING), 0, n, values.device).view_as(values)
        # The kept half of an fp32 is its bf16; adding 16 random bits below it carries with the right probability.
        result = ((result.view(torch.int32) + random.int()) & -0x10000).view(torch.float32)
    return result.to(dtype)


def f32(value: float | Tensor) -> float:
    """One number rounded to fp32."""
    return float(np.float32(value))


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (plus + weight) over the last dimension; a compiled kernel agrees within bf16's rounding.

    Args:
        x: bf16, (..., d).
        weight: bf16, (d,).
        eps: added to the mean square.
        plus: added to the weight: 1 in Gemma's models, else 0.
    """
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (y * (plus + weight.float())).to(x.dtype)


def gate(gates: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """act(gates) * up, act being SiLU or GELU's tanh form; a compiled kernel agrees within bf16's rounding. bf16, any shape."""
    x = gates.float()
    return ((F.gelu(x, approximate="tanh") if gelu else F.silu(x)) * up.float()).to(up.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """softmax(scale q k^T) v, head by head; a compiled kernel rounds weights to bf16 before it divides by their sum.

    Args:
        q: bf16, (batch, heads, length, size).
        k: bf16, (batch, key heads, length, size); each is shared by an equal number of query heads.
        v: the same.
        mask: bool, broadcastable to (batch, 1, length, length): True where a query sees a key; None for causal.
        scale: the factor of the scores.

    Returns:
        bf16, (batch, length, heads, size).
    """
    shared = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(shared, 1) for x in (k, v))
    score = scale * q.float() @ k.transpose(2, 3)
    sees = torch.ones(score.shape[-2:], dtype=torch.bool, device=q.device).tril() if mask is None else mask
    return (score.masked_fill(~sees, -1e30).softmax(-1) @ v).to(q.dtype).transpose(1, 2).contiguous()
