"""What makes an input adversarial: a loss of the model's answer that is below zero."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from gradless.attacks.answers import read_labels
from gradless.errors import GradlessError


class Criterion(ABC):
    """A class for each image, and a loss that says whether the model names it or another one.

    Args:
        classes: the classes, one an image, in any form that `answers.read_labels` reads.

    Attributes:
        classes: int64 (images,).

    Raises:
        GradlessError: the classes cannot be read.
    """

    def __init__(self, classes: ArrayLike, /) -> None:
        self.classes = read_labels(classes)

    @abstractmethod
    def loss(self, lead: Tensor) -> Tensor:
        """The loss that follows from the class's lead (see `lead_of`): fp32 (n,), below zero if the input is adversarial."""

    def losses(self, answer: Tensor, images: Tensor) -> Tensor:
        """The losses of a model's answer to one input of each of some images.

        Args:
            answer: scores (n, classes) or labels, int64 (n,).
            images: int64 (n,), the numbers of the images.

        Returns:
            fp32 (n,).

        Raises:
            GradlessError: the scores lack a class.
        """
        return self.loss(lead_of(self.classes[images], answer))


class Misclassification(Criterion):
    """The model names any class but the image's own class y.

    loss = s_y - max_{j != y} s_j
    """

    def loss(self, lead: Tensor) -> Tensor:
        return lead


class TargetedMisclassification(Criterion):
    """The model names the image's target class t.

    loss = max_{j != t} s_j - s_t
    """

    def loss(self, lead: Tensor) -> Tensor:
        return -lead


def lead_of(classes: Tensor, answer: Tensor) -> Tensor:
    """How far each class c is ahead of all others: s_c - max_{j != c} s_j with scores s; 1 or -1 with labels.

    Args:
        classes: int64 (n,).
        answer: scores (n, classes) or labels, int64 (n,).

    Returns:
        fp32 (n,).

    Raises:
        GradlessError: the scores lack a class.
    """
    if answer.ndim == 1:
        return torch.where(answer == classes, 1.0, -1.0)
    if int(classes.max()) >= answer.shape[1]:
        raise GradlessError(f"label {int(classes.max())} does not fit a model with {answer.shape[1]} classes.")
    own = answer.gather(1, classes.unsqueeze(1)).squeeze(1)
    others = answer.scatter(1, classes.unsqueeze(1), float("-inf")).amax(1)
    return (own - others).float()


def as_criterion(given: Criterion | ArrayLike, images: int) -> Criterion:
    """The criterion that was given for this many images; labels alone mean `Misclassification`.

    Raises:
        GradlessError: the labels cannot be read, or there is not one for each image.
    """
    if not isinstance(given, Criterion):
        return Misclassification(read_labels(given, images))
    if len(given.classes) != images:
        raise GradlessError(f"the criterion has {len(given.classes)} classes; {images} images need as many.")
    return given
