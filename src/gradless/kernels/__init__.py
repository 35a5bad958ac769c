"""The operations behind a forward and an update, from the fastest set of kernels that passes its self-test here.

`reference` is the meaning; `cpu` is compiled C++, `triton` is for NVIDIA's GPUs. The choice is by rule, not by timing: the
device's own kernels, unless they are not there, fail the self-test, or GRADLESS_KERNELS=torch asks for the reference.
`protocol.Ops` is what every set owes.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.kernels import codebooks, reference, remembered
from gradless.kernels.protocol import Ops
from gradless.kernels.reference import exported_offset
from gradless.kernels.self_test import EVERY_TYPE, first_difference
from gradless.tensor import BlockWeight, CodebookWeight, Move, PackedWeight

__all__ = [
    "EVERY_TYPE",
    "dequantize",
    "exported_offset",
    "linear",
    "linear_int8",
    "move_blocks",
    "name",
    "on",
    "products",
    "why_not_compiled",
]

GPU_TYPES = ("Q4_1", "Q6_K")
"""The block types of a GPU's self-test. Each takes a while to compile there."""

_log = logging.getLogger(__name__)


def on(device: torch.device | str) -> Ops:
    """The kernels that serve tensors on a device."""
    return _own(torch.device(device).type)[0] or reference


def name(device: torch.device | str = "cpu") -> str:
    """The name of these kernels: "cpu" (compiled), "triton" or "torch"."""
    return on(device).NAME


def why_not_compiled() -> str | None:
    """Why the compiled kernels are not in use on this CPU, in one phrase; None if they are."""
    return _own("cpu")[1]


def products() -> dict[str, str]:
    """What multiplies each type of activations with packed weights on this CPU: instructions of ours, or torch."""
    return on("cpu").instructions()


def dequantize(weight: PackedWeight, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of a weight under its views; see `reference.dequantize`."""
    ops = on(weight.packed.device)
    if isinstance(weight, CodebookWeight):
        return codebooks.dequantize(weight, rows, dtype, ops)
    return ops.dequantize(weight.in_blocks(), rows, dtype)


def linear(weight: PackedWeight, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T in x's dtype, W under its views; see `reference.linear`. If tokens have views of their own, x is (1, tokens,
    columns)."""
    if weight.views.example_of_token is not None:
        return _linear_per_token(linear, weight, rows, x, weight.views.example_of_token)
    ops = on(weight.packed.device)
    if isinstance(weight, CodebookWeight):
        return codebooks.linear(weight, rows, x, ops)
    return ops.linear(weight.in_blocks(), rows, x)


def linear_int8(weight: PackedWeight, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T in integers, W under its views; see `reference.linear_int8`, and `linear` for tokens with views of their own."""
    if weight.views.example_of_token is not None:
        return _linear_per_token(linear_int8, weight, rows, x, weight.views.example_of_token)
    return on(weight.packed.device).linear_int8(weight.in_blocks(), rows, x)


def _linear_per_token(
    product: Callable[[PackedWeight, Tensor, Tensor], Tensor],
    weight: PackedWeight,
    rows: Tensor,
    x: Tensor,
    example_of_token: Tensor,
) -> Tensor:
    """A product in which each token reads the weight under its own view. If views add to sums of inputs, there is one product
    for all, and what they add; else there is one for each view.

    Raises:
        GradlessError: the weight does not see all tokens of the batch, as a head at a few positions.
    """
    tokens = x.shape[1]
    if len(example_of_token) != tokens:
        raise GradlessError(
            f"{weight.name} does not see all tokens of a batch in their order, so that whose they are is unknown; "
            "leave it out with --exclude-modules."
        )
    if weight.is_additive_offset:
        y = product(weight.under(), rows, x)
        on(x.device).add_shifts(weight.in_blocks(), rows, x[0], y[0])
        return y
    y = x.new_empty(1, tokens, len(rows))
    for v, move in enumerate(weight.views.moves):
        mine = example_of_token == v
        y[:, mine] = product(weight.under(move), rows, x[:, mine])
    return y


def move_blocks(weight: PackedWeight, moves: Sequence[Move]) -> None:
    """Update a weight's tuned values in place; see `reference.move_blocks`."""
    if isinstance(weight, BlockWeight):
        on(weight.packed.device).move_blocks(weight, moves)
    else:
        reference.move_blocks(weight, moves)


Choice = tuple[Ops | None, str | None]
"""The kernels for a type of device; or None, and why the reference serves it."""


@cache
def _own(device: str) -> Choice:
    if os.environ.get("GRADLESS_KERNELS") == reference.NAME:
        return None, "GRADLESS_KERNELS=torch"
    if device not in _SETS:
        return None, f"there are no kernels for {device}"
    try:
        return _SETS[device]()
    except (ImportError, OSError) as error:
        return None, str(error)


def _compiled() -> Choice:
    from gradless.kernels import cpu

    if remembered.passed(cpu.LIBRARY):
        return cpu, None
    ops, why = _tried(cpu, "cpu", EVERY_TYPE)
    if ops is not None:
        remembered.remember(cpu.LIBRARY)
    return ops, why


def _triton() -> Choice:
    from gradless.kernels import triton

    _log.warning("gradless: trying the GPU's kernels; the first time, they are compiled, which takes up to a minute")
    return _tried(triton, "cuda", GPU_TYPES)


_SETS = {"cpu": _compiled, "cuda": _triton}


def _tried(ops: Ops, device: str, types: Sequence[str]) -> Choice:
    """The kernels if they pass their self-test on these block types."""
    try:
        failed = first_difference(ops, device, types)
    except Exception as error:  # a GPU's kernels are compiled here, and the compiler may fail in any way
        failed = f"{type(error).__name__}: {error}"
    if failed is None:
        return ops, None
    _log.warning("gradless: the %s kernels differ from the reference (%s); running on plain torch", ops.NAME, failed)
    return None, f"self-test failed: {failed}"
