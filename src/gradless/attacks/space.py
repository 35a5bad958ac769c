"""`ImageSpace`: the perturbations of a batch of images, as a space that a method searches."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from gradless.attacks.ball import Ball
from gradless.attacks.directions import Chunks, coordinates_of_images
from gradless.noise import Direction, Signs
from gradless.spaces import Space
from gradless.tensor import Move


class ImageSpace(Space):
    """Perturbations of a batch of images, one problem an image: values in units of their ball, (problems, pixels).

    What happens to an image depends on no other image. Along `Chunks` a pixel moves toward the farther of its two ends.

    Args:
        images: fp32 (problems, pixels), inside the pixels' range.
        ball: the perturbations allowed. Values are int16 if it has a grid, else fp32.
        first: the number of the first image.
        start: the value at which all pixels begin, as far as the ball allows it.

    Attributes:
        active: int64 (active,), the problems still searched; views and moves are of these alone.
    """

    name = "images"

    def __init__(self, images: Tensor, ball: Ball, *, first: int = 0, start: float = 0.0) -> None:
        self.ball, self.first = ball, first
        self.active = torch.arange(len(images), device=images.device)
        self._bounds = ball.bounds(images)
        begun = ball.project(torch.full_like(images, start), self._bounds)
        self.values = begun if ball.bits is None else begun.to(torch.int16)
        self._view: Move | None = None
        self._drawn_last: tuple[Direction, Tensor, Tensor] | None = None

    @property
    def codes(self) -> int:
        return 0 if self.ball.bits is None else self.values.numel()

    @cached_property
    def _middle(self) -> Tensor:
        """The middle between each pixel's two ends: fp32 (problems, pixels)."""
        far = torch.full_like(self._bounds[0], 2.0 * self.ball.levels)
        return (self.ball.project(far, self._bounds) + self.ball.project(-far, self._bounds)) / 2

    def of_active(self, all_problems: Tensor) -> Tensor:
        """The rows of the active problems: (problems, ...) -> (active, ...), without a copy if all are active."""
        return all_problems if len(self.active) == len(all_problems) else all_problems[self.active]

    def restart(self, problems: Tensor, x: Tensor) -> None:
        """Begin some problems again at x, (n, pixels)."""
        lower, upper = self._bounds
        self.values[problems] = self.ball.project(x, (lower[problems], upper[problems])).to(self.values.dtype)
        self._drawn_last = None

    def point(self) -> Tensor:
        """The active problems' x under the current view: fp32 (active, pixels)."""
        x = self.of_active(self.values).float()
        return x if self._view is None else self._moved(x, self._view)

    def view(self, *moves: Move) -> None:
        (self._view,) = moves or (None,)

    def move(self, moves: Sequence[Move]) -> int:
        changed = 0
        for move in moves:
            before = self.of_active(self.values)
            after = self._moved(before.float(), move).to(before.dtype)
            changed += int((after != before).sum())
            self.values[self.active] = after
            self._drawn_last = None
        return changed if self.codes else 0

    def _moved(self, x: Tensor, move: Move) -> Tensor:
        direction, by = move.direction, move.coefficient
        u = direction.of(self._drawn) if isinstance(direction, Signs) else self._drawn(direction)
        by = by.unsqueeze(1) if isinstance(by, Tensor) else by
        lower, upper = map(self.of_active, self._bounds)
        return self.ball.project((by * u).add_(x if move.decay == 1 else x * move.decay), (lower, upper))

    def _drawn(self, direction: Direction) -> Tensor:
        """A direction's coordinates for the active problems, (active, pixels): kept, as both sides of a query and the update
        need the same ones."""
        if self._drawn_last is None or self._drawn_last[0] != direction or self._drawn_last[1] is not self.active:
            self._drawn_last = direction, self.active, self._draw(direction)
        return self._drawn_last[2]

    def _draw(self, direction: Direction) -> Tensor:
        pixels, device = self.values.shape[1], self.values.device
        if isinstance(direction.distribution, Chunks):
            across = torch.where(self.of_active(self.values) > self.of_active(self._middle), -1.0, 1.0)
            return across * direction.values(self.name, 0, pixels, device)
        return coordinates_of_images(direction, self.first + self.active, pixels, device)
