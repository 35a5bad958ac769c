"""The loss: how well a model scores the right answer.

An example is a prompt and its candidate completions. A candidate's score is its mean token log-probability (MeZO's rule).
With several candidates the loss is the cross-entropy over their scores, and the prediction is the best one. The loss of a lone
candidate is minus its score. Logits are computed at supervised positions only. If every candidate is one token, the head
computes the logits of these tokens alone.

Over 400 lines, because the layout of a batch and the loss that reads it are one convention.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from gradless.errors import GradlessError
from gradless.layers import reading_at, restricted_to
from gradless.types import LanguageModel, Tokenizer

SHORTEST = 3
"""Smallest number of tokens in an example: one of the answer, and two before it."""
PACKED_ROW = 64
"""Smallest number of tokens in a packed row. Longer rows cost more attention across sequences, shorter ones more padding."""


class Rows(Enum):
    """How the sequences of a batch are laid out in rows. `independence` tries which layout a model needs."""

    PACKED = "packed"
    """Several sequences in a row, end to end; position ids begin anew with each."""
    PADDED = "padded"
    """One sequence in a row, padded on the right."""
    ALONE = "alone"
    """One sequence in a forward."""


@dataclass(frozen=True)
class Example:
    """A prompt, its candidates and the right one.

    Attributes:
        prompt: text before the answer.
        candidates: possible completions; one if the data holds the right one only.
        label: index of the right candidate.
        answers: accepted answers to a question that is evaluated by generating; else None.
        verbatim: whether candidates follow the prompt as they are; otherwise a space is put between them, unless white space is
            there already.
        gaps: ranges of characters (start, end) of a lone candidate that are read but not learned, in order.
        remarks: facts about the row that the user should know.
    """

    prompt: str
    candidates: tuple[str, ...]
    label: int = 0
    answers: tuple[str, ...] | None = None
    verbatim: bool = False
    gaps: tuple[tuple[int, int], ...] = ()
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenizedExample:
    """An `Example` as token ids. Each candidate has a prompt of its own, because the tokens at the border may differ.

    Attributes:
        prompts, completions: token ids of each candidate.
        label, answers: those of the example.
        gaps: ranges of tokens (start, end) of a lone completion that are read but not learned, in order.
        shortened: whether tokens that would be learned were dropped to fit a limit.
    """

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]
    label: int
    answers: tuple[str, ...] | None = None
    gaps: tuple[tuple[int, int], ...] = ()
    shortened: bool = field(default=False, compare=False)

    def __repr__(self) -> str:
        """The text whose hash identifies a run's data in its journal. Without gaps it is that of versions that had none."""
        gaps = f", gaps={self.gaps!r}" if self.gaps else ""
        return (
            f"TokenizedExample(prompts={self.prompts!r}, completions={self.completions!r}, "
            f"label={self.label!r}, answers={self.answers!r}{gaps})"
        )

    @property
    def words(self) -> tuple[int, ...] | None:
        """The candidates' token ids, if all are single tokens after the same prompt."""
        if len(self.completions) > 1 and len(set(self.prompts)) == 1 and all(len(c) == 1 for c in self.completions):
            return tuple(c[0] for c in self.completions)
        return None

    def learned(self, completion: Sequence[int]) -> Sequence[int]:
        """The indices of a completion's learned tokens."""
        if not self.gaps:
            return range(len(completion))
        skipped = {i for start, end in self.gaps for i in range(start, end)}
        return [i for i in range(len(completion)) if i not in skipped]

    def __len__(self) -> int:
        return max(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))


def tokenize(example: Example, tokenizer: Tokenizer, *, context: int, max_length: int | None = None) -> TokenizedExample:
    """Tokenize an example.

    Args:
        example: the example.
        tokenizer: the model's tokenizer.
        context: largest number of tokens that the model can read.
        max_length: largest number of tokens in an example; a longer prompt loses tokens on the left. An answer that is too long
            by itself keeps its first tokens, one with gaps its last. None: examples must fit the context.

    Raises:
        GradlessError: the prompt and an answer do not fit, or a completion is empty.
    """
    limit = min(context, max_length or context)
    if limit < SHORTEST:
        raise GradlessError(f"a limit of {limit} tokens leaves no room for a prompt and an answer; give at least {SHORTEST}.")
    joint = "" if example.verbatim or example.prompt.endswith(("\n", " ")) else " "
    head = _head(example.prompt, tokenizer)
    prompt = [*head, *_bare(example.prompt, tokenizer)]
    prompts, completions, shortened = [], [], False
    for candidate in example.candidates:
        whole = [*head, *_bare(example.prompt + joint + candidate, tokenizer)]
        shared = next((i for i, (a, b) in enumerate(zip(prompt, whole, strict=False)) if a != b), min(len(prompt), len(whole)))
        if shared == len(whole) or shared == 0:
            what = "an answer" if shared else "a prompt"
            raise GradlessError(f"{what} is empty: {example.prompt[-60:]!r} followed by {candidate[:60]!r}; drop that row.")
        if len(whole) > limit and max_length is None:
            raise GradlessError(
                f"a prompt of {len(whole)} tokens is longer than the model's context of {context}: "
                f"{example.prompt[:60]!r}...; shorten it, or give --max-length to keep only the end of long prompts."
            )
        if example.gaps:
            gaps = _token_gaps(example, whole, tokenizer, head)
            return _excerpts(whole, shared, gaps, limit, keeps_first=whole[0] == tokenizer.bos_token_id)
        completion = whole[shared:][: limit - 2]
        shortened |= len(whole) - shared > len(completion)
        first = whole[:1] if whole[0] == tokenizer.bos_token_id and len(whole) > limit else []
        prompts.append((*first, *whole[:shared][-(limit - len(completion) - len(first)) :]))
        completions.append(tuple(completion))
    return TokenizedExample(tuple(prompts), tuple(completions), example.label, example.answers, shortened=shortened)


def _bare(text: str, tokenizer: Tokenizer) -> list[int]:
    """A text's own tokens, including special tokens that it spells out."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _head(prompt: str, tokenizer: Tokenizer) -> list[int]:
    """The tokens with which a tokenizer begins a sequence; none if the prompt begins with one itself, as in chat templates.

    White space before it does not count. Tokens that the tokenizer would add at the end are left out: an answer ends where its
    text ends.
    """
    bare, around = _bare(prompt, tokenizer), list(tokenizer(prompt, add_special_tokens=True).input_ids)
    spare = len(around) - len(bare)
    at = next((n for n in range(spare + 1) if around[n : n + len(bare)] == bare), None)
    if at is None:
        raise GradlessError(
            f"the tokenizer reads {prompt[:60]!r} differently when it adds special tokens; it is not supported."
        )
    first = next((token for token in bare if tokenizer.decode([token]).strip()), None)
    return [] if first in around[:at] else around[:at]


def _token_gaps(example: Example, whole: list[int], tokenizer: Tokenizer, head: list[int]) -> list[range]:
    """The tokens of `whole` inside each gap of an example's lone candidate. A token that reaches out of a gap is not inside."""
    text, before = example.prompt + example.candidates[0], len(example.prompt)
    edges = [(before + start, before + end) for start, end in example.gaps]
    if not getattr(tokenizer, "is_fast", False):  # a slow tokenizer does not tell the places of its tokens
        shared = {}
        for edge in {edge for pair in edges for edge in pair}:
            ids = [*head, *_bare(text[:edge], tokenizer)]
            n = next((i for i, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), min(len(ids), len(whole)))
            shared[edge] = n, n + (n < len(ids))
        return [range(shared[start][1], shared[end][0]) for start, end in edges]
    own = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    places = [*((0, 0) for _ in head), *own]
    ends = list(accumulate((end for _, end in places), max))

    def first_from(edge: int) -> int:
        inside = bisect_right(ends, edge)
        reaches_in = inside < len(places) and places[inside][0] < edge and (not inside or ends[inside - 1] < edge)
        return inside + reaches_in

    return [range(first_from(start), bisect_right(ends, end)) for start, end in edges]


def _excerpts(whole: list[int], first: int, gaps: Iterable[range], limit: int, *, keeps_first: bool) -> TokenizedExample:
    """The last `limit` tokens of `whole` as an example, learned from token `first` on except in gaps."""
    skipped = {i for gap in gaps for i in gap}
    learned = [i for i in range(first, len(whole)) if i not in skipped]
    dropped = max(learned[-1] + 1 - limit, 0)
    ids = whole[dropped : learned[-1] + 1]
    if keeps_first:
        ids[0] = whole[0]
    kept = [i - dropped for i in learned if i > dropped]  # no token before the first one could predict it
    between = tuple((a + 1 - kept[0], b - kept[0]) for a, b in pairwise(kept) if b > a + 1)
    prompt, completion = tuple(ids[: kept[0]]), tuple(ids[kept[0] :])
    return TokenizedExample((prompt,), (completion,), 0, gaps=between, shortened=len(kept) < len(learned))


@dataclass(frozen=True)
class TokenInputs:
    """A batch of examples as a model reads it, one or several sequences in a row.

    Attributes:
        input_ids: int64 (rows, length).
        position_ids: int64 (rows, length), from 0 on in each sequence; None if a row holds one sequence and no copies.
        attention_mask: bool (rows, 1, length, length), which token sees which, if there are copies; else None.
        owners: int64 (rows, length), the example of each token; 0 for padding.
        rows, columns: int64 (supervised,), the positions whose logits are needed, sequence by sequence.
        targets: int64 (supervised,), the tokens to predict there.
        counts: number of supervised positions of each sequence.
        alone: the row and the length of each sequence if each needs a forward of its own, else None.
        words: int64 (candidates,) if all examples choose among the same single tokens, else None. With words each example has
            one sequence, otherwise each candidate has one.
        sizes: number of candidates of each example.
        labels: int64 (examples,).
    """

    input_ids: Tensor
    position_ids: Tensor | None
    attention_mask: Tensor | None
    owners: Tensor
    rows: Tensor
    columns: Tensor
    targets: Tensor
    counts: list[int]
    alone: list[tuple[int, int]] | None
    words: Tensor | None
    sizes: list[int]
    labels: Tensor

    def to(self, device: torch.device) -> TokenInputs:
        """The same batch on a device."""
        moved = {name: x.to(device) for name, x in vars(self).items() if isinstance(x, Tensor)}
        return TokenInputs(**(vars(self) | moved))


def collate(examples: Sequence[TokenizedExample], *, rows: Rows = Rows.PACKED, copies: int = 0) -> TokenInputs:
    """A batch: its sequences laid out in rows. Packed rows have hardly any padding.

    Args:
        examples: the batch's examples.
        rows: the layout that the model needs.
        copies: copies of each sequence's last token, at the same position. A copy sees the tokens before that token, and
            itself; no other token sees it. Only if all examples choose among the same words, and the model takes an attention
            mask.
    """
    words = examples[0].words
    if words is not None and any(example.words != words for example in examples):
        words = None
    pairs, owner, learned = [], [], []
    for i, example in enumerate(examples):
        of_example = list(zip(example.prompts, example.completions, strict=True))[: 1 if words else None]
        pairs += of_example
        learned += [example.learned(completion) for _, completion in of_example]
        owner += [i] * len(of_example)
    assert words is not None or not copies
    sequences = [(*prompt, *completion[:-1], *prompt[-1:] * copies) for prompt, completion in pairs]
    packed = rows is Rows.PACKED
    places = _pack([len(ids) for ids in sequences], PACKED_ROW if packed else 0)
    n_rows = 1 + max(row for row, _ in places)
    length = max(start + len(ids) for (_, start), ids in zip(places, sequences, strict=True))
    # Unfilled places hold token 0 at position 0: each is a sequence of its own, which no other attends to.
    input_ids = torch.zeros(n_rows, length, dtype=torch.int64)
    position_ids, owners = torch.zeros_like(input_ids), torch.zeros_like(input_ids)
    at_rows: list[int] = []
    columns: list[int] = []
    for (row, start), ids, (prompt, completion), which, i in zip(places, sequences, pairs, learned, owner, strict=True):
        here = slice(start, start + len(ids))
        input_ids[row, here] = torch.tensor(ids)
        owners[row, here] = i
        position_ids[row, here] = torch.arange(len(ids)).clamp(max=len(ids) - 1 - copies)
        supervised = [start + len(prompt) - 1 + at for at in (*which, *range(len(completion), len(completion) + copies))]
        at_rows += [row] * len(supervised)
        columns += supervised
    return TokenInputs(
        input_ids=input_ids,
        position_ids=position_ids if packed or copies else None,
        attention_mask=_sees(owners, position_ids) if copies else None,
        owners=owners,
        rows=torch.tensor(at_rows),
        columns=torch.tensor(columns),
        targets=torch.tensor([answer[at] for (_, answer), which in zip(pairs, learned, strict=True) for at in which]),
        counts=[len(which) for which in learned],
        alone=[(row, len(ids)) for (row, _), ids in zip(places, sequences, strict=True)] if rows is Rows.ALONE else None,
        words=None if words is None else torch.tensor(words),
        sizes=[len(example.completions) for example in examples],
        labels=torch.tensor([example.label for example in examples]),
    )


def _sees(owners: Tensor, position_ids: Tensor) -> Tensor:
    """Whether a token sees another: those before it in its example's sequence, and itself. bool (rows, 1, length, length)."""
    before = (position_ids.unsqueeze(1) < position_ids.unsqueeze(2)).tril()  # padding comes last in a row
    same = owners.unsqueeze(1) == owners.unsqueeze(2)
    return (same & before | torch.eye(owners.shape[1], dtype=torch.bool)).unsqueeze(1)


def doubled(batch: TokenInputs) -> TokenInputs:
    """A batch followed by a copy of itself; not of rows that are `ALONE`."""
    assert batch.alone is None
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, batch.input_ids]),
        position_ids=None if batch.position_ids is None else torch.cat([batch.position_ids, batch.position_ids]),
        rows=torch.cat([batch.rows, batch.rows + len(batch.input_ids)]),
        columns=torch.cat([batch.columns, batch.columns]),
        targets=torch.cat([batch.targets, batch.targets]),
        counts=batch.counts + batch.counts,
        sizes=batch.sizes + batch.sizes,
        labels=torch.cat([batch.labels, batch.labels]),
    )


def _pack(lengths: Sequence[int], row_length: int) -> list[tuple[int, int]]:
    """(row, start) of each sequence: the longest first, each into the first row with room for it."""
    room = max(row_length, max(lengths) if row_length else 0)
    filled: list[int] = []
    places = [(0, 0)] * len(lengths)
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, used in enumerate(filled) if used + lengths[i] <= room), len(filled))
        if row == len(filled):
            filled.append(0)
        places[i] = (row, filled[row])
        filled[row] += lengths[i]
    return places


def scores(model: LanguageModel, batch: TokenInputs) -> list[Tensor]:
    """The score of each candidate: fp32 (candidates,) for each example, up to one constant for the example."""
    batch = batch.to(model.device)
    words, targets = batch.words, batch.targets
    logits, restricted = supervised_logits(model, batch, words)
    if words is not None:
        return list(logits if restricted else logits[:, words])
    logprobs = -F.cross_entropy(logits, targets, reduction="none")
    means = torch.stack([one.mean() for one in torch.split(logprobs, batch.counts)])
    return list(torch.split(means, batch.sizes))


def supervised_logits(model: LanguageModel, batch: TokenInputs, words: Tensor | None = None) -> tuple[Tensor, bool]:
    """Logits at a batch's supervised positions: fp32 (supervised, vocabulary), or (supervised, words) if the head could be
    restricted to `words`; and whether it was.

    Raises:
        GradlessError: the model computes its logits without its head's module, so they cannot be computed at few positions.
    """
    if batch.alone is not None:
        each = [supervised_logits(model, one, words) for one in _forwards(batch)]
        return torch.cat([logits for logits, _ in each]), each[0][1]
    ids = {"input_ids": batch.input_ids, "position_ids": batch.position_ids, "attention_mask": batch.attention_mask}
    inputs = {name: x for name, x in ids.items() if x is not None}
    head = model.get_output_embeddings()
    if head is None:
        raise GradlessError(f"{type(model).__name__} names no head that its logits come from, so it cannot be scored.")
    with reading_at(head, batch.rows, batch.columns), restricted_to(head, words) as restricted:
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] != (1, len(batch.rows)):
        raise GradlessError(f"{type(model).__name__} does not compute its logits by its head alone, so it cannot be scored.")
    return logits[0].float(), restricted


def _forwards(batch: TokenInputs) -> Iterator[TokenInputs]:
    """A batch's sequences, each as a batch of its own without padding."""
    for row, length in batch.alone or ():
        at = batch.columns[batch.rows == row]
        ids = batch.input_ids[row : row + 1, :length]
        yield replace(batch, alone=None, input_ids=ids, rows=torch.zeros_like(at), columns=at)


def asked(model: LanguageModel, batch: TokenInputs) -> Tensor:
    """The score of each word at each example's last token and its copies: fp32, (examples, 1 + copies, words)."""
    every = torch.stack(scores(model, batch))
    return every.view(len(batch.sizes), -1, every.shape[1])


def asked_tokens(batch: TokenInputs) -> Tensor:
    """Each example's last token and its copies, as places in the flattened batch: int64 (examples, 1 + copies)."""
    tokens = batch.rows * batch.input_ids.shape[1] + batch.columns
    return tokens.view(len(batch.sizes), -1)


def losses(model: LanguageModel, batch: TokenInputs) -> tuple[Tensor, Tensor]:
    """The loss of each example, and whether its prediction is right: fp32 and bool, (examples,)."""
    each, right = [], []
    for score, label in zip(scores(model, batch), batch.labels, strict=True):
        each.append(example_loss(score, label))
        right.append(score.argmax() == label)
    return torch.stack(each), torch.stack(right)


def example_loss(score: Tensor, label: Tensor) -> Tensor:
    """The loss of an example, from its candidates' scores."""
    return -score[0] if len(score) == 1 else F.cross_entropy(score, label.to(score.device))
