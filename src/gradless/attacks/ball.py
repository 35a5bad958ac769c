"""`Ball`: the perturbations that an attack may make of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradless.errors import GradlessError

Norm = Literal["linf", "l2"]
SLACK = 1e-4
"""Rounding error, in grid steps, that a quotient may have and still count as a whole number."""


@dataclass(frozen=True)
class Ball:
    """A norm ball around each image, with an optional grid of perturbations and the range of pixels.

    Perturbations are counted in units: a unit is a grid step, or eps if there is no grid.

    Attributes:
        eps: the radius, in units of the pixels.
        norm: "linf" or "l2".
        bits: the grid has 2**bits - 1 even levels over [-eps, eps], among them zero and both ends. None for no grid.
        low: the smallest pixel value.
        high: the largest pixel value.
        reach: the bound of a single coordinate, as a multiple of eps.
        pixel_bits: perturbed images are rounded to pixels of this many bits, toward the original image. None: not rounded.

    Raises:
        GradlessError: a value out of its range, or a grid whose single step goes beyond `reach`.
    """

    eps: float
    norm: Norm = "linf"
    bits: int | None = None
    low: float = 0.0
    high: float = 1.0
    reach: float = 1.0
    pixel_bits: int | None = None

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise GradlessError(f"eps is {self.eps}; it must be above zero, in the units of the pixels.")
        if self.norm not in ("linf", "l2"):
            raise GradlessError(f"norm is {self.norm!r}; it can be linf or l2.")
        for name, bits in (("bits", self.bits), ("pixel_bits", self.pixel_bits)):
            if bits is not None and not 2 <= bits <= 8:
                raise GradlessError(f"{name} is {bits}; it can be 2 to 8.")
        if self.farthest < 1 and self.bits is not None:
            raise GradlessError(
                f"at {self.bits} bits one step in every pixel leaves the l2 ball of {self.eps}; take more bits."
            )

    @property
    def levels(self) -> int:
        """Grid steps from zero to eps; 1 if there is no grid."""
        return 1 if self.bits is None else 2 ** (self.bits - 1) - 1

    @property
    def unit(self) -> float:
        """The size of a grid step, or eps."""
        return self.eps / self.levels

    @property
    def farthest(self) -> float:
        """The bound of a single coordinate, in units; a whole number on a grid."""
        most = self.reach * self.levels
        return most if self.bits is None else float(int(most + SLACK))

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest perturbation of each pixel, given the pixels' range and `reach`.

        Args:
            images: fp32 (n, pixels).

        Returns:
            Two of fp32 (n, pixels), in units.
        """
        lower, upper = (self.low - images) / self.unit, (self.high - images) / self.unit
        if self.bits is not None:
            lower, upper = (lower - SLACK).ceil(), (upper + SLACK).floor()
        return lower.clamp(min=-self.farthest), upper.clamp(max=self.farthest)

    def project(self, x: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
        """The nearest perturbations inside the bounds and on the grid; an l2 ball then shrinks them toward zero.

        Args:
            x: fp32 (n, pixels), in units.
            bounds: see `bounds`.

        Returns:
            fp32 (n, pixels), in units.
        """
        x = x.clamp(*bounds) if self.bits is None else x.round().clamp_(*bounds)
        if self.norm == "l2":
            length = x.norm(dim=1, keepdim=True) * (self.unit / self.eps)
            within = x * ((1 - 1e-6) / length.clamp(min=1e-12))
            x = torch.where(length > 1, within if self.bits is None else within.trunc(), x)
        return x

    def shown(self, x: Tensor, images: Tensor) -> Tensor:
        """The perturbed images, inside the pixels' range: fp32 (n, pixels), of perturbations and images of that shape."""
        change = self.unit * x
        if self.pixel_bits is not None:
            step = (self.high - self.low) / (2**self.pixel_bits - 1)
            change = step * (change / step + SLACK * x.sign()).trunc()
        return change.add_(images).clamp_(self.low, self.high)
