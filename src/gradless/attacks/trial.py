"""Whether a model answers one input always alike: an attack that asks no input twice would not notice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from gradless.errors import GradlessError

AGAIN, ALONE = 1e-5, 1e-3
"""What answers to one input may differ by, as shares of its scores' spread: asked in the same way, and in another batch."""


@dataclass(frozen=True)
class Trial:
    """Asks the first input of an attack again, by itself, and once more if the answers differ.

    Args:
        counted: whether these are queries of its image.
        say: gets a sentence about a model whose answers depend on what else is in a batch.
    """

    counted: bool
    say: Callable[[str], None]

    def check(self, first: Tensor, images: int, again: Callable[[], Tensor | None]) -> None:
        """Compare an input's answers.

        Args:
            first: its scores (classes,), or its class.
            images: how many were in its batch.
            again: asks it by itself; None if there is no budget for that.

        Raises:
            GradlessError: the model answers one and the same batch differently.
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
                        f"{gap:.1%} of its scores' spread): what is found holds in these batches; with --batch-size 1 every "
                        "image is asked alone."
                    )
                return
            gap = changed
        raise GradlessError(
            f"the model answered one input twice, and differently (by {gap:.1%} of its scores' spread): a finding would be "
            "chance. Give --repeat 10, say, with --overwrite or another output: every input is then asked ten times, which "
            "counts as ten queries, and the mean of its scores decides."
        )


def _gap(one: Tensor, other: Tensor) -> float:
    """How far two answers are apart, in units of the first one's spread; classes that differ are one apart."""
    if one.ndim == 0 or one.shape != other.shape:
        return float(one.shape != other.shape or bool(one != other))
    apart, spread = float((one - other).abs().max()), float(one.max() - one.min())
    return apart / spread if spread > 0 else float(apart > 0)
