"""Where the perturbation of an image may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gradless.errors import GradlessError

Norm = Literal["linf", "l2"]
SLACK = 1e-4
"""Of a grid step: what rounding to fp32 may take from a quotient that is a whole number."""


@dataclass(frozen=True)
class Ball:
    """A norm ball, a grid over it, and the pixels' range, which the image and its perturbation must not leave together.

    Perturbations are counted in units: of the grid's steps, or of eps where there is no grid.

    Attributes:
        eps: the radius, in units of the pixels.
        norm: "linf" or "l2".
        bits: of the grid over [-eps, eps]: 2**bits - 1 levels, zero and both ends among them. None: no grid.
        low: the smallest pixel.
        high: the largest one.
        reach: how far a single coordinate may go, as a multiple of eps.
        pixel_bits: an image plus its perturbation is cut to the grid of so many bits over the pixels' range, toward the image.

    Raises:
        GradlessError: values that leave nothing.
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
        """The grid's steps from zero to eps; 1 where there is no grid."""
        return 1 if self.bits is None else 2 ** (self.bits - 1) - 1

    @property
    def unit(self) -> float:
        """The size of a grid step, or eps."""
        return self.eps / self.levels

    @property
    def farthest(self) -> float:
        """How far a single coordinate may go, in units; whole ones on a grid."""
        most = self.reach * self.levels
        return most if self.bits is None else float(int(most + SLACK))

    def bounds(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and the highest level that pixels and reach allow: fp32 (n, pixels) in units, of images (n, pixels)."""
        lower, upper = (self.low - images) / self.unit, (self.high - images) / self.unit
        if self.bits is not None:
            lower, upper = (lower - SLACK).ceil(), (upper + SLACK).floor()
        return lower.clamp(min=-self.farthest), upper.clamp(max=self.farthest)

    def project(self, x: Tensor, bounds: tuple[Tensor, Tensor]) -> Tensor:
        """Perturbations brought inside their images' bounds, and onto the grid: fp32 (n, pixels) in units.

        Every coordinate goes to the nearest level within the bounds; then, in l2, toward zero.
        """
        x = x.clamp(*bounds) if self.bits is None else x.round().clamp_(*bounds)
        if self.norm == "l2":
            length = x.norm(dim=1, keepdim=True) * (self.unit / self.eps)
            within = x * ((1 - 1e-6) / length.clamp(min=1e-12))
            x = torch.where(length > 1, within if self.bits is None else within.trunc(), x)
        return x

    def shown(self, x: Tensor, images: Tensor) -> Tensor:
        """The perturbed images: fp32 (n, pixels), inside the pixels' range."""
        change = self.unit * x
        if self.pixel_bits is not None:
            step = (self.high - self.low) / (2**self.pixel_bits - 1)
            change = step * (change / step + SLACK * x.sign()).trunc()
        return change.add_(images).clamp_(self.low, self.high)
