"""What every attack here is: a method of `gradless.methods` that searches each image's perturbation, and a count of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradless.attacks.answers import read_labels, tensor_of
from gradless.attacks.log import QueryLog
from gradless.attacks.oracle import Oracle, Predict
from gradless.attacks.trial import Trial
from gradless.ball import Ball, Norm
from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.methods.base import ZerothOrderOptimizer
from gradless.spaces import ImageSpace


@dataclass
class AttackResult:
    """What came of an attack.

    Attributes:
        images: fp32, of the given images' shape: adversarial where `success` is true, as given elsewhere.
        perturbations: fp32, of the same shape: points of the attack's grid, zero where it failed.
        success: bool (n,).
        queries: int64 (n,), how often the model was asked for each image.
        classes: int32 (n,), what adversarial images are taken for; -1 elsewhere.
    """

    images: Tensor
    perturbations: Tensor
    success: Tensor
    queries: Tensor
    classes: Tensor

    @property
    def failure_rate(self) -> float:
        """The share of images without an adversarial twin."""
        return float((~self.success).float().mean())

    def within(self, budget: int) -> float:
        """The share of images that an adversarial twin was found for in so many queries."""
        return float((self.success & (self.queries <= budget)).float().mean())

    def queries_to(self, share: float) -> int | None:
        """The smallest budget in which this share of all images is reached; None where it never is."""
        spent, wanted = self.queries[self.success].sort().values, int(np.ceil(share * len(self.success)))
        return int(spent[wanted - 1]) if 0 < wanted <= len(spent) else None

    def summary(self) -> dict[str, Any]:
        """Plain numbers; queries are those of successes, None where there are none."""
        spent = self.queries[self.success].double()
        return {
            "images": len(self.success),
            "failure_rate": self.failure_rate,
            "mean_queries": float(spent.mean()) if len(spent) else None,
            "median_queries": float(spent.quantile(0.5)) if len(spent) else None,
            "queries_to_90": self.queries_to(0.9),
            "total_queries": int(self.queries.sum()),
        }

    def save(self, path: Path) -> None:
        """Write everything as a compressed .npz."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in vars(self).items()})


Progress = Callable[[Oracle], None]


def falling(step: int) -> float:
    """A schedule: far at first, for images that are near the edge anyway; then down to a tenth, so as not to overshoot."""
    return max(0.1, 1 / (1 + step / 20))


class Attack(ABC):
    """Finds inputs near given images that a model, which can only be asked, gets wrong.

    Args:
        eps: radius of the ball around an image, in units of its pixels.
        norm: "linf" or "l2".
        bits: the perturbation lives on a grid of so many bits over [-eps, eps]; None: on none.
        pixel_bits: round what is shown to the model to pixels of so many bits, toward the image.
        targeted: labels are classes to be reached.
        max_queries: an image's budget.
        max_total_queries: that of all images together; images that it does not reach count as failures.
        pixels: the smallest and the largest pixel.
        seed: of the directions.
        batch_size: images that are attacked side by side, and that a call of the model holds at most.
        repeat: how often every input is asked, for a model that adds noise to its answers; so many queries each.

    Raises:
        GradlessError: values that cannot work.
    """

    def __init__(
        self,
        eps: float,
        *,
        norm: Norm = "linf",
        bits: int | None = None,
        pixel_bits: int | None = None,
        targeted: bool = False,
        max_queries: int = 10_000,
        max_total_queries: int | None = None,
        pixels: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        batch_size: int = 256,
        repeat: int = 1,
    ) -> None:
        self.ball = Ball(eps, norm, bits, *pixels, pixel_bits=pixel_bits)
        self.targeted, self.max_queries, self.max_total_queries = targeted, max_queries, max_total_queries
        self.seed, self.batch_size, self.repeat = seed, batch_size, repeat
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise GradlessError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= seed < 2**63:
            raise GradlessError(f"seed is {seed}; it must be a whole number from 0 on.")

    @abstractmethod
    def search(self, images: Tensor, first: int) -> tuple[ImageSpace, ZerothOrderOptimizer]:
        """A space over the perturbations of images (n, pixels), the first of which is number `first`, and what searches it."""

    @property
    @abstractmethod
    def queries_a_step(self) -> int:
        """The most that one step asks for an image."""

    def schedule(self, step: int) -> float:
        """What multiplies the method's lr in a step."""
        del step
        return 1.0

    def attack(
        self,
        predict: Predict,
        images: Any,
        labels: Any,
        *,
        log: QueryLog | None = None,
        progress: Progress | None = None,
        trial: Trial | None = None,
    ) -> AttackResult:
        """Attack every image until it is adversarial or its budget is spent.

        Args:
            predict: the model, see `Predict`; it is called with torch tensors.
            images: (n, *shape), NumPy or torch, inside the pixels' range.
            labels: the right classes, or the targets, see `answers.read_labels`.
            log: keeps the model's answers, and gives those that it has already.
            progress: called after every step with the oracle, which knows who has asked how often and what was found.
            trial: asks one input again, to see whether the model answers it alike.

        Raises:
            GradlessError: images or labels that cannot be, a budget below one step, or an answer that is none.
        """
        images, labels = self.checked(images, labels)
        shape, flat = images.shape[1:], images.flatten(1)
        budgets = (self.max_queries, self.max_total_queries)
        oracle = Oracle(predict, tuple(shape), labels, self.targeted, *budgets, self.batch_size, self.repeat, trial, log)
        with torch.inference_mode():
            for first in range(0, len(flat), self.batch_size):
                self._attack(flat[first : first + self.batch_size], first, oracle, progress)
        return AttackResult(
            torch.where(oracle.found.unsqueeze(1), oracle.images, flat).view_as(images),
            (oracle.points * self.ball.unit).view_as(images),
            oracle.found,
            oracle.queries,
            oracle.classes,
        )

    def losses(self, space: ImageSpace, oracle: Oracle, images: Tensor, first: int) -> Callable[[], Tensor]:
        """What the method minimizes: the losses of the space's active images, as they are viewed."""

        def losses() -> Tensor:
            x = space.point()
            return oracle.ask(space.rows + first, space.ball.shown(x, space.active(images)), x)

        return losses

    def _attack(self, images: Tensor, first: int, oracle: Oracle, progress: Progress | None) -> None:
        space, optimizer = self.search(images, first)
        losses = self.losses(space, oracle, images, first)
        step_sizes = [group["lr"] for group in optimizer.param_groups]
        for step in range(2 * self.max_queries):  # a step without a new input costs nothing, and must not go on for ever
            for group, lr in zip(optimizer.param_groups, step_sizes, strict=True):
                group["lr"] = lr * self.schedule(step)
            optimizer.step(losses)
            space.rows = space.rows[oracle.open(space.rows + first)]
            if progress is not None:
                progress(oracle)
            if not len(space.rows):
                return

    def checked(self, images: Any, labels: Any) -> tuple[Tensor, Tensor]:
        """Images, fp32, and labels, int64, on the CPU.

        Raises:
            GradlessError: they cannot be, or the budget is below one step.
        """
        try:
            images = tensor_of(images).float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise GradlessError(f"images cannot be read ({error}); they must be numbers, (n, ...).") from error
        if images.ndim < 2 or not images.numel():
            raise GradlessError(f"images are of shape {tuple(images.shape)}; they must be (n, ...), n at least 1.")
        labels = read_labels(labels, len(images))
        low, high = self.ball.low, self.ball.high
        if not bool(((images >= low) & (images <= high)).all()):
            raise GradlessError(
                f"images reach from {float(images.min()):g} to {float(images.max()):g}; pixels must lie in [{low:g}, "
                f"{high:g}]: scale them, or give another range of pixels."
            )
        if self.ball.pixel_bits is not None:
            places = (images - low) / (high - low) * (2**self.ball.pixel_bits - 1)
            if bool(((places - places.round()).abs() > 1e-3).any()):
                raise GradlessError(f"the images' pixels are not of {self.ball.pixel_bits} bits; leave out pixel_bits.")
        if self.max_queries < self.queries_a_step * self.repeat:
            raise GradlessError(f"max_queries is {self.max_queries}; one step takes {self.queries_a_step * self.repeat}.")
        return images, labels
