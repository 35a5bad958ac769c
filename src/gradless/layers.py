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
from gradless.tensor import PackedWeight, Part
from gradless.types import Modules

# oneDNN keeps a compiled kernel for each of the last 1024 shapes that it saw; with batches of every length that is 100 MB.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

TILE = 1 << 22
"""The number of weights that are unpacked at once on a CPU: all of a small model's layer, but not a language model's head."""
GPU_TILE = 1 << 25
"""The same on a GPU, where many small launches cost more than their work: all of a 7B model's layer but the widest."""


class _Packed(nn.Module):
    """A module that holds a packed weight, which follows the module from device to device.

    Attributes:
        packed: the packed weight.
        dtype: the type to which it is unpacked.
        lent: whether a model has read `weight`, to multiply it without calling this module.
    """

    packed: PackedWeight
    dtype: torch.dtype
    lent = False

    @property
    def weight(self) -> Tensor:
        """The whole weight unpacked, under its view: `dtype`, (rows, columns). Some models multiply a layer's weight
        themselves (Mamba its time steps').

        Raises:
            GradlessError: it has several views, and it is not known here which tokens read which.
        """
        self.lent = True
        if self.packed.views.count > 1 or self.packed.views.example_of_token is not None:
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
        packed: the packed (out_features, in_features) weight; the embedding's, if the head is tied to it.
        bias: (out_features,) or None.
        only: int64 (n,), the outputs to compute instead of all, or None (see `restricted_to`).
        activations: the type of the product: "bf16", "int8" or "fp8" (see `set_activations`).
    """

    def __init__(self, weight: PackedWeight, bias: nn.Parameter | None, dtype: torch.dtype) -> None:
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

        If the weight has several views, x's tokens read them as `tensor.Views` says.
        """
        rows, bias = self.packed.file_rows, cast(Tensor | None, self.bias)
        x = x if self.packed.column_order is None else x[..., self.packed.column_order]
        shares = x.reshape(self.packed.views.shares, -1, self.in_features)
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
        return f"{self.in_features}, {self.out_features}, {self.packed.type_name}, bias={self.bias is not None}"


def is_plain(layer: nn.Linear) -> bool:
    """Whether a layer's class computes x @ W.T + b and nothing else, so that a packed layer can stand for it. A class with a
    forward of its own (a router, say) is tried on a small weight."""
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


def set_activations(model: Modules, activations: str) -> None:
    """Choose the product of packed layers: "bf16" weights with bf16 inputs, or "int8" inputs with the integer codes
    themselves, or "fp8" (E4M3) inputs with weights that are 8-bit floats.

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
        if activations == "int8" and not layer.packed.has_integers:
            raise GradlessError(
                f"{layer.packed.name} is {layer.packed.type_name}, whose codes are no integers; "
                "int8 activations need an integer grid: leave --activations out."
            )
        if activations == "fp8":
            _float8(layer.packed)


def _float8_product(weight: PackedWeight, rows: Tensor, x: Tensor) -> Tensor:
    """E4M3 inputs, scaled token by token, times the weight's own 8-bit floats, scaled row by row."""
    float8, scale = _float8(weight)
    levels = (kernels.dequantize(weight, rows, torch.float32) / scale[rows]).to(float8)  # exact: no bit is rounded
    dtype, x = x.dtype, x.float()
    reach = x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
    reach = torch.where(reach == 0, 1.0, reach)
    inputs = (x / reach).to(torch.float8_e4m3fn)
    each = [
        torch._scaled_mm(share, w.T, scale_a=s, scale_b=scale[rows].T, out_dtype=torch.bfloat16)
        for share, w, s in zip(inputs, levels, reach, strict=True)
    ]
    return torch.stack(each).to(dtype)


def _float8(weight: PackedWeight) -> tuple[torch.dtype, Tensor]:
    """The 8-bit float type of a weight's codes, and the scale of each file row: fp32, (rows, 1).

    Raises:
        GradlessError: they are no 8-bit floats, or a row has several scales.
    """
    grid = weight.type_name.partition("/")[0]
    float8 = next((each for each in (torch.float8_e4m3fn, torch.float8_e5m2) if floating(each).name == grid), None)
    levels = weight.in_blocks().block.levels if float8 is not None else None
    if float8 is None or levels is None:
        raise GradlessError(f"{weight.name} is {weight.type_name}; fp8 activations need --grid fp8 or fp8-e5m2.")
    scale = weight.file_values(Part.SCALE)
    if weight.part is not None or not torch.equal(scale, scale[:, :1].expand_as(scale)):
        raise GradlessError(
            f"{weight.name} has, or tunes, a scale for each of its groups, and fp8 activations need one for each row; "
            "quantize with --group-size channel, and tune the codes."
        )
    return float8, scale[:, :1] * (levels[-1] / torch.finfo(float8).max)


Linear = nn.Linear | QuantLinear
"""A linear layer, torch's or packed."""


class QuantEmbedding(_Packed):
    """A lookup table of packed rows: only the rows that are looked up are unpacked.

    Attributes:
        packed: the packed (num_embeddings, embedding_dim) table.
        factor: multiplies the rows (Gemma's sqrt of the hidden size), or None.
    """

    def __init__(self, weight: PackedWeight, factor: Tensor | None, dtype: torch.dtype) -> None:
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
        """int64 (...) -> (..., embedding_dim); if the table has several views, ids read them as `tensor.Views` says."""
        distinct, place = torch.unique(ids, return_inverse=True)
        looked_up = kernels.dequantize(self.packed, self.packed.file_rows[distinct], self.dtype)
        views = self.packed.views.example_of_token
        if views is None:
            views = torch.arange(len(looked_up), device=ids.device).repeat_interleave(ids.numel() // len(looked_up))
        y = looked_up[views, place.flatten()].view(*ids.shape, self.embedding_dim)
        return y if self.factor is None else y * self.factor.to(y.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.packed.type_name}"


@contextmanager
def restricted_to(head: nn.Module, ids: Tensor | None) -> Iterator[bool]:
    """Let a model's head compute the logits of `ids` alone, in their order; yields whether it does.

    A classification among few words needs few of a head's rows, and their normalizer cancels. These logits are computed in
    fp32: in bf16 a logit of 16 has steps of 1/8, which would drown the difference between two queries.
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
