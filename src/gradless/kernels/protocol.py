"""What a set of kernels owes. `reference` gives each function its meaning; every other set is tried against it before use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gradless.noise import Direction, Signs
from gradless.tensor import BlockWeight, Move


class Ops(Protocol):
    """A module of kernels for one type of device. Unless a line says otherwise, a kernel has the reference's bits.

    Attributes:
        NAME: what reports and journals call it.
    """

    NAME: str

    # Reading weights under their views.
    def dequantize(self, weight: BlockWeight, rows: Tensor, dtype: torch.dtype) -> Tensor: ...

    def linear(self, weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
        """Agrees within the rounding of a sum."""

    def linear_int8(self, weight: BlockWeight, rows: Tensor, x: Tensor) -> Tensor: ...

    def add_shifts(self, weight: BlockWeight, rows: Tensor, x: Tensor, y: Tensor) -> None:
        """Agrees within the rounding of a sum."""

    def vectors(self, codes: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor: ...

    # Updating what is tuned.
    def move_blocks(self, weight: BlockWeight, moves: Sequence[Move]) -> None: ...

    def move_codes(self, weight: BlockWeight, move: Move) -> int: ...

    def moved(self, values: Tensor, name: str, move: Move, dtype: torch.dtype, *, stochastic: bool = False) -> Tensor: ...

    # Noise.
    def coordinates(self, direction: Direction | Signs, name: str, n: int, device: torch.device) -> Tensor: ...

    def coordinates_of_each(self, direction: Direction, names: Sequence[str], n: int, device: torch.device) -> Tensor: ...

    def whole_steps(self, name: str, move: Move, n: int, device: torch.device, residual: Tensor | None) -> Tensor: ...

    def dither(self, name: str, shape: torch.Size) -> Tensor:
        """On the CPU, whatever the device."""

    # The passes between linear layers, which agree within bf16's rounding.
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, plus: float) -> Tensor: ...

    def gate(self, gates: Tensor, up: Tensor, *, gelu: bool) -> Tensor: ...

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor: ...

    def instructions(self) -> dict[str, str]:
        """A report, so each set has its own."""
