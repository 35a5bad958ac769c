"""Batches of tokenized examples, in an order that follows from the seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler

from gradless import noise, objectives
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.independence import independence, keeps_copies
from gradless.layers import Linear, QuantLinear
from gradless.objectives import TokenInputs, TokenizedExample
from gradless.types import LanguageModel

PAIR_TOKENS = 1024
"""Largest number of tokens in a batch whose two losses come from one forward. In longer ones unpacking is a small part."""


class TokenBatch(Batch):
    """A batch of tokenized examples, with the loss of `objectives`.

    Args:
        model: the language model.
        inputs: on the model's device.
    """

    def __init__(self, model: LanguageModel, inputs: TokenInputs) -> None:
        self._model, self.inputs = model, inputs
        self.size = len(inputs.sizes)
        self.paired = independence(model).halves and inputs.input_ids.numel() <= PAIR_TOKENS

    def loss(self) -> Tensor:
        return self.losses().mean()

    def paired_loss(self) -> tuple[Tensor, Tensor]:
        plus, minus = self.paired_losses().mean(1)
        return plus, minus

    def losses(self) -> Tensor:
        return objectives.losses(self._model, self.inputs)[0]

    def paired_losses(self) -> Tensor:
        return objectives.losses(self._model, objectives.doubled(self.inputs))[0].view(2, -1)

    @property
    def example_of_token(self) -> Tensor:
        if not independence(self._model).halves:
            raise GradlessError(
                "this method needs the example of each token, and not all layers of this model see a batch's tokens in their "
                "order; use --method qzo."
            )
        return self.inputs.owners

    def token_losses(self) -> Tensor:
        logits, _ = objectives.supervised_logits(self._model, self.inputs)
        return nn.functional.cross_entropy(logits, self.inputs.targets.to(logits.device), reduction="none")

    @property
    def labels(self) -> Tensor:
        return self.inputs.labels

    def answer_scores(self) -> Tensor:
        return objectives.asked(self._model, self.inputs)

    @property
    def answer_tokens(self) -> Tensor:
        return objectives.asked_tokens(self.inputs)

    def layers(self, names: list[str]) -> Mapping[str, Linear]:
        layers = {module.packed.name: module for module in self._model.modules() if isinstance(module, QuantLinear)}
        return {name: layers[name] for name in names}


def token_batch(model: LanguageModel, examples: Sequence[TokenizedExample], copies: int = 0) -> TokenBatch:
    """A batch of examples in the layout that the model needs.

    Args:
        model: the language model.
        examples: the batch's examples.
        copies: number of copies of its answer token that each example gets; see `objectives.collate`.
    """
    inputs = objectives.collate(examples, rows=independence(model).rows, copies=copies)
    return TokenBatch(model, inputs.to(model.device))


def shared_words(model: LanguageModel, data: object) -> tuple[int, ...]:
    """The token ids of the words among which all rows choose, if the model keeps copies of a token apart; otherwise ()."""
    words = {example.words for example in data} if is_tokenized(data) else set()
    shared = (words.pop() or ()) if len(words) == 1 else ()
    return shared if shared and keeps_copies(model) else ()


def is_tokenized(data: object) -> TypeGuard[Sequence[TokenizedExample]]:
    """Whether a data set is a sequence of tokenized examples."""
    return isinstance(data, Sequence) and len(data) > 0 and isinstance(data[0], TokenizedExample)


class SeededSampler(Sampler[int]):
    """Indices in an order that follows from seed and epoch alone."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        return iter(noise.permutation(self.seed, self.epoch, self.n).tolist())

    def __len__(self) -> int:
        return self.n


class MicroBatches:
    """The rows of every step: each epoch goes through all of them once, in an order that follows from seed and epoch.

    Args:
        n: number of rows.
        batch_size: number of rows of a micro-batch; the last one of an epoch may have fewer.
        accumulate: number of micro-batches of a step; the last step of an epoch may have fewer.
        seed: the run's seed.
    """

    def __init__(self, n: int, *, batch_size: int, accumulate: int, seed: int) -> None:
        self._sampler, self._size, self._accumulate = SeededSampler(n, seed), batch_size, accumulate
        self._steps = -(-n // (batch_size * accumulate))
        self._order: tuple[int, torch.Tensor] | None = None

    def of_step(self, step: int) -> list[list[int]]:
        """The numbers of a step's rows, micro-batch by micro-batch."""
        epoch, number = divmod(step, self._steps)
        if self._order is None or self._order[0] != epoch:
            self._sampler.set_epoch(epoch)
            self._order = epoch, torch.tensor(list(self._sampler))
        rows = self._size * self._accumulate
        of_step = self._order[1][number * rows : (number + 1) * rows]
        return [part.tolist() for part in torch.split(of_step, self._size)]
