"""`Attack`: a method of `gradless.methods` that searches each image's perturbation, under a count of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gradless.attacks.answers import tensor_of
from gradless.attacks.ball import Ball, Norm
from gradless.attacks.criteria import Criterion, as_criterion
from gradless.attacks.log import QueryLog
from gradless.attacks.oracle import Oracle, Predict
from gradless.attacks.space import ImageSpace
from gradless.attacks.trial import Trial
from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.methods.base import ZerothOrderOptimizer


class Figures(TypedDict):
    """The figures of an attack; see `AttackResult.summary`."""

    images: int
    failure_rate: float
    mean_queries: float | None
    median_queries: float | None
    queries_to_90: int | None
    total_queries: int


@dataclass
class AttackResult:
    """The result of an attack, image by image.

    Attributes:
        images: fp32, of the given images' shape: the adversarial image if one was found, else the given one.
        perturbations: fp32, of the same shape: points of the attack's grid; zero if no adversarial image was found.
        success: bool (n,), whether an adversarial image was found.
        queries: int64 (n,), queries spent.
        classes: int32 (n,), the classes that the model names for the adversarial images; -1 if none was found.
    """

    images: Tensor
    perturbations: Tensor
    success: Tensor
    queries: Tensor
    classes: Tensor

    @property
    def failure_rate(self) -> float:
        """The share of images for which no adversarial image was found."""
        return float((~self.success).float().mean())

    def within(self, budget: int) -> float:
        """The share of images for which an adversarial image was found in at most `budget` queries."""
        return float((self.success & (self.queries <= budget)).float().mean())

    def queries_to(self, share: float) -> int | None:
        """The smallest budget at which `within` reaches this share; None if it never does."""
        spent, wanted = self.queries[self.success].sort().values, int(np.ceil(share * len(self.success)))
        return int(spent[wanted - 1]) if 0 < wanted <= len(spent) else None

    def summary(self) -> Figures:
        """The attack's figures, as plain numbers. Mean and median are over successes, None if there are none."""
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
        """Write all attributes to a compressed .npz file."""
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, **{name: value.numpy() for name, value in vars(self).items()})


Progress = Callable[[Oracle], None]


def falling(step: int) -> float:
    """A schedule of step sizes: 1 at first, for images that need little; then down to a tenth, so as not to overshoot."""
    return max(0.1, 1 / (1 + step / 20))


class Attack(ABC):
    """Finds inputs near given images that are adversarial for a model that can only be queried.

    Args:
        eps: radius of the ball around an image, in units of its pixels.
        norm: "linf" or "l2".
        bits: bits of the perturbation's grid over [-eps, eps]; None for no grid.
        pixel_bits: show the model pixels of this many bits, rounded toward the original image. None: not rounded.
        max_queries: budget of an image.
        max_total_queries: budget of all images together. Images that it does not reach count as failures.
        pixels: the smallest and the largest pixel value.
        seed: seed of the directions.
        batch_size: images that are attacked together; also the most images in a call of the model.
        repeat: calls for each input, a query each, for a model that adds noise to its answers.

    Raises:
        GradlessError: a value out of its range.
    """

    def __init__(
        self,
        eps: float,
        *,
        norm: Norm = "linf",
        bits: int | None = None,
        pixel_bits: int | None = None,
        max_queries: int = 10_000,
        max_total_queries: int | None = None,
        pixels: tuple[float, float] = (0.0, 1.0),
        seed: int = 0,
        batch_size: int = 256,
        repeat: int = 1,
    ) -> None:
        self.ball = Ball(eps, norm, bits, *pixels, pixel_bits=pixel_bits)
        self.max_queries, self.max_total_queries = max_queries, max_total_queries
        self.seed, self.batch_size, self.repeat = seed, batch_size, repeat
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise GradlessError(f"{name} is {value}; it must be at least 1.")
        if not 0 <= seed < 2**63:
            raise GradlessError(f"seed is {seed}; it must be a whole number from 0 on.")

    @abstractmethod
    def search(self, images: Tensor, first: int) -> tuple[ImageSpace, ZerothOrderOptimizer]:
        """The space of some images' perturbations, and the method that searches it.

        Args:
            images: fp32 (n, pixels).
            first: the number of the first image.
        """

    @property
    @abstractmethod
    def queries_a_step(self) -> int:
        """The most inputs that one step asks for an image."""

    def schedule(self, step: int) -> float:
        """The factor for the method's lr in a step."""
        del step
        return 1.0

    def attack(
        self,
        predict: Predict,
        images: ArrayLike,
        criterion: Criterion | ArrayLike,
        *,
        log: QueryLog | None = None,
        progress: Progress | None = None,
        trial: Trial | None = None,
    ) -> AttackResult:
        """Attack every image until an adversarial input is found or its budget is spent.

        Args:
            predict: the model, see `Predict`.
            images: (n, *shape), NumPy or torch, inside the pixels' range.
            criterion: `Misclassification(labels)` or `TargetedMisclassification(target_classes)`. An array of labels is short
                for the first.
            log: keeps the model's answers, and gives those that it has from an attack that was interrupted.
            progress: called after every step with the oracle, which holds the queries spent and the images found.
            trial: asks one input again, to see whether the model gives the same answer.

        Raises:
            GradlessError: images or classes that cannot be used, a budget below one step, or an answer that cannot be read.
        """
        images = self.checked(images)
        criterion = as_criterion(criterion, len(images))
        shape, flat = images.shape[1:], images.flatten(1)
        budgets = (self.max_queries, self.max_total_queries)
        oracle = Oracle(predict, tuple(shape), criterion, *budgets, self.batch_size, self.repeat, trial, log)
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
        """The closure that the method minimizes: the losses, (active,), of the space's active images under its view."""

        def losses() -> Tensor:
            x = space.point()
            return oracle.ask(space.active + first, space.ball.shown(x, space.of_active(images)), x)

        return losses

    def _attack(self, images: Tensor, first: int, oracle: Oracle, progress: Progress | None) -> None:
        space, optimizer = self.search(images, first)
        losses = self.losses(space, oracle, images, first)
        step_sizes = [group["lr"] for group in optimizer.param_groups]
        for step in range(2 * self.max_queries):  # a step without a new input costs no query, and must not repeat for ever
            for group, lr in zip(optimizer.param_groups, step_sizes, strict=True):
                group["lr"] = lr * self.schedule(step)
            optimizer.step(losses)
            space.active = space.active[oracle.open(space.active + first)]
            if progress is not None:
                progress(oracle)
            if not len(space.active):
                return

    def checked(self, given: ArrayLike) -> Tensor:
        """Images, fp32 on the CPU.

        Raises:
            GradlessError: they cannot be attacked, or the budget is below one step.
        """
        try:
            images = tensor_of(given).float()
        except (TypeError, ValueError, RuntimeError) as error:
            raise GradlessError(f"images cannot be read ({error}); they must be numbers, (n, ...).") from error
        if images.ndim < 2 or not images.numel():
            raise GradlessError(f"images are of shape {tuple(images.shape)}; they must be (n, ...), n at least 1.")
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
        return images
