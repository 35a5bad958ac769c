"""The operations on weights whose codes stand for vectors (AQLM), in plain torch, on any device."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gradless.kernels.reference import _moved_blocks, move_blocks, products
from gradless.tensor import CodebookTensor, Move, Part

__all__ = ["dequantize", "linear", "move_blocks"]


def dequantize(tensor: CodebookTensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.dequantize`."""
    views = [_vectors(tensor, view, rows) * _scales(tensor, view)[rows] for view in tensor.views or (None,)]
    return torch.stack(views).to(dtype)


def linear(tensor: CodebookTensor, rows: Tensor, x: Tensor) -> Tensor:
    """See `reference.linear`; a row's scale multiplies its outputs, so that all views of scales share one product."""
    views: tuple[Move | None, ...] = tensor.views or (None,)
    if tensor.part is Part.CODEBOOK:
        return products(x, dequantize(tensor, rows, x.dtype))
    y = F.linear(x, _vectors(tensor, None, rows).to(x.dtype))
    scales = torch.stack([_scales(tensor, view)[rows].T for view in views])
    return (y.float() * scales).to(x.dtype)


def _scales(tensor: CodebookTensor, view: Move | None) -> Tensor:
    """Each row's scale under a view: fp32, (rows, 1)."""
    if tensor.part is not Part.SCALE or tensor.master is None:
        return tensor.scales
    return tensor.master if view is None else _moved_blocks(tensor, view)


def _vectors(tensor: CodebookTensor, view: Move | None, rows: Tensor) -> Tensor:
    """Rows of the weight under a view, but for their scales: fp32, (n, columns)."""
    codebooks, entries, _ = tensor.codebooks.shape
    table = tensor.codebooks.flatten(0, 1)
    if tensor.part is Part.CODEBOOK and tensor.master is not None:
        table = tensor.master if view is None else _moved_blocks(tensor, view)
    first = torch.arange(0, codebooks * entries, entries, device=rows.device)
    codes = tensor.packed[rows].long() % entries + first
    total = table[codes[..., 0]].float()
    for i in range(1, codebooks):
        total += table[codes[..., i]]
    return total.view(len(rows), -1)
