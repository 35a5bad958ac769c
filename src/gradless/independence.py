"""How a batch must be laid out so that its sequences do not see each other. This is tried on the model, once; its name decides
nothing.

Three short sequences X, A, Y of different lengths are scored in at most four forwards:

    [X A Y]           packed end to end into one row, position ids beginning anew with each
    [X' A Y']         the same lengths with other tokens: whatever A takes from its neighbours shows here
    A                 alone
    X, A, A.., Y      a row each, padded on the right, A with two different paddings; only if packing does not keep A apart

A layout keeps A apart if A's scores depend on its neighbours at no position, and are those of A alone up to the rounding of
another shape. The latter holds at the median position, because rounding changes a router's choice at some.
A model that keeps A apart in neither layout gets a forward for each sequence.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from gradless import objectives
from gradless.errors import GradlessError
from gradless.layers import QuantEmbedding, QuantLinear
from gradless.objectives import Rows, TokenInputs, TokenizedExample
from gradless.readers.sentences import said
from gradless.types import LanguageModel

LENGTHS = (9, 7, 5)
"""Numbers of tokens of X, A and Y. They fall, because longer sequences come first in a packed row."""
ROUNDING = {torch.float32: 2.0**-10, torch.float16: 2.0**-7, torch.bfloat16: 2.0**-4}
"""Largest distance of a row's scores in batches of two shapes, relative to their spread (both root mean squares)."""
LEAST_LEAK = {torch.float32: 2.0**-16, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Smallest distance of a row's scores beside two different neighbours, at any position, that counts as a leak (relative to
their spread). Other tokens go to other experts, in products of other shapes, whose rounding moved scores by 2e-7 in fp32.
The smallest leak of an untrained network was 0.004 in fp32 and 0.006 in bf16."""


@dataclass(frozen=True)
class Independence:
    """The layout that keeps sequences apart in a model.

    Attributes:
        rows: how sequences must be laid out.
        halves: whether every packed layer receives all tokens of a batch in their order, so that it can split a doubled batch
            into its halves.
    """

    rows: Rows
    halves: bool


_TRIED: WeakKeyDictionary[LanguageModel, Independence] = WeakKeyDictionary()
_COPIES: WeakKeyDictionary[LanguageModel, bool] = WeakKeyDictionary()


def independence(model: LanguageModel) -> Independence:
    """The layout that a model needs: tried at the first call, then remembered.

    Raises:
        GradlessError: the model scores a lone row differently from one forward to the next, or its forward fails.
    """
    if model not in _TRIED:
        training = model.training
        model.eval()
        try:
            with torch.inference_mode():
                _TRIED[model] = _try(model)
        except GradlessError:
            raise
        except Exception as error:  # a model's own code may raise anything
            why = f"{type(error).__name__}: {said(error)}"
            raise GradlessError(
                f"the forward of {type(model).__name__} fails on a few tokens in {model.dtype} ({why})."
            ) from error
        finally:
            model.train(training)
    return _TRIED[model]


def _try(model: LanguageModel) -> Independence:
    sequences, others = _sequences(model, 0), _sequences(model, 1)
    others[1] = sequences[1]
    packed, halves = None, False
    together = not _follows_the_longest_row(model.config.to_dict())
    if together and _may_pack(model):
        (_, packed, _), halves = _packed_scores(model, sequences)
        if _distances(packed, _packed_scores(model, others)[0][1]).max() >= LEAST_LEAK[model.dtype]:
            packed = None
    alone = _scores_of(model, _batch(sequences[1:2], Rows.PADDED))[0]
    if packed is not None and _distances(alone, packed).median() <= ROUNDING[model.dtype]:
        return Independence(Rows.PACKED, halves)
    if together:
        filled, filled_otherwise = _filled_scores(model, sequences)
        unseen = _distances(filled, filled_otherwise).max() < LEAST_LEAK[model.dtype]
        if unseen and _distances(alone, filled).median() <= ROUNDING[model.dtype]:
            return Independence(Rows.PADDED, halves=False)
    again = _scores_of(model, _batch(sequences[1:2], Rows.PADDED))[0]
    if not _distances(alone, again).median() <= ROUNDING[model.dtype]:
        raise GradlessError(
            f"{type(model).__name__} scores one row differently from one forward to the next, so that its losses cannot be "
            "compared; switch off its randomness."
        )
    return Independence(Rows.ALONE, halves=False)


def keeps_copies(model: LanguageModel) -> bool:
    """Whether copies of a sequence's last token, each seen by itself alone, score words as that token does. Tried by two
    forwards at the first call, then remembered."""
    if independence(model).rows is not Rows.PACKED or not independence(model).halves:
        return False
    if model not in _COPIES:
        _COPIES[model] = _try_copies(model)
    return _COPIES[model]


def _try_copies(model: LanguageModel) -> bool:
    words = _vocabulary(model) // 2, _vocabulary(model) // 2 + 1
    examples = [TokenizedExample((ids,) * 2, tuple((word,) for word in words), 0) for ids in _sequences(model, 0)]
    with torch.inference_mode():
        plain = torch.stack(objectives.scores(model, objectives.collate(examples)))
        copied = objectives.asked(model, objectives.collate(examples, copies=2))
    return bool(_distances(plain.unsqueeze(1).expand_as(copied), copied).max() <= ROUNDING[model.dtype])


def _vocabulary(model: LanguageModel) -> int:
    return int(model.get_input_embeddings().num_embeddings)


def _sequences(model: LanguageModel, first: int) -> list[tuple[int, ...]]:
    """X, A and Y as token ids; another `first` changes every token."""
    n = _vocabulary(model)
    return [tuple((n // 3 + 5 * i + 3 * k + first) % n for k in range(length)) for i, length in enumerate(LENGTHS)]


def _batch(sequences: list[tuple[int, ...]], rows: Rows) -> TokenInputs:
    examples = [TokenizedExample((ids[:1],), (ids[1:],), 0) for ids in sequences]
    return objectives.collate(examples, rows=rows)


def _scores_of(model: LanguageModel, batch: TokenInputs) -> list[Tensor]:
    """Scores of all tokens, minus their mean, at every position of a sequence but the last: fp32 (length - 1, vocabulary)."""
    logits, _ = objectives.supervised_logits(model, batch)
    return list(torch.split(logits - logits.mean(1, keepdim=True), batch.counts))


def _filled_scores(model: LanguageModel, sequences: list[tuple[int, ...]]) -> list[Tensor]:
    """A's scores in a batch with a row for each sequence, and those of a second A whose row is padded with other tokens."""
    x, a, y = sequences
    batch = _batch([x, a, a, y], Rows.PADDED)
    batch.input_ids[2, len(a) - 1 :] = y[0]
    return _scores_of(model, batch)[1:3]


def _packed_scores(model: LanguageModel, sequences: list[tuple[int, ...]]) -> tuple[list[Tensor], bool]:
    """The scores of a packed batch followed by its copy; and whether every packed layer saw both as halves of its tokens and
    none lent its weight."""
    batch = objectives.doubled(_batch(sequences, Rows.PACKED))
    layers = [module for module in model.modules() if isinstance(module, QuantLinear | QuantEmbedding)]
    seen: list[bool] = []
    for layer in layers:
        layer.lent = False  # weights that were read before this forward do not count

    def look(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if layer is not model.get_output_embeddings():
            linear = isinstance(layer, QuantLinear)
            x = inputs[0].flatten(0, -2) if linear else inputs[0].reshape(-1, 1)
            first, second = x[: len(x) // 2].float(), x[len(x) // 2 :].float()
            rounding = ROUNDING[model.dtype] if linear else 0.0
            seen.append(len(x) == batch.input_ids.numel() and bool(_distances(first, second).max() <= rounding))

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(look).remove)
        scores = _scores_of(model, batch)
    return scores[: len(sequences)], all(seen) and not any(layer.lent for layer in layers)


def _distances(scores: Tensor, others: Tensor) -> Tensor:
    """Distances between scores and others by position, relative to the spread of all (root mean squares): (positions,)."""
    spread = scores.square().mean().sqrt().clamp_min(torch.finfo(scores.dtype).tiny)
    return (others - scores).square().flatten(1).mean(1).sqrt() / spread


def _may_pack(model: LanguageModel) -> bool:
    """Whether a model takes position ids, and no layer cuts rows into chunks, which short rows cannot show."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    chunks = "chunked_attention" in (getattr(model.config, "layer_types", None) or ())
    return takes and not chunks


def _follows_the_longest_row(config: object) -> bool:
    """Whether a rotary scaling takes the frequencies of all rows from the longest one, which short rows cannot show.

    Args:
        config: the plain values of a model's configuration, or a part of them.
    """
    if isinstance(config, list):
        return any(map(_follows_the_longest_row, config))
    if not isinstance(config, dict):
        return False
    kind = config.get("rope_type")
    if kind == "dynamic" or (kind == "longrope" and config.get("short_factor") != config.get("long_factor")):
        return True
    return any(map(_follows_the_longest_row, config.values()))
