"""Our attacks, called as Foolbox's are (pip install gradless[foolbox])."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import foolbox
import torch
from torch import Tensor

from gradless.attacks.answers import read_labels
from gradless.attacks.base import Attack, AttackResult
from gradless.attacks.criteria import Criterion, Misclassification, TargetedMisclassification
from gradless.errors import GradlessError


class Model(Protocol):
    """What is used of a Foolbox model."""

    @property
    def bounds(self) -> tuple[float, float]: ...

    def __call__(self, inputs: Tensor) -> Tensor: ...


@dataclass
class FoolboxAttack:
    """`attack(model, images, criterion, epsilons=...)` on a Foolbox model over torch.

    Args:
        make: makes one of our attacks of an eps, such as `lambda eps: ZOQOAttack(eps, bits=4)`.

    Attributes:
        results: the results of the last call, one for each epsilon, with every image's queries.
    """

    make: Callable[[float], Attack]
    results: list[AttackResult] = field(default_factory=list, init=False)

    def __call__(
        self, model: Model, inputs: Tensor, criterion: object, *, epsilons: float | Iterable[float]
    ) -> tuple[Tensor | list[Tensor], Tensor | list[Tensor], Tensor]:
        """Attack within each epsilon.

        Args:
            model: a Foolbox model; its bounds must be the attack's range of pixels.
            inputs: (n, ...).
            criterion: Foolbox's `Misclassification` or `TargetedMisclassification`; labels are short for the first.
            epsilons: a number, or several.

        Returns:
            Raw and clipped images, which are the same here, and bool (n,), which of them are adversarial. For several epsilons
            lists of images, and bool (epsilons, n).

        Raises:
            GradlessError: another criterion, or a model with other bounds than the attack's pixels.
        """
        ours = _ours(criterion)
        attacks = [self.make(float(eps)) for eps in (epsilons if isinstance(epsilons, Iterable) else [epsilons])]
        for each in attacks:
            if tuple(model.bounds) != (each.ball.low, each.ball.high):
                raise GradlessError(f"the model's bounds are {tuple(model.bounds)}; give the attack the same pixels.")
        self.results = [each.attack(lambda batch: model(batch.to(inputs.device)), inputs, ours) for each in attacks]
        images = [result.images.to(inputs.device) for result in self.results]
        success = torch.stack([result.success for result in self.results]).to(inputs.device)
        if isinstance(epsilons, Iterable):
            return images, list(images), success
        return images[0], images[0].clone(), success[0]


def _ours(criterion: object) -> Criterion:
    """Our criterion that means the same as a Foolbox user's."""
    if isinstance(criterion, foolbox.criteria.TargetedMisclassification):
        return TargetedMisclassification(criterion.target_classes)
    if isinstance(criterion, foolbox.criteria.Misclassification):
        return Misclassification(criterion.labels)
    if hasattr(criterion, "shape"):
        return Misclassification(read_labels(criterion))
    raise GradlessError(
        f"the criterion is a {type(criterion).__name__}; pass labels, a Misclassification or a TargetedMisclassification."
    )
