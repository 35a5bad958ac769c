"""The operations on weights whose codes name vectors (AQLM), around the device's own sums of vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from gradless.kernels.protocol import Ops
from gradless.kernels.reference import moved_blocks, products
from gradless.tensor import CodebookWeight, Move, Part


def dequantize(weight: CodebookWeight, rows: Tensor, dtype: torch.dtype, ops: Ops) -> Tensor:
    """See `reference.dequantize`."""
    codes = weight.packed[rows]
    views = [
        ops.vectors(codes, _table(weight, move), torch.float32) * _scales(weight, move)[rows]
        for move in weight.views.moves or (None,)
    ]
    return torch.stack(views).to(dtype)


def linear(weight: CodebookWeight, rows: Tensor, x: Tensor, ops: Ops) -> Tensor:
    """See `reference.linear`; a row's scale multiplies its outputs, so that all views of scales share one product."""
    if weight.part is Part.CODEBOOK:
        return products(x, dequantize(weight, rows, x.dtype, ops))
    unscaled = ops.vectors(weight.packed[rows], _table(weight, None), x.dtype)
    y = products(x.flatten(0, 1).unsqueeze(0), unscaled.unsqueeze(0))
    scales = torch.stack([_scales(weight, move)[rows].T for move in weight.views.moves or (None,)])
    return (y.view(*x.shape[:-1], -1).float() * scales).to(x.dtype)


def _scales(weight: CodebookWeight, move: Move | None) -> Tensor:
    """Each row's scale under a move: fp32, (rows, 1)."""
    if weight.part is not Part.SCALE:
        return weight.scales
    return weight.tuned_values.values if move is None else moved_blocks(weight, move)


def _table(weight: CodebookWeight, move: Move | None) -> Tensor:
    """The codebooks' entries under a move: fp32, (codebooks * entries, size)."""
    if weight.part is not Part.CODEBOOK:
        return weight.codebooks.flatten(0, 1).float()
    return weight.tuned_values.values if move is None else moved_blocks(weight, move)
