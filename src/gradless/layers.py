"""The modules that stand in a model for a packed weight. A forward reads weights and never writes them: the weight under
a perturbation exists only in a scratch, one layer (or one tile of a large one) at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gradless import kernels
from gradless.errors import GradlessError
from gradless.grids import floating
from gradless.tensor import QuantTensor

# oneDNN keeps a compiled kernel for each of the last 1024 shapes that it saw; with batches of every length that is 100 MB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

TILE, GPU_TILE = 1 << 22, 1 << 25
"""Weights that are unpacked at once: every layer of a small model whole, a language model's head never; on a GPU, where many
small launches cost more than their work, every layer of a 7B model but its widest."""


class _Packed(nn.Module):
    """A module that holds a packed tensor, which follows the module from device to device.

    Attributes:
        packed: the tensor.
        dtype: of what it is unpacked to.
        lent: whether a model has read `weight`, to multiply it without calling this module.
    """

    packed: QuantTensor
    dtype: torch.dtype
    lent = False

    @property
    def weight(self) -> Tensor:
        """The whole weight unpacked, as the packed tensor's view has it: `dtype`, (rows, columns). Some models multiply a
        layer's weight themselves (Mamba its time steps').

        Raises:
            GradlessError: it has several views, and whose tokens read which is not known here.
        """
        self.lent = True
        if len(self.packed.views) > 1 or self.packed.owners is not None:
            raise GradlessError(f"the model multiplies {self.packed.name} itself, so that one forward cannot read two of it.")
        weight = kernels.dequantize(self.packed, self.packed.file_rows, self.dtype)[0]
        order = self.packed.column_order
        return weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.packed.to(fn(torch.empty(0, device=self.packed.packed.device)).device)
        return self


class QuantLinear(_Packed):
    """y = x @ W.T + b on a packed W.

    Attributes:
        packed: the packed (out_features, in_features) weight; an embedding's, where the head is tied to it.
        bias: (out_features,) or None.
        only: int64 (n,), the outputs to compute instead of all, or None (see `restricted_to`).
        activations: what is multiplied (see `set_activations`).
    """

    def __init__(self, weight: QuantTensor, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.bias = bias
        self.dtype = dtype
        self.only: Tensor | None = None
        self.activations = "bf16"

    @property
    def in_features(self) -> int:
        return self.packed.columns

    @property
    def out_features(self) -> int:
        return self.packed.rows

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features) in x's dtype; under `restricted_to` n outputs (..., n) in fp32.

        Where the weight has several views, x's tokens read them as the weight's `owners` say.
        """
        rows, bias = self.packed.file_rows, cast(Tensor | None, self.bias)
        views = max(1, len(self.packed.views)) if self.packed.owners is None else 1
        x = x if self.packed.column_order is None else x[..., self.packed.column_order]
        shares = x.reshape(views, -1, self.in_features)
        if self.only is not None:
            rows, bias = rows[self.only], None if bias is None else bias[self.only]
            y = kernels.linear(self.packed, rows, shares.float())
        else:
            tile = max(16, (GPU_TILE if x.is_cuda else TILE) // self.in_features // 16 * 16)
            product = {"bf16": kernels.linear, "int8": kernels.linear_int8, "fp8": _float8_product}[self.activations]
            outputs = [product(self.packed, some, shares.to(self.dtype)) for some in torch.split(rows, tile)]
            y = (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)).to(x.dtype)
        y = y.view(*x.shape[:-1], len(rows))
        return y if bias is None else y + bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.packed.block.name}, bias={self.bias is not None}"


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer's class computes x @ W.T + b and nothing else, so that a packed one can stand for it. A class of its own
    (a router, say) is tried on a small weight."""
    kind = type(layer)
    if kind.forward is nn.Linear.forward:
        return True
    with torch.random.fork_rng(devices=[]):  # nobody else's draws change
        torch.manual_seed(0)
        x, plain = torch.randn(2, 8), nn.Linear(8, 4, bias=layer.bias is not None)
    tried = kind.__new__(kind)
    tried.__dict__ = {**layer.__dict__, "_parameters": plain._parameters, "in_features": 8, "out_features": 4}
    try:
        with torch.no_grad():
            return torch.allclose(kind.forward(tried, x), plain(x), rtol=1e-4, atol=1e-5)
    except Exception:  # whatever its class makes of it
        return False


def set_activations(model: nn.Module, activations: str) -> None:
    """What packed layers multiply: "bf16" weights with bf16 inputs, or "int8" inputs with the integer codes themselves, or
    "fp8" (E4M3) inputs with weights that are 8-bit floats.

    Raises:
        GradlessError: int8, and a layer's codes are no integers; fp8, and they are no 8-bit floats with one scale a row.
    """
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    if activations != "bf16" and not layers:
        raise GradlessError(
            f"{activations} activations are for packed weights, and this model is dense; quantize it first (--bits 8)."
        )
    for layer in layers:
        layer.activations = activations
        block = layer.packed.block
        if activations == "int8" and not layer.packed.has_integers:
            raise GradlessError(
                f"{layer.packed.name} is {block.name}, whose codes are no integers; "
                "int8 activations need an integer grid: leave --activations out."
            )
        if activations == "fp8":
            _float8(layer.packed)


def _float8_product(tensor: QuantTensor, rows: Tensor, x: Tensor) -> Tensor:
    """E4M3 inputs, scaled token by token, times the weight's own 8-bit floats, scaled row by row."""
    float8, scale = _float8(tensor)
    levels = (kernels.dequantize(tensor, rows, torch.float32) / scale[rows]).to(float8)  # exact: no bit is rounded
    dtype, x = x.dtype, x.float()
    reach = x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    reach = torch.where(reach == 0, 1.0, reach)
    inputs = (x / reach).to(torch.float8_e4m3fn)
    each = [
        torch._scaled_mm(share, weight.T, scale_a=s, scale_b=scale[rows].T, out_dtype=torch.bfloat16)
        for share, weight, s in zip(inputs, levels, reach, strict=True)
    ]
    return torch.stack(each).to(dtype)


def _float8(tensor: QuantTensor) -> tuple[torch.dtype, Tensor]:
    """The 8-bit float type of a weight's codes, and what each file row's floats are multiplied by: fp32, (rows, 1).

    Raises:
        GradlessError: they are no 8-bit floats, or a row has several scales.
    """
    grid = tensor.block.name.partition("/")[0]
    float8 = next((each for each in (torch.float8_e4m3fn, torch.float8_e5m2) if floating(each).name == grid), None)
    if float8 is None or tensor.block.levels is None:
        raise GradlessError(f"{tensor.name} is {tensor.block.name}; fp8 activations need --grid fp8 or fp8-e5m2.")
    scale = tensor.base()
    if tensor.master is not None or not torch.equal(scale, scale[:, :1].expand_as(scale)):
        raise GradlessError(
            f"{tensor.name} has, or tunes, a scale for each of its groups, and fp8 activations need one for each row; "
            "quantize with --group-size channel, and tune the codes."
        )
    return float8, scale[:, :1] * (tensor.block.levels[-1] / torch.finfo(float8).max)


class QuantEmbedding(_Packed):
    """A lookup table of packed rows: only the rows that are looked up are unpacked.

    Attributes:
        packed: the packed (num_embeddings, embedding_dim) table.
        factor: what the rows are multiplied by (Gemma's sqrt of the hidden size), or None.
    """

    def __init__(self, weight: QuantTensor, factor: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.packed = weight
        self.dtype = dtype
        self.register_buffer("factor", factor, persistent=False)

    factor: Tensor | None

    @property
    def num_embeddings(self) -> int:
        return self.packed.rows

    @property
    def embedding_dim(self) -> int:
        return self.packed.columns

    def forward(self, ids: Tensor) -> Tensor:
        """int64 (...) -> (..., embedding_dim), the ids reading the table's views as its `owners` say."""
        distinct, place = torch.unique(ids, return_inverse=True)
        looked_up = kernels.dequantize(self.packed, self.packed.file_rows[distinct], self.dtype)
        views = self.packed.owners
        if views is None:
            views = torch.arange(len(looked_up), device=ids.device).repeat_interleave(ids.numel() // len(looked_up))
        y = looked_up[views, place.flatten()].view(*ids.shape, self.embedding_dim)
        return y if self.factor is None else y * self.factor.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.block.name}"


@contextmanager
def restricted_to(head: nn.Module, ids: Tensor | None) -> Iterator[bool]:
    """Let a model's head compute the logits of `ids` alone, in their order; yields whether it does.

    A classification among few words needs few of a head's rows; their normalizer cancels. So few are computed in
    fp32: a logit of 16 has steps of 1/8 in bf16, which would drown the difference between two queries.
    """
    if ids is None or not isinstance(head, QuantLinear | nn.Linear):
        yield False
        return
    if isinstance(head, QuantLinear):
        head.only = ids
    else:  # a module calls the `forward` among its own attributes first
        vars(head)["forward"] = partial(_few_outputs, head, ids)
    try:
        yield True
    finally:
        if isinstance(head, QuantLinear):
            head.only = None
        else:
            del vars(head)["forward"]


def _few_outputs(head: nn.Linear, ids: Tensor, x: Tensor) -> Tensor:
    """Outputs `ids` of a dense head, in fp32."""
    return F.linear(x.float(), head.weight[ids].float(), None if head.bias is None else head.bias[ids].float())


@contextmanager
def reading_at(head: nn.Module, rows: Tensor, columns: Tensor) -> Iterator[None]:
    """Let a model's head see only the hidden states at (rows, columns): (batch, length, d) -> (1, n, d); other shapes whole."""

    def read(_head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        return (inputs[0][rows, columns].unsqueeze(0),) if inputs[0].ndim == 3 else None

    handle = head.register_forward_pre_hook(read)
    try:
        yield
    finally:
        handle.remove()
