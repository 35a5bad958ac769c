"""The operations behind a forward and an update, from the fastest set that passes its self-test here.

`reference` is the meaning; `cpu` is compiled C++, `triton` is for NVIDIA's GPUs. The choice is by rule, not by timing: the
device's own kernels, unless they are not there, fail the self-test, or GRADLESS_KERNELS=torch asks for the reference.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor

from gradless import noise
from gradless.blocks import BLOCK_TYPES, block_type
from gradless.errors import GradlessError
from gradless.kernels import codebooks, reference, remembered
from gradless.kernels.reference import exported_offset
from gradless.noise import Direction, Signs
from gradless.tensor import CodebookTensor, Move, Part, QuantTensor

__all__ = [
    "add_shifts",
    "attention",
    "coordinates",
    "coordinates_of_each",
    "dequantize",
    "dither",
    "exported_offset",
    "gate",
    "linear",
    "linear_int8",
    "move_blocks",
    "move_codes",
    "moved",
    "name",
    "products",
    "rms_norm",
    "whole_steps",
    "why_not_compiled",
]

EVERY_TYPE = (
    *BLOCK_TYPES,
    *("int4/64", "nf4/32", "uint4/64+offset", "uint3/32+offset", "fp8-e4m3/64", "int8/32", "uint8/64+offset"),
    *("uint4/64+zero", "uint8/32+zero", "nf4/64+fp32", "int8/64+fp32"),
)
"""Of our own block types those for which kernels differ."""
SELF_TESTED = {"cpu": EVERY_TYPE, "cuda": ("Q4_1", "Q6_K")}
"""On a GPU each type takes a while to compile."""

_log = logging.getLogger(__name__)


def dequantize(tensor: QuantTensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight under its views; see `reference.dequantize`."""
    ops = _ops(tensor.packed)
    if isinstance(tensor, CodebookTensor):
        return codebooks.dequantize(tensor, rows, dtype, ops.vectors)
    result: Tensor = ops.dequantize(tensor, rows, dtype)
    return result


def linear(tensor: QuantTensor, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T in x's dtype, W under its views; see `reference.linear`. Where tokens have views of their own, x is (1, tokens,
    columns)."""
    if tensor.owners is not None:
        return _owned(linear, tensor, rows, x)
    ops = _ops(tensor.packed)
    if isinstance(tensor, CodebookTensor):
        return codebooks.linear(tensor, rows, x, ops.vectors)
    result: Tensor = ops.linear(tensor, rows, x)
    return result


def linear_int8(tensor: QuantTensor, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T in integers, W under its views; see `reference.linear_int8`, and `linear` for tokens with views of their own."""
    if tensor.owners is not None:
        return _owned(linear_int8, tensor, rows, x)
    result: Tensor = _ops(tensor.packed).linear_int8(tensor, rows, x)
    return result


def _owned(product: Callable[[QuantTensor, Tensor, Tensor], Tensor], tensor: QuantTensor, rows: Tensor, x: Tensor) -> Tensor:
    """A product in which each token reads the weight under its own view: one for all and what shifts add to it, or, where views
    change more, one for each.

    Raises:
        GradlessError: the weight sees other tokens than those whose owners are known, as a head at a few positions does.
    """
    owners, tokens = tensor.owners, x.shape[1]
    if owners is None or len(owners) != tokens:
        raise GradlessError(
            f"{tensor.name} does not see all tokens of a batch in their order, so that whose they are is unknown; "
            "leave it out with --exclude-modules."
        )
    plain = replace(tensor, views=(), owners=None)
    if tensor.shifts:
        y = product(plain, rows, x)
        add_shifts(tensor, rows, x[0], y[0])
        return y
    y = x.new_empty(1, tokens, len(rows))
    for v, view in enumerate(tensor.views):
        mine = owners == v
        y[:, mine] = product(replace(plain, views=(view,)), rows, x[:, mine])
    return y


def add_shifts(tensor: QuantTensor, rows: Tensor, x: Tensor, y: Tensor) -> None:
    """Add what each token's own view changes; see `reference.add_shifts`."""
    _ops(tensor.packed).add_shifts(tensor, rows, x, y)


def move_blocks(tensor: QuantTensor, moves: Sequence[Move]) -> None:
    """Update a weight's tuned values in place; see `reference.move_blocks`."""
    ops = reference if isinstance(tensor, CodebookTensor) else _ops(tensor.packed)
    ops.move_blocks(tensor, moves)


def move_codes(tensor: QuantTensor, move: Move) -> int:
    """Update a weight's codes in place; see `reference.move_codes`."""
    result: int = _ops(tensor.packed).move_codes(tensor, move)
    return result


def coordinates(direction: Direction | Signs, name: str, n: int, device: torch.device) -> Tensor:
    """The first n coordinates of a direction for a tensor: fp32, (n,)."""
    result: Tensor = _ops(torch.empty(0, device=device)).coordinates(direction, name, n, device)
    return result


def coordinates_of_each(direction: Direction, names: Sequence[str], n: int, device: torch.device) -> Tensor:
    """The first n coordinates of a direction for each of some tensors: fp32, (names, n)."""
    result: Tensor = _ops(torch.empty(0, device=device)).coordinates_of_each(direction, names, n, device)
    return result


def whole_steps(name: str, move: Move, n: int, device: torch.device, residual: Tensor | None) -> Tensor:
    """What an update moves n codes by; see `reference.whole_steps`."""
    result: Tensor = _ops(torch.empty(0, device=device)).whole_steps(name, move, n, device, residual)
    return result


def dither(name: str, shape: torch.Size) -> Tensor:
    """Where the residuals of a tensor's codes begin, on the CPU; see `reference.dither`."""
    result: Tensor = (_own("cpu")[0] or reference).dither(name, shape)
    return result


def moved(values: Tensor, name: str, move: Move, dtype: torch.dtype, *, stochastic: bool = False) -> Tensor:
    """A plain tensor, moved; see `reference.moved`."""
    result: Tensor = _ops(values).moved(values, name, move, dtype, stochastic=stochastic)
    return result


def name(device: torch.device | str = "cpu") -> str:
    """Which kernels serve tensors on `device`: "cpu" (compiled), "triton" or "torch"."""
    result: str = _ops(torch.empty(0, device=device)).NAME
    return result


def why_not_compiled() -> str | None:
    """Why the compiled kernels are not in use on this CPU, in one phrase; None where they are."""
    return _own("cpu")[1]


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor:
    """See `reference.rms_norm`."""
    result: Tensor = _ops(x).rms_norm(x, weight, eps, plus)
    return result


def gate(gates: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """See `reference.gate`."""
    result: Tensor = _ops(up).gate(gates, up, gelu=gelu)
    return result


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """See `reference.attention`."""
    result: Tensor = _ops(q).attention(q, k, v, mask, scale)
    return result


def products() -> dict[str, str]:
    """What multiplies each type of activations with packed weights on this CPU: instructions of ours, or torch."""
    compiled, _ = _own("cpu")
    result: dict[str, str] = (compiled or reference).instructions()
    return result


def _ops(tensor: Tensor) -> ModuleType:
    return _own(tensor.device.type)[0] or reference


@cache
def _own(device: str) -> tuple[ModuleType | None, str | None]:
    """The kernels for a type of device; None, and why, where the reference serves it."""
    if os.environ.get("GRADLESS_KERNELS") == reference.NAME:
        return None, "GRADLESS_KERNELS=torch"
    if device not in SELF_TESTED:
        return None, f"there are no kernels for {device}"
    try:
        ops = import_module(f"gradless.kernels.{'cpu' if device == 'cpu' else 'triton'}")
    except (ImportError, OSError) as error:
        return None, str(error)
    if device == "cpu" and remembered.passed(ops.LIBRARY):
        return ops, None
    if device == "cuda":
        _log.warning("gradless: trying the GPU's kernels; the first time, they are compiled, which takes up to a minute")
    try:
        failed = self_test(ops, device, SELF_TESTED[device])
    except Exception as error:  # a GPU's kernels are compiled here, and what can go wrong is the compiler's
        failed = f"{type(error).__name__}: {error}"
    if failed:
        _log.warning("gradless: the %s kernels differ from the reference (%s); running on plain torch", ops.NAME, failed)
        return None, f"self-test failed: {failed}"
    if device == "cpu":
        remembered.remember(ops.LIBRARY)
    return ops, None


def self_test(ops: ModuleType, device: str = "cpu", types: Sequence[str] = EVERY_TYPE) -> str | None:
    """Run every kernel of `ops` on small tensors against the reference; the first that differs (in a bit, where bits count)."""
    value_move = Move(Direction(7, 1, 2), -0.03, 0.99)
    code_move = Move(Direction(7, 1, 2, noise.uniform_grid(2)), -0.3)
    rows = torch.tensor([2, 0, 1], device=device)
    for block in map(block_type, types):
        packed = _some_bytes((3, 5, block.nbytes)).to(device)
        for top in (at + dtype.itemsize - 1 for at, dtype in block.fields.items()):
            packed[..., top] = packed[..., top] % 60 + packed[..., top] // 128 * 128  # finite
        for part in Part:
            ours, theirs = (QuantTensor("self-test", block, packed) for _ in range(2))
            for tensor, kernels in ((ours, ops), (theirs, reference)):
                tensor.packed = packed.clone()
                tensor.share = 2 if block.has_zero_point else 1
                tensor.tune(part)
                if part is Part.CODE:
                    kernels.move_codes(tensor, code_move)
                    tensor.stride = 2
                    tensor.residual = kernels.dither("self-test", torch.Size((tensor.tuned_rows, tensor.columns))).to(device)
                    kernels.move_codes(tensor, code_move)
                    tensor.views = (code_move._replace(coefficient=1.0), code_move._replace(coefficient=-1.0))
                else:
                    kernels.move_blocks(tensor, [value_move, value_move])
                    tensor.views = (value_move, value_move._replace(coefficient=0.03))
            same = torch.equal(ours.packed, theirs.packed)
            for mine, other in ((ours.master, theirs.master), (ours.residual, theirs.residual)):
                same &= mine is other is None or (mine is not None and other is not None and torch.equal(mine, other))
            for dtype in (torch.float32, torch.bfloat16):
                same &= torch.equal(ops.dequantize(ours, rows, dtype), reference.dequantize(theirs, rows, dtype))
                if block.levels is None:
                    x = Direction(8, 0).values("x", 0, 4 * ours.columns, device).view(2, 2, -1).to(dtype)
                    same &= torch.equal(ops.linear_int8(ours, rows, x), reference.linear_int8(theirs, rows, x))
            x = Direction(8, 0).values("x", 0, 4 * ours.columns, device).view(2, 2, -1)
            same &= torch.allclose(ops.linear(ours, rows, x), reference.linear(theirs, rows, x), rtol=1e-4, atol=1e-3)
            if ours.shifts:
                ours.owners = theirs.owners = torch.tensor([1, 0, 0, 1], device=device)
                one, two = torch.zeros(4, 3, device=device), torch.zeros(4, 3, device=device)
                ops.add_shifts(ours, rows, x.flatten(0, 1), one)
                reference.add_shifts(theirs, rows, x.flatten(0, 1), two)
                same &= torch.allclose(one, two, rtol=1e-4, atol=1e-3)
            if not same:
                return f"{block.name}, {part}"
    table = Direction(8, 0).values("table", 0, 3 * 64 * 8, device).view(-1, 8)
    for of_codes in (torch.int8, torch.int16):
        codes = _some_bytes((24,)).view(of_codes).view(2, -1, 3).to(device)
        for dtype in (torch.float32, torch.bfloat16):
            if not torch.equal(ops.vectors(codes, table, dtype), reference.vectors(codes, table, dtype)):
                return f"sums of vectors named by {of_codes}"
    for distribution in (*noise.NAMED.values(), noise.uniform_grid(2), noise.RoundedGaussian(0.3)):
        move = Move(Direction(7, 1, 2, distribution), -0.03, 0.99)
        u, n, where = move.direction, 300, torch.device(device)
        same = torch.equal(ops.coordinates(u, "self-test", n, where), reference.coordinates(u, "self-test", n, where))
        steps = (each.whole_steps("self-test", move, n, where, None) for each in (ops, reference))
        if not same or not torch.equal(*steps):
            return f"{distribution}"
        for source in (torch.float32, torch.bfloat16):
            values = Direction(8, 0).values("values", 0, 300, device).to(source)
            for dtype in (torch.float32, torch.bfloat16):
                arguments = (values, "self-test", move, dtype)
                if not torch.equal(ops.moved(*arguments, stochastic=True), reference.moved(*arguments, stochastic=True)):
                    return f"moved by {distribution}, {source} to {dtype}"
    return None if torch.allclose(_fused(ops), _fused(reference), rtol=2.0**-7, atol=2.0**-7) else "the fused passes"


def _fused(ops: ModuleType) -> Tensor:
    """What the passes between linear layers make of some numbers: fp32, (n,)."""
    q = Direction(9, 0).values("q", 0, 4 * 40 * 32).bfloat16().view(1, 4, 40, 32)
    norm: Tensor = ops.rms_norm(q, q[0, 0, 0], 1e-5, 1.0)
    gated: Tensor = ops.gate(q, q, gelu=True)
    attended: Tensor = ops.attention(q, q[:, :2], q[:, 2:], None, 0.2)
    return torch.cat([norm.flatten(), gated.flatten(), attended.flatten()]).float()


def _some_bytes(shape: tuple[int, ...]) -> Tensor:
    n = torch.Size(shape).numel()
    return (Direction(1, 0).words("self-test")(0, n) & 255).to(torch.uint8).view(shape)
