"""Our attacks as an `EvasionAttack` of the Adversarial Robustness Toolbox (pip install gradless[art])."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from art.attacks.attack import EvasionAttack
from art.estimators.classification import ClassifierMixin
from art.estimators.estimator import BaseEstimator

from gradless.attacks.answers import read_classes
from gradless.attacks.base import Attack, AttackResult

Array = np.ndarray[Any, Any]


class BlackBoxEvasion(EvasionAttack):  # type: ignore[misc]
    """One of our attacks on an ART classifier, which is asked through its `predict` alone.

    Args:
        estimator: the classifier; its pixels must lie in the attack's range.
        attack: such as `ZOQOAttack(8 / 255)`.

    Attributes:
        result: of the last call of `generate`, with the queries of every image.
    """

    attack_params: ClassVar[list[str]] = [*EvasionAttack.attack_params, "attack"]
    _estimator_requirements = (BaseEstimator, ClassifierMixin)

    def __init__(self, estimator: Any, attack: Attack) -> None:
        super().__init__(estimator=estimator)
        self.attack = attack
        self.result: AttackResult | None = None

    @property
    def targeted(self) -> bool:
        """Whether `y` are classes to be reached."""
        return self.attack.targeted

    def generate(self, x: Array, y: Array | None = None, **_: Any) -> Array:
        """Adversarial images, and those that were not found unchanged.

        Args:
            x: (n, ...).
            y: classes, see `answers.read_labels`; without it the classifier is asked for them, outside the count.

        Returns:
            fp32, of the shape of x.

        Raises:
            ValueError: the attack is targeted and y is missing, or as `Attack.attack`.
        """
        if y is None and self.targeted:
            raise ValueError("a targeted attack needs y, the classes to be reached.")
        labels = read_classes(self.estimator.predict(x), len(x)) if y is None else y
        self.result = self.attack.attack(lambda batch: self.estimator.predict(batch.numpy()), x, labels)
        return self.result.images.numpy()
