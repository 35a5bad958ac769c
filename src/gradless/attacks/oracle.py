"""The attacked model, with a count of each image's queries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradless.attacks.answers import read_answer
from gradless.attacks.criteria import Criterion
from gradless.attacks.log import ANSWER, QueryLog
from gradless.attacks.trial import Trial
from gradless.errors import GradlessError
from gradless.noise import Words, key

Predict = Callable[[Any], Any]
"""A model: images, fp32 (n, *shape) on the CPU, -> its answer, see `answers.read_answer`. It may write into the images."""
TRIED = (2**63 - 1, 2**63 - 2)
"""Names in the log of the trial's two queries."""


@dataclass
class Oracle:
    """Answers an attack's queries: each input once (or `repeat` times), and none beyond an image's budget.

    A query's loss is the criterion's; an input whose loss is below zero is adversarial.

    Args:
        predict: the model.
        shape: shape of an image.
        criterion: what makes an input adversarial.
        max_queries: budget of an image.
        max_total_queries: budget of all images together; None for no limit.
        batch_size: most images in a call of the model.
        repeat: calls for each input, a query each. The answer is the mean of the scores, or the most frequent class.
        trial: the check made of the first answer; None for none.
        log: keeps the answers, and gives those that it has from an attack that was interrupted.

    Attributes:
        queries: int64 (images,), queries spent.
        found: bool (images,), whether an adversarial input was found.
        images: fp32 (images, pixels), the adversarial inputs.
        points: fp32 (images, pixels), their perturbations in units.
        classes: int32 (images,), the classes that the model names for them; -1 if there is none.
    """

    predict: Predict
    shape: tuple[int, ...]
    criterion: Criterion
    max_queries: int = 10_000
    max_total_queries: int | None = None
    batch_size: int = 256
    repeat: int = 1
    trial: Trial | None = None
    log: QueryLog | None = None
    queries: Tensor = field(init=False)
    found: Tensor = field(init=False)
    images: Tensor = field(init=False)
    points: Tensor = field(init=False)
    classes: Tensor = field(init=False)
    _tried: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        n, pixels = len(self.criterion.classes), int(np.prod(self.shape))
        self.queries, self.found = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        self.images, self.points = torch.zeros(n, pixels), torch.zeros(n, pixels)
        self.classes = torch.full((n,), -1, dtype=torch.int32)
        self._known: list[dict[int, tuple[float, int]]] = [{} for _ in range(n)]
        low, high = Words(key(0, "an input's name"), 0, 0)(0, 2 * pixels).view(2, pixels)
        self._name = (high << 32 | low) | 1
        if self.trial is not None and self.log is not None:
            for row in (row for name in TRIED for row in self.log.answers(range(n), [name] * n)):
                self.queries[row] += self.trial.counted
                self._tried = True

    def open(self, rows: Tensor) -> Tensor:
        """Which images may still ask: bool (n,), of numbers of images, int64 (n,)."""
        return ~self.found[rows] & (self.queries[rows] <= self.max_queries - self.repeat) & (self._left() >= self.repeat)

    def _left(self) -> int:
        """Queries left in the budget of all images."""
        return 2**62 if self.max_total_queries is None else self.max_total_queries - int(self.queries.sum())

    def ask(self, rows: Tensor, images: Tensor, points: Tensor, inside: Tensor | None = None) -> Tensor:
        """The losses of one input of each of some images. An image that may not ask any more gets 0 for a new input.

        Args:
            rows: int64 (n,), the numbers of the images.
            images: fp32 (n, pixels), their inputs.
            points: fp32 (n, pixels), the inputs' perturbations; kept of an adversarial input.
            inside: bool (n,), which inputs end their image's search if they are adversarial. None: all.

        Returns:
            fp32 (n,), on the CPU.

        Raises:
            GradlessError: the model's answer is no finite score or label for each input, or the scores lack a class.
        """
        names = images.contiguous().view(torch.int32).long().mul_(self._name).sum(1).tolist()
        known = [self._known[row].get(name) for row, name in zip(rows.tolist(), names, strict=True)]
        losses = torch.tensor([0.0 if answer is None else answer[0] for answer in known])
        classes = torch.tensor([-1 if answer is None else answer[1] for answer in known], dtype=torch.int32)
        new = [i for i, may in enumerate(self.open(rows).tolist()) if may and known[i] is None]
        new = new[: self._left() // self.repeat]
        for start in range(0, len(new), self.batch_size):
            part = torch.tensor(new[start : start + self.batch_size])
            asking, named = rows[part], [names[i] for i in part.tolist()]
            self.queries[asking] += self.repeat
            losses[part], classes[part] = answered = self._answer(asking, named, _some(images, part))
            for row, name, loss, taken in zip(asking.tolist(), named, *map(Tensor.tolist, answered), strict=True):
                self._known[row][name] = loss, taken
        hit = (losses < 0) & ~self.found[rows]
        if inside is not None:
            hit &= inside
        if hit.any():
            won = rows[hit]
            self.found[won], self.classes[won] = True, classes[hit]
            self.images[won], self.points[won] = images[hit], points[hit]
        for row in rows[~self.open(rows)].tolist():
            self._known[row] = {}
        return losses

    def _answer(self, rows: Tensor, names: list[int], images: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and classes, (n,), of one input of each of these images: from the log if it has them, else from the model."""
        losses, classes = torch.empty(len(rows)), torch.empty(len(rows), dtype=torch.int32)
        logged = {} if self.log is None else self.log.answers(rows.tolist(), names)
        for i, answer in logged.items():
            losses[i], classes[i] = answer
        if len(logged) < len(rows):
            ask = torch.tensor([i for i in range(len(rows)) if i not in logged])
            asked, inputs = rows[ask], _some(images, ask)
            answers = self._call(inputs)
            losses[ask], classes[ask] = self._read(asked, answers)
            self._append(asked, [names[i] for i in ask.tolist()], losses[ask], classes[ask])
            if self.trial is not None and not self._tried:
                self._tried = True
                again = (partial(self._again, asked[:1], name, inputs[:1]) for name in TRIED)
                self.trial.check(answers[0], len(inputs), lambda: next(again)())
        return losses, classes

    def _again(self, row: Tensor, name: int, image: Tensor) -> Tensor | None:
        """A second answer to an input, asked alone; None if no budget is left for it."""
        assert self.trial is not None
        if self.trial.counted and not (self._left() > 0 and int(self.queries[row]) < self.max_queries):
            return None
        self.queries[row] += self.trial.counted
        answer = self._call(image)
        self._append(row, [name], *self._read(row, answer))
        return answer[0]

    def _append(self, rows: Tensor, names: list[int], losses: Tensor, classes: Tensor) -> None:
        if self.log is not None:
            paid = np.empty(len(rows), ANSWER)
            paid["image"], paid["class"], paid["input"], paid["loss"] = rows.numpy(), classes.numpy(), names, losses.numpy()
            self.log.append(paid)

    def _call(self, images: Tensor) -> Tensor:
        """The model's answer, scores (n, classes) or classes (n,), to one input of each of some images."""
        with torch.inference_mode(False), torch.no_grad():  # so that the model may take gradients, or write into its batch
            shape = (-1, *self.shape)
            answers = [read_answer(self.predict(images.clone().view(shape)), len(images)) for _ in range(self.repeat)]
        if len({answer.shape for answer in answers}) > 1:
            raise GradlessError("the model returned scores of other shapes when it was asked again.")
        if self.repeat == 1:
            return answers[0]
        return torch.stack(answers).mean(0) if answers[0].ndim == 2 else torch.stack(answers).mode(0).values

    def _read(self, rows: Tensor, answer: Tensor) -> tuple[Tensor, Tensor]:
        """Losses and classes, (n,), that follow from the model's answer to one input of each of these images."""
        finite = answer.isfinite()
        if not finite.all():
            row = int(rows[(~finite).nonzero()[0, 0]])
            raise GradlessError(
                f"the model returned a score that is no finite number for image {row} (its query {int(self.queries[row])})."
            )
        classes = answer.argmax(1) if answer.ndim == 2 else answer
        return self.criterion.losses(answer, rows), classes.int()


def _some(images: Tensor, rows: Tensor) -> Tensor:
    """These rows of images, in ascending order; without a copy if they are all."""
    return images if len(rows) == len(images) else images[rows]
