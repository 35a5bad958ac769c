"""Our attacks as an `EvasionAttack` of the Adversarial Robustness Toolbox (pip install gradless[art])."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.classification import ClassifierMixin
from art.estimators.estimator import BaseEstimator
from numpy.typing import NDArray

from gradless.attacks.answers import read_classes
from gradless.attacks.base import Attack, AttackResult
from gradless.attacks.criteria import Misclassification, TargetedMisclassification

Array = NDArray[np.generic]


class BlackBoxEvasion(EvasionAttack):  # type: ignore[misc]
    """One of our attacks on an ART classifier, of which only `predict` is called.

    Args:
        estimator: the classifier; its pixels must lie in the attack's range.
        attack: an attack such as `ZOQOAttack(8 / 255)`.
        targeted: whether `generate` gets the classes to be reached, as in ART's own attacks.

    Attributes:
        result: the result of the last call of `generate`, with every image's queries.
    """

    attack_params: ClassVar[list[str]] = [*EvasionAttack.attack_params, "attack", "targeted"]
    _estimator_requirements = (BaseEstimator, ClassifierMixin)

    def __init__(self, estimator: object, attack: Attack, targeted: bool = False) -> None:
        super().__init__(estimator=estimator)
        self.attack, self.targeted = attack, targeted
        self.result: AttackResult | None = None

    def generate(self, x: Array, y: Array | None = None, **_: object) -> Array:
        """Adversarial images; an image for which none was found is returned unchanged.

        Args:
            x: (n, ...).
            y: classes, see `answers.read_labels`: the right ones, or the targets. Without it the classifier is asked for the
                right ones, and these calls do not count.

        Returns:
            fp32, of the shape of x.

        Raises:
            ValueError: the attack is targeted and y is missing.
            GradlessError: see `Attack.attack`.
        """
        if y is None and self.targeted:
            raise ValueError("a targeted attack needs y, the classes to be reached.")
        classes = read_classes(self.estimator.predict(x), len(x)) if y is None else y
        criterion = (TargetedMisclassification if self.targeted else Misclassification)(classes)
        self.result = self.attack.attack(lambda batch: self.estimator.predict(batch.numpy()), x, criterion)
        return self.result.images.numpy()
