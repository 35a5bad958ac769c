"""`Batch`: the questions that a method may ask of the data and the model together.

Each method needs other quantities. A question runs the model under the current view of its weights, so a method never sees a
model: it moves the view and asks again. A batch that cannot answer says so in a sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from torch import Tensor

from gradless.errors import GradlessError
from gradless.layers import Linear

Loss = float | Tensor
"""A float, or a tensor (problems,) if a closure returns one loss for each of several problems that share no value of x."""


class Batch:
    """One micro-batch of a step. Every question is refused unless a subclass answers it.

    Attributes:
        size: examples; a step's losses are means over the examples of all its micro-batches.
        first: the number of the first example within the step.
        paired: whether the batch and a copy of it can go through one forward.
        generates: whether a question runs many forwards, as generating an answer does.
    """

    size: int = 1
    first: int = 0
    paired: bool = False
    generates: bool = False

    def loss(self) -> Loss:
        """The mean loss."""
        self._refuse("a loss")

    def paired_loss(self) -> tuple[Loss, Loss]:
        """The mean losses of the batch and of its copy, from one forward; only if it is `paired`."""
        self._refuse("two losses from one forward")

    def losses(self) -> Tensor:
        """The loss of each example: fp32 (size,)."""
        self._refuse("a loss an example")

    def paired_losses(self) -> Tensor:
        """The losses of each example and of its copy, from one forward: fp32 (2, size); only if it is `paired`."""
        self._refuse("a loss an example")

    @property
    def example_of_token(self) -> Tensor:
        """The number of each token's example, from 0 on: int64, in the shape of the tokens."""
        self._refuse("the example of each token")

    def token_losses(self) -> Tensor:
        """Minus the log-probability of each supervised token, sequence by sequence: fp32 (supervised,)."""
        self._refuse("a loss a token")

    @property
    def labels(self) -> Tensor:
        """The right word of each example, as an index into the words that all examples choose among: int64 (size,)."""
        self._refuse("one of a few words as the answer")

    def answer_scores(self) -> Tensor:
        """The score of each word at every token of `answer_tokens`: fp32 (size, 1 + copies, words)."""
        self._refuse("scores at answer tokens")

    @property
    def answer_tokens(self) -> Tensor:
        """The last token of each example and its copies, as places in the flattened tokens: int64 (size, 1 + copies)."""
        self._refuse("scores at answer tokens")

    def layers(self, names: list[str]) -> Mapping[str, Linear]:
        """The linear layers that multiply the named tensors, each of which sees all tokens of the batch in their order."""
        del names
        self._refuse("the outputs of single layers")

    def outcome(self) -> object:
        """The result of a batch without a loss: an answer that only a comparison can rank."""
        self._refuse("an outcome")

    def _refuse(self, what: str) -> NoReturn:
        raise GradlessError(
            f"this method needs {what}, which {type(self).__name__} does not give: train on rows that gradless tokenized, with "
            "its own loss, or choose a method that only needs a loss."
        )


class Closure(Batch):
    """A batch around a closure, as `torch.optim` has it: a function that runs the model and returns its loss.

    Args:
        closure: returns the loss, a number or a tensor of one; the losses of several problems, (problems,); the losses of the
            examples, (size,), for a method that needs them; or anything, for a method that compares.
        pair: runs the model on the data followed by a copy, and returns both losses.
        example_of_token: see `Batch`.
        generates: see `Batch`.
    """

    def __init__(
        self,
        closure: Callable[[], Any],
        pair: Callable[[], Any] | None = None,
        *,
        example_of_token: Tensor | None = None,
        generates: bool = False,
    ) -> None:
        self._closure, self._pair, self._examples = closure, pair, example_of_token
        self.paired, self.generates = pair is not None, generates

    def loss(self) -> Loss:
        loss: Loss = self._closure()
        return loss

    def paired_loss(self) -> tuple[Loss, Loss]:
        if self._pair is None:
            return super().paired_loss()
        plus, minus = self._pair()
        return plus, minus

    def losses(self) -> Tensor:
        losses: Tensor = self._closure()
        return losses

    def paired_losses(self) -> Tensor:
        if self._pair is None:
            return super().paired_losses()
        losses: Tensor = self._pair()
        return losses

    @property
    def example_of_token(self) -> Tensor:
        return super().example_of_token if self._examples is None else self._examples

    def outcome(self) -> object:
        return self._closure()
