"""An attack that sees labels alone: ZOQO on comparisons, from an adversarial start far outside the ball."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gradless import kernels
from gradless.attacks.base import Attack
from gradless.attacks.oracle import Oracle
from gradless.ball import Ball
from gradless.methods.zoqo import ZOQO
from gradless.noise import Chunks, Direction, Rademacher
from gradless.spaces import ImageSpace, image_names

STARTS = 50
"""Tries to find an adversarial start for an image."""


class LabelAttack(Attack):
    """Shrinks an adversarial perturbation until it is inside the ball.

        L(s) = the least r for which clip(image + r s) is adversarial,   s in {-1, 1},  r a whole number of grid steps

    A label tells whether r is enough for s, so one query compares two candidates: is s' adversarial at a radius smaller than
    that of s? Only if it is, its own radius is looked for by bisection. s is searched by ZOQO with SignHunter's chunks, from
    the first of some signs (all up, all down, random) whose radius is no more than the pixels' range; RayS (Chen and Gu,
    2020) searches the same L along its own path.

    Args:
        eps: as the rest, see `Attack`; `bits` is 8 unless another number is given.
    """

    def __init__(self, eps: float, *, bits: int = 8, **more: Any) -> None:
        super().__init__(eps, bits=bits, **more)

    @property
    def queries_a_step(self) -> int:
        return 2 * (1 + math.ceil(math.log2(self._wide.farthest + 1)))

    @property
    def _wide(self) -> Ball:
        """Where adversarial starts are: as far as pixels reach."""
        return replace(self.ball, norm="linf", reach=(self.ball.high - self.ball.low) / self.ball.eps)

    def search(self, images: Tensor, first: int) -> tuple[ImageSpace, ZOQO]:
        signs = Ball(1.0, bits=2, low=-math.inf, high=math.inf)
        space = ImageSpace(images, signs, first=first, start=1.0)
        return space, ZOQO([space], lr=2.0, whole_steps=True, seed=self.seed, distribution=Chunks(images.shape[1], 2))

    def losses(self, space: ImageSpace, oracle: Oracle, images: Tensor, first: int) -> Callable[[], Tensor]:
        wide, reach = self._wide, images.shape[1] ** -0.5 if self.ball.norm == "l2" else 1.0
        inside = replace(self.ball, reach=reach).farthest
        radius = torch.full((len(images),), wide.farthest + 1)  # of x, which is `held`; none is known to be enough yet

        def adversarial(rows: Tensor, signs: Tensor, r: Tensor) -> Tensor:
            x = wide.project(signs * r.unsqueeze(1), wide.bounds(images[rows]))
            return oracle.ask(rows + first, wide.shown(x, images[rows]), x, r <= inside) < 0

        for attempt in range(STARTS):
            rows = (radius > wide.farthest).nonzero().squeeze(1)
            if not len(rows):
                break
            signs = self._start(attempt, first + rows, images.shape[1])
            hit = adversarial(rows, signs, radius[rows] - 1)
            radius[rows[hit]] -= 1
            space.restart(rows[hit], signs[hit])
        held, seen, sides = space.values.float(), radius.clone(), 0

        def losses() -> Tensor:
            nonlocal sides
            rows, signs, x = space.rows, space.point(), space.values[space.rows].float()
            if sides % 2 == 0:
                moved = rows[(x != held[rows]).any(1)]
                radius[moved], held[rows], seen[rows] = seen[moved], x, math.inf
            sides += 1
            result, other = radius[rows], (signs != x).any(1)
            result[other] = least(rows[other], signs[other])
            seen[rows] = torch.minimum(seen[rows], result)
            return result

        def least(rows: Tensor, signs: Tensor) -> Tensor:
            """The least radius of these signs; that of x, and one more, where it is no smaller."""
            high, low = radius[rows] - 1, torch.full((len(rows),), inside - 1)
            hit = adversarial(rows, signs, high)
            while bool((wide_open := hit & (high - low > 1)).any()):
                middle = ((high + low) / 2).floor()[wide_open]
                enough = adversarial(rows[wide_open], signs[wide_open], middle)
                high[wide_open] = torch.where(enough, middle, high[wide_open])
                low[wide_open] = torch.where(enough, low[wide_open], middle)
            return torch.where(hit, high, radius[rows] + 1)

        return losses

    def _start(self, attempt: int, numbers: Tensor, pixels: int) -> Tensor:
        """Signs to begin images of these numbers with: all up, all down, then random ones."""
        if attempt < 2:
            return torch.full((len(numbers), pixels), 1.0 - 2 * attempt)
        u = Direction(self.seed, attempt, 0, Rademacher())
        return kernels.on("cpu").coordinates_of_each(u, image_names(numbers), pixels, torch.device("cpu"))
