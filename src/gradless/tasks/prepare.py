"""From rows to tokenized examples."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from gradless import noise, objectives
from gradless.errors import GradlessError
from gradless.formats.model import TunableModel
from gradless.objectives import TokenizedExample
from gradless.tasks.data import read_rows
from gradless.tasks.prompts import Task, choose_task, naming
from gradless.training.options import RunOptions


@dataclass(frozen=True)
class Prepared:
    """Tokenized examples, the task that made them, and facts about the data that a user should be told of."""

    examples: list[TokenizedExample]
    task: Task
    notes: list[str]


def prepare(
    source: str,
    loaded: TunableModel,
    options: RunOptions,
    *,
    split: str | None = None,
    limit: int | None = None,
    shuffled: bool = False,
) -> Prepared:
    """Read rows, make examples and tokenize them.

    Args:
        source: of the rows.
        loaded: the model, for its tokenizer and context.
        options: the run's.
        split: of a data set that is given by name; None for the options'.
        limit: use so many rows only.
        shuffled: take them in the seed's order, not the first.
    """
    tokenizer = loaded.tokenizer
    if tokenizer is None:
        raise GradlessError(f"{loaded.path} has no tokenizer, which its rows are read with.")
    rows = read_rows(source, split=split or options.split)
    order = list(range(len(rows)))
    if shuffled and limit is not None:
        order = noise.permutation(options.seed, 0, len(rows)).tolist()
    order = order[:limit]
    labels = None if options.labels is None else _parse_labels(options.labels)
    template = None if options.template is None else options.template.replace("\\n", "\n")
    task = choose_task(options.task, template, labels, rows[order[0]], tokenizer, options.train_on)
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    context = context if context > 0 else 2**31  # XLNet's -1 is no limit
    examples: list[TokenizedExample] = []
    remarks = Counter[str]()
    for i in order:
        with naming(source, i + 1):
            made = task.examples_of(rows[i])
            tokens = [
                objectives.tokenize(example, tokenizer, context=context, max_length=options.max_length) for example in made
            ]
        remarks.update(set().union(*(example.remarks for example in made)))
        remarks["nothing to learn in it"] += not made
        remarks["what is longer than --max-length is not learned"] += any(each.shortened for each in tokens)
        examples += tokens
    if not examples:
        raise GradlessError(f"{source} holds nothing to learn: no row makes an example.")
    notes = [f"{source}: {n} of {len(order)} rows: {remark}" for remark, n in remarks.items() if n]
    if unread := task.unread(rows[i] for i in order):
        notes.append(f"{source}: not read: {', '.join(unread)}")
    return Prepared(examples, task, notes)


def _parse_labels(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if any(len(pair) != 2 or not pair[0] or not pair[1] for pair in pairs):
        raise GradlessError(f"--labels {text!r} is not of the form 0=terrible,1=great.")
    labels = {label.strip(): word.strip() for label, word in pairs}
    if len(labels) < len(pairs):
        raise GradlessError(f"--labels {text!r} names a label twice; keep one of the two.")
    return labels
