"""The operations on weights whose codes stand for vectors (AQLM), around the device's own sums of them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gradless.kernels.reference import moved_blocks, products
from gradless.tensor import CodebookTensor, Move, Part

Vectors = Callable[[Tensor, Tensor, torch.dtype], Tensor]
"""`reference.vectors`, or what does the same."""


def dequantize(tensor: CodebookTensor, rows: Tensor, dtype: torch.dtype, vectors: Vectors) -> Tensor:
    """See `reference.dequantize`."""
    codes = tensor.packed[rows]
    views = [
        vectors(codes, _table(tensor, view), torch.float32) * _scales(tensor, view)[rows] for view in tensor.views or (None,)
    ]
    return torch.stack(views).to(dtype)


def linear(tensor: CodebookTensor, rows: Tensor, x: Tensor, vectors: Vectors) -> Tensor:
    """See `reference.linear`; a row's scale multiplies its outputs, so that all views of scales share one product."""
    views: tuple[Move | None, ...] = tensor.views or (None,)
    if tensor.part is Part.CODEBOOK:
        return products(x, dequantize(tensor, rows, x.dtype, vectors))
    y = products(x.flatten(0, 1).unsqueeze(0), vectors(tensor.packed[rows], _table(tensor, None), x.dtype).unsqueeze(0))
    scales = torch.stack([_scales(tensor, view)[rows].T for view in views])
    return (y.view(*x.shape[:-1], -1).float() * scales).to(x.dtype)


def _scales(tensor: CodebookTensor, view: Move | None) -> Tensor:
    """Each row's scale under a view: fp32, (rows, 1)."""
    if tensor.part is not Part.SCALE or tensor.master is None:
        return tensor.scales
    return tensor.master if view is None else moved_blocks(tensor, view)


def _table(tensor: CodebookTensor, view: Move | None) -> Tensor:
    """The codebooks' entries under a view: fp32, (codebooks * entries, size)."""
    if tensor.part is not Part.CODEBOOK or tensor.master is None:
        return tensor.codebooks.flatten(0, 1).float()
    return tensor.master if view is None else moved_blocks(tensor, view)
