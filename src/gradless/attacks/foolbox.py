"""Our attacks, called as Foolbox's are (pip install gradless[foolbox])."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from foolbox.criteria import Misclassification, TargetedMisclassification
from torch import Tensor

from gradless.attacks.base import Attack, AttackResult
from gradless.errors import GradlessError


@dataclass
class FoolboxAttack:
    """`attack(model, images, criterion, epsilons=..)` on a Foolbox model over torch.

    Args:
        make: eps -> one of our attacks, such as `lambda eps: ZOQOAttack(eps, bits=4)`; where the criterion has a target, it
            must be a targeted one.

    Attributes:
        results: of the last call, one for each epsilon, with the queries of every image.
    """

    make: Callable[[float], Attack]
    results: list[AttackResult] = field(default_factory=list, init=False)

    def __call__(self, model: Any, inputs: Tensor, criterion: Any, *, epsilons: Any) -> tuple[Any, Any, Tensor]:
        """Attack within each epsilon.

        Args:
            model: a Foolbox model; its bounds must be the attack's range of pixels.
            inputs: (n, ...).
            criterion: labels, see `answers.read_labels`, `Misclassification` or `TargetedMisclassification`.
            epsilons: a number, or several.

        Returns:
            Raw and clipped images, which are the same here, and bool (n,): what is adversarial. For several epsilons, lists of
            images and bool (epsilons, n).

        Raises:
            GradlessError: another criterion, or an attack that is not for it.
        """
        several = isinstance(epsilons, Iterable)
        targeted = isinstance(criterion, TargetedMisclassification)
        if targeted:
            labels = criterion.target_classes.raw
        else:
            labels = criterion.labels.raw if isinstance(criterion, Misclassification) else criterion
        if not hasattr(labels, "shape"):
            raise GradlessError(
                f"a criterion of type {type(criterion).__name__}; labels, or (Targeted)Misclassification, it must be."
            )
        attacks = [self.make(float(eps)) for eps in (epsilons if several else [epsilons])]
        for each in attacks:
            if each.targeted != targeted:
                raise GradlessError(f"targeted is {each.targeted}, and the criterion says {targeted}.")
            if tuple(model.bounds) != (each.ball.low, each.ball.high):
                raise GradlessError(f"the model's bounds are {tuple(model.bounds)}; give the attack the same pixels.")
        self.results = [each.attack(lambda batch: model(batch.to(inputs.device)), inputs, labels) for each in attacks]
        images = [result.images.to(inputs.device) for result in self.results]
        success = torch.stack([result.success for result in self.results]).to(inputs.device)
        return (images, list(images), success) if several else (images[0], images[0].clone(), success[0])
