"""`Trial`: a check that a model answers the same input the same way. An attack asks no input twice, and would not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradless.errors import GradlessError

AGAIN = 1e-5
"""Largest difference, relative to the scores' spread, between two answers to the same batch."""
ALONE = 1e-3
"""Largest difference, relative to the scores' spread, between answers to one input in two batches."""


@dataclass(frozen=True)
class Trial:
    """Asks the first input of an attack again, alone, and once more if the answers differ.

    Args:
        counted: whether these calls count as queries of the image.
        say: called with a sentence if the model's answer depends on the other images of its batch.
    """

    counted: bool
    say: Callable[[str], None]

    def check(self, first: Tensor, images: int, again: Callable[[], Tensor | None]) -> None:
        """Compare the answers to one input.

        Args:
            first: the first answer: scores (classes,), or a class ().
            images: the number of images in its batch.
            again: asks the input alone; returns None if no budget is left.

        Raises:
            GradlessError: the model gives different answers to the same batch.
        """
        alone = again()
        if alone is None or not (gap := _gap(first, alone)) > AGAIN:
            return
        if images > 1:
            once_more = again()
            if once_more is None:
                return
            if (changed := _gap(alone, once_more)) <= AGAIN:
                if gap > ALONE:
                    self.say(
                        "the model's answer to an image depends on what else is in its batch (by "
                        f"{gap:.1%} of its scores' spread): an adversarial image may be one only in its batch. With "
                        "--batch-size 1 every image is asked alone."
                    )
                return
            gap = changed
        raise GradlessError(
            f"the model answered one input twice, and differently (by {gap:.1%} of its scores' spread), so an adversarial "
            "image could be chance. Give --repeat 10, for example, with --overwrite or another output: every input is then "
            "asked ten times, which counts as ten queries, and the mean of its scores decides."
        )


def _gap(one: Tensor, other: Tensor) -> float:
    """The difference of two answers, in units of the first one's spread; 1 for two different classes."""
    if one.ndim == 0 or one.shape != other.shape:
        return float(one.shape != other.shape or bool(one != other))
    apart, spread = float((one - other).abs().max()), float(one.max() - one.min())
    return apart / spread if spread > 0 else float(apart > 0)
