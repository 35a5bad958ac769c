"""The attacked model: something that answers, and a count of what each image has asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradless.attacks.log import QueryLog
from gradless.errors import GradlessError
from gradless.noise import Words, key

Predict = Callable[[Any], Any]
"""A batch of images, fp32 (n, *shape), -> scores (n, classes) or labels (n,), as torch tensors or NumPy arrays."""


@dataclass
class Oracle:
    """Answers an attack's queries: each input once, and none beyond an image's budget.

    The loss of a query is the margin by which the model is still right: for scores s, s_y - max_{j != y} s_j, or
    max_{j != t} s_j - s_t where class t is the target; for labels, 1 or -1. Below zero the image is adversarial.

    Args:
        predict: the model.
        shape: of an image.
        labels: int64 (images,), the classes to be left, or to be reached.
        targeted: whether these are to be reached.
        max_queries: an image's budget.
        batch_size: images in a call of the model.
        log: answers are kept there, and taken from there where an attack is resumed.

    Attributes:
        queries: int64 (images,), what each has spent.
        found: bool (images,), whether an adversarial input has been seen.
        images: fp32 (images, pixels), these inputs.
        points: fp32 (images, pixels), their perturbations in units.
    """

    predict: Predict
    shape: tuple[int, ...]
    labels: Tensor
    targeted: bool = False
    max_queries: int = 10_000
    batch_size: int = 256
    log: QueryLog | None = None
    queries: Tensor = field(init=False)
    found: Tensor = field(init=False)
    images: Tensor = field(init=False)
    points: Tensor = field(init=False)

    def __post_init__(self) -> None:
        n, pixels = len(self.labels), int(np.prod(self.shape))
        self.queries, self.found = torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.bool)
        self.images, self.points = torch.zeros(n, pixels), torch.zeros(n, pixels)
        self._known: list[dict[int, float]] = [{} for _ in range(n)]
        low, high = Words(key(0, "an input's name"), 0, 0)(0, 2 * pixels).view(2, pixels)
        self._name = (high << 32 | low) | 1
        self._calls = 0

    def open(self, rows: Tensor) -> Tensor:
        """Which of the images may still ask: bool (n,)."""
        return ~self.found[rows] & (self.queries[rows] < self.max_queries)

    def ask(self, rows: Tensor, images: Tensor, points: Tensor) -> Tensor:
        """The losses of one input of each of these images; 0 for those that are done and whose input is new.

        Args:
            rows: int64 (n,), which images.
            images: fp32 (n, pixels), their inputs.
            points: fp32 (n, pixels), what to remember an adversarial input by.

        Returns:
            fp32 (n,), on the CPU.

        Raises:
            GradlessError: the model's answer is no finite score or label for each input, or no class fits a label.
        """
        names = (images.contiguous().view(torch.int32).long() * self._name).sum(1).tolist()
        losses, new = torch.zeros(len(rows)), []
        may = self.open(rows).tolist()
        for i, (row, name) in enumerate(zip(rows.tolist(), names, strict=True)):
            known = self._known[row].get(name)
            if known is not None:
                losses[i] = known
            elif may[i]:
                new.append(i)
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            of = rows[part]
            answered = self._answer(of, images[part], sum(names[i] for i in part) & (2**63 - 1))
            losses[part] = answered
            self.queries[of] += 1
            for i, loss in zip(part, answered.tolist(), strict=True):
                self._known[int(rows[i])][names[i]] = loss
            hit = answered < 0
            won, at = of[hit], torch.tensor(part)[hit]
            self.found[won], self.images[won], self.points[won] = True, images[at].cpu(), points[at].cpu().float()
        for row in rows[~self.open(rows)].tolist():
            self._known[row] = {}
        return losses

    def _answer(self, rows: Tensor, images: Tensor, inputs: int) -> Tensor:
        losses = None if self.log is None else self.log.answer(self._calls, inputs, len(rows))
        if losses is None:
            losses = self._margin(rows, self.predict(images.view(-1, *self.shape)))
            if self.log is not None:
                self.log.append(inputs, losses)
        self._calls += 1
        return losses

    def _margin(self, rows: Tensor, answer: Any) -> Tensor:
        answer, labels = torch.as_tensor(answer).detach().cpu(), self.labels[rows]
        if len(answer) != len(rows) or answer.ndim not in (1, 2):
            raise GradlessError(
                f"the model was given {len(rows)} images and returned an array of shape {tuple(answer.shape)}; it must return "
                "scores (n, classes) or labels (n,)."
            )
        if answer.ndim == 1:
            if answer.is_floating_point():
                raise GradlessError(
                    "the model returned one float an image; it must return scores (n, classes) or integer labels."
                )
            reached = answer.long() == labels
            losses: Tensor = torch.where(reached == self.targeted, -1.0, 1.0)
            return losses
        bad = (~answer.isfinite()).any(1)
        if bad.any():
            row = int(rows[bad.nonzero()[0, 0]])
            raise GradlessError(
                f"the model returned a score that is no finite number for image {row} (its query {int(self.queries[row]) + 1})."
            )
        if int(labels.max()) >= answer.shape[1]:
            raise GradlessError(f"label {int(labels.max())} does not fit a model with {answer.shape[1]} classes.")
        own = answer.gather(1, labels.unsqueeze(1)).squeeze(1)
        others = answer.scatter(1, labels.unsqueeze(1), float("-inf")).amax(1)
        margin: Tensor = (own - others).float()
        return -margin if self.targeted else margin
