"""ZO-signSGD as a black-box attack (Liu et al., 2019)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gradless.attacks.base import Attack, falling
from gradless.methods.zo_sign_sgd import ZOSignSGD
from gradless.spaces import ImageSpace

LEAST_MU = 0.3
"""Grid steps; at 2 bits, where a step is all of eps, so few pixels move that it is no blind leap."""


class ZOSignSGDAttack(Attack):
    """Steps of `eta` along the sign of a gradient estimated from q random directions; see `gradless.methods.ZOSignSGD`.

    With `bits` every query and every step is rounded to the nearest point of the grid.

    Args:
        mu: of the directions, as a share of eps; at least `LEAST_MU` grid steps.
        eta: of the first step, as a share of eps; see `falling`.
        q: directions a step.
        eps: as the rest, see `Attack`.
    """

    def __init__(self, eps: float, *, mu: float = 0.02, eta: float = 0.3, q: int = 10, **more: Any) -> None:
        super().__init__(eps, **more)
        self.mu, self.eta, self.q = mu, eta, q

    @property
    def queries_a_step(self) -> int:
        return self.q + 1

    def schedule(self, step: int) -> float:
        return falling(step)

    def search(self, images: Tensor, first: int) -> tuple[ImageSpace, ZOSignSGD]:
        space, levels = ImageSpace(images, self.ball, first=first), self.ball.levels
        mu = self.mu if self.ball.bits is None else max(self.mu * levels, LEAST_MU)
        return space, ZOSignSGD([space], lr=self.eta * levels, eps=mu, q=self.q, seed=self.seed)
