"""ZO-signSGD: signSGD via zeroth-order oracle (Liu et al., 2019, ICLR), and the attack that searches images with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from gradless.attacks.base import Attack, falling
from gradless.attacks.space import ImageSpace
from gradless.batch import Batch, Loss
from gradless.methods.base import Group, Measurement, ZerothOrderOptimizer, number
from gradless.noise import Distribution, Signs
from gradless.spaces import Space
from gradless.tensor import Move

LEAST_MU = 0.3
"""Smallest mu on a grid, in grid steps. At 2 bits, where a step is all of eps, it moves few pixels, so that the query is no
leap across the ball."""


class ZOSignSGD(ZerothOrderOptimizer):
    """Steps along the sign of an estimated gradient.

        g   = (1 / q) sum_i [ L(x + eps u_i) - L(x) ] / eps * u_i
        x  <- x - lr sign(g)

    One-sided: q + 1 losses a step.

    Args:
        spaces: see `ZerothOrderOptimizer`; spaces that can move by `Signs`.
        lr: step size.
        eps: the paper's mu.
        q: directions a step.
        seed: of the run.
        distribution: "gaussian" or "rademacher".
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float,
        eps: float,
        *,
        q: int = 10,
        seed: int = 0,
        distribution: Distribution | str = "gaussian",
    ) -> None:
        super().__init__(spaces, {"lr": lr, "eps": eps, "weight_decay": 0.0}, q=q, seed=seed, distribution=distribution)

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        """(loss at x + eps u, loss at x) along each of this step's directions."""
        here, losses = batch.loss(), []
        for query in range(self.q):
            with self.perturbed(query, +1, many_forwards=batch.generates):
                losses.append((number(batch.loss()), number(here)))
        return Measurement(tuple(losses), batch.size)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        eps: float = group["eps"]
        return (plus - minus) / eps

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """-lr sign(sum_i d_i u_i)."""
        yield Move(Signs(tuple((self.direction(step, query, group), each) for query, each in enumerate(d))), -lr)


class ZOSignSGDAttack(Attack):
    """`ZOSignSGD` over an image's perturbation, in steps of `eta` that shrink (see `falling`).

    With `bits` every query and every step is rounded to the nearest point of the grid.

    Args:
        eps: radius of the ball, in units of the pixels.
        mu: standard deviation of a query's noise, as a share of eps; at least `LEAST_MU` grid steps.
        eta: size of the first step, as a share of eps.
        q: directions a step.
        more: the other options of `Attack`.
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
