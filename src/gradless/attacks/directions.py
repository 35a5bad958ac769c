"""The directions along which images are searched: SignHunter's chunks, sparse noise on a grid, and each image's own draws."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gradless import kernels
from gradless.noise import Direction, Distribution, Integers


@dataclass(frozen=True)
class Chunks(Distribution):
    """SignHunter's directions (Al-Dujaili and O'Reilly, 2020): m on one chunk of an image's pixels, 0 on all others.

    Step 0 moves all pixels, the next two steps a half each, the next four a quarter each, and so on to single pixels. Then it
    begins again. Nothing is random, and every image has the same chunks.

    Attributes:
        size: pixels of an image.
        m: how far a pixel moves, in grid steps.
    """

    size: int
    m: int = 1

    @property
    def steps(self) -> int:
        """Steps until it begins again."""
        return sum(map(len, self._levels))

    @property
    def _levels(self) -> list[range]:
        """The first pixels of the chunks, level by level; a level's chunks are as long as its range's step."""
        depth = (self.size - 1).bit_length()
        return [range(0, self.size, -(-self.size // 2**level)) for level in range(depth + 1)]

    def chunk(self, step: int) -> tuple[int, int]:
        """The first pixel of a step's chunk, and the first one after it."""
        step %= self.steps
        for level in self._levels:
            if step < len(level):
                return level[step], level[step] + level.step
            step -= len(level)
        raise AssertionError

    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        del name  # nothing is random here
        pixel = torch.arange(start, start + count, device=device) % self.size
        first, end = self.chunk(direction.step)
        return torch.where((pixel >= first) & (pixel < end), float(self.m), 0.0)


@cache
def sparse(m: int, share: float) -> Integers:
    """-m or m on this share of the pixels, 0 on the others.

    Raises:
        ValueError: no pixel would ever move, or by more than 127 steps.
    """
    return Integers((round(2**15 * share),) * m)


def coordinates_of_images(direction: Direction, numbers: Tensor, pixels: int, device: torch.device) -> Tensor:
    """A direction's coordinates for the images of these numbers: fp32 (n, pixels).

    An image draws by its own number, so its coordinates depend on no other image.

    Args:
        direction: which direction.
        numbers: int64 (n,).
        pixels: of an image.
        device: of the result.
    """
    return kernels.on(device).coordinates_of_each(direction, [f"image {number}" for number in numbers.tolist()], pixels, device)
