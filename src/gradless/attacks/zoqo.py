"""ZOQO as a black-box attack (Shamash et al., 2025, arXiv 2501.06736, section 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from gradless.attacks.base import Attack, falling
from gradless.attacks.directions import Chunks, sparse
from gradless.attacks.space import ImageSpace
from gradless.errors import GradlessError
from gradless.methods.zoqo.method import ZOQO


class ZOQOAttack(Attack):
    """Sign steps of a perturbation that never leaves its b-bit grid; the equations are in `gradless.methods.ZOQO`.

    With `chunks` u is SignHunter's: one chunk of the pixels moves from one end of the grid to the other. The first chunk is the
    whole image, then come halves, quarters and so on to single pixels, and then the whole image again. x begins at the grid's
    upper end, so one side of each query is x itself. The model has seen it already: a step costs one query.

    With `random` a few pixels, drawn anew for each step, move by mu up or down, and a step costs two queries a direction. The
    paper's noise moves nearly all pixels of a fine grid, and needs more queries than this. Without a grid a grid step is eps.

    Args:
        eps: radius of the ball, in units of the pixels.
        bits: bits of the perturbation's grid; None for no grid.
        directions: "chunks" or "random".
        mu: how far random directions move a pixel, as a share of eps; at least a grid step.
        share: share of the pixels that random directions move; proportionally less if mu is below three grid steps.
        eta: size of the first step with random directions, as a share of eps: the root mean square over all pixels. The next
            steps shrink, see `falling`.
        q: random directions a step.
        more: the other options of `Attack`.
    """

    def __init__(
        self,
        eps: float,
        *,
        bits: int | None = 8,
        directions: Literal["chunks", "random"] = "chunks",
        mu: float = 0.48,
        share: float = 0.1,
        eta: float = 0.3,
        q: int = 1,
        **more: Any,
    ) -> None:
        super().__init__(eps, bits=bits, **more)
        if directions not in ("chunks", "random"):
            raise GradlessError(f"directions are {directions!r}; they can be chunks or random.")
        if not 0 < share <= 1:
            raise GradlessError(f"share is {share}; it must be above 0 and at most 1.")
        self.directions, self.mu, self.share, self.eta, self.q = directions, mu, share, eta, q

    @property
    def queries_a_step(self) -> int:
        return 2 if self.directions == "chunks" else 2 * self.q

    def schedule(self, step: int) -> float:
        return 1.0 if self.directions == "chunks" else falling(step)

    def search(self, images: Tensor, first: int) -> tuple[ImageSpace, ZOQO]:
        levels, pixels = self.ball.levels, images.shape[1]
        if self.directions == "chunks":
            reach = pixels**-0.5 if self.ball.norm == "l2" else 1.0  # the cube that fits into the ball
            space = ImageSpace(images, replace(self.ball, reach=reach), first=first, start=levels)
            far = 2 * levels
            return space, ZOQO([space], lr=far, whole_steps=True, seed=self.seed, distribution=Chunks(pixels, far))
        space, m = ImageSpace(images, self.ball, first=first), max(1, round(self.mu * levels))
        try:
            u = sparse(m, self.share * min(1, self.mu * levels / 3))
        except ValueError as error:
            raise GradlessError(f"share is {self.share}: {error}.") from error
        lr = min(2, self.eta / u.share**0.5) * levels
        return space, ZOQO([space], lr=lr, whole_steps=True, q=self.q, seed=self.seed, distribution=u)


class SignHunter(ZOQOAttack):
    """SignHunter (Al-Dujaili and O'Reilly, 2020): flips signs of the perturbation chunk by chunk, and keeps a flip that lowers
    the margin.

    The candidate is clip(image + eps s), s in {-1, 1}: ZOQO with chunks, without a grid.

    Args:
        eps: radius of the ball, in units of the pixels.
        more: the other options of `Attack`.
    """

    def __init__(self, eps: float, **more: Any) -> None:
        super().__init__(eps, bits=None, directions="chunks", **more)
