"""The tasks: how a row becomes a prompt and its candidate answers. The built-in prompts are MeZO's (2305.17333, appendix)."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from gradless.errors import GradlessError
from gradless.objectives import Example
from gradless.tasks.data import Row

Maker = Callable[[Row], Iterable[Example]]


@dataclass(frozen=True)
class Task:
    """A name and the rule that makes examples of a row."""

    name: str
    make: Maker

    def examples(self, rows: Iterable[Row], source: str = "the data") -> list[Example]:
        """Examples of all rows.

        Raises:
            GradlessError: a row lacks a column, or its label has no verbalizer; the message names the row.
        """
        found: list[Example] = []
        for number, row in enumerate(rows, 1):
            try:
                found += self.make(row)
            except KeyError as error:
                columns = ", ".join(row)
                raise GradlessError(
                    f"{source}, row {number} has no column {error}, which task {self.name} needs; it has {columns}."
                ) from error
            except GradlessError as error:
                raise GradlessError(f"{source}, row {number}: {error}") from error
        return found


def classification(template: str, labels: dict[str, str], **aliases: str) -> Maker:
    """A prompt from a template and one verbalizer a label.

    Args:
        template: a format string over the row's columns; the answer follows it after a space or a newline.
        labels: label as in the data -> verbalizer; several labels may share one.
        aliases: other names under which a column may stand, as name="other".
    """
    words = tuple(dict.fromkeys(labels.values()))
    try:
        columns = [field for _, field, _, _ in string.Formatter().parse(template) if field]
    except ValueError as error:
        raise GradlessError(f"the template {template!r} cannot be read: {error}; write {{{{ for a brace.") from error

    def make(row: Row) -> list[Example]:
        values = {name: row[aliases[name] if name not in row and aliases.get(name) in row else name] for name in columns}
        label = _as_label(row["label"])
        if label not in labels:
            raise GradlessError(f"label {label!r} has no verbalizer; there are some for {', '.join(map(repr, labels))}.")
        return [Example(template.format(**values), words, words.index(labels[label]))]

    return make


def _as_label(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).strip()


def _boolq(row: Row) -> Iterable[Example]:
    labels = {"false": "No", "true": "Yes", "0": "No", "1": "Yes"}
    return classification("{passage} {question}?", labels)({**row, "question": row["question"].rstrip("?")})


def _wsc(row: Row) -> list[Example]:
    target = row["target"]
    prompt = (
        f'{row["text"]}\nIn the previous sentence, does the pronoun "{target["span2_text"].lower()}" '
        f"refer to {target['span1_text']}? Yes or No?\n"
    )
    return [Example(prompt, ("No", "Yes"), int(row["label"]))]


def _copa(row: Row) -> list[Example]:
    joint = {"effect": "so", "cause": "because"}[row["question"]]
    prompt = f"{row['premise'].rstrip('.')} {joint}"
    candidates = tuple(row[c][0].lower() + row[c][1:] for c in ("choice1", "choice2"))
    return [Example(prompt, candidates, int(row["label"]))]


def _multirc(row: Row) -> list[Example]:
    passage = row["passage"]
    return [
        Example(
            f'{passage["text"]}\nQuestion: {question["question"]}\nI found this answer "{answer["text"]}". '
            "Is that correct? Yes or No?\n",
            ("No", "Yes"),
            int(answer["label"]),
        )
        for question in passage["questions"]
        for answer in question["answers"]
    ]


def _squad(row: Row) -> list[Example]:
    answers = row["answers"]["text"] if isinstance(row["answers"], dict) else row["answers"]
    if not answers:
        return []  # SQuAD v2's unanswerable questions
    prompt = f"Title: {row['title']}\nContext: {row['context']}\nQuestion: {row['question'].strip()}\nAnswer:"
    return [Example(prompt, (answers[0] + "\n",), 0, tuple(answers))]


def completion(row: Row) -> list[Example]:
    """Rows with `prompt` and `completion`: the completion is learned as it is."""
    return [Example(row["prompt"], (row["completion"],), verbatim=True)]


def chat(tokenizer: Any) -> Maker:
    """Rows with `messages` in the usual roles: the last message, the assistant's, is learned."""
    if not getattr(tokenizer, "chat_template", None):
        raise GradlessError("this model's tokenizer has no chat template; use prompt and completion columns instead.")

    def make(row: Row) -> list[Example]:
        messages = row["messages"]
        try:
            prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(messages, tokenize=False)
        except TemplateError as error:
            raise GradlessError(f"its messages do not fit the model's chat template: {error}.") from error
        if messages[-1]["role"] != "assistant" or not whole.startswith(prompt):
            raise GradlessError("its messages do not end with an assistant's answer that follows the chat template.")
        return [Example(prompt, (whole[len(prompt) :],), verbatim=True)]

    return make


_YES_NO = {"entailment": "Yes", "not_entailment": "No", "0": "Yes", "1": "No"}
TASKS = {
    task.name: task
    for task in (
        Task("sst2", classification("{text} It was", {"0": "terrible", "1": "great"}, text="sentence")),
        Task(
            "rte",
            classification(
                '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
                _YES_NO,
                premise="sentence1",
                hypothesis="sentence2",
            ),
        ),
        Task(
            "cb",
            classification(
                'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
                {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe", "0": "Yes", "1": "No", "2": "Maybe"},
            ),
        ),
        Task("boolq", _boolq),
        Task("wsc", _wsc),
        Task(
            "wic",
            classification(
                'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
                {"false": "No", "true": "Yes", "0": "No", "1": "Yes"},
            ),
        ),
        Task("copa", _copa),
        Task("multirc", _multirc),
        Task("squad", _squad),
        Task("completion", completion),
    )
}


def choose_task(name: str | None, template: str | None, labels: dict[str, str] | None, first_row: Row, tokenizer: Any) -> Task:
    """The task that a user asked for, or the one that the data's columns show.

    Args:
        name: of a built-in task, or None.
        template: a prompt of the user's own, instead of a built-in task.
        labels: label -> verbalizer, for that template.
        first_row: of the data.
        tokenizer: of the model, for chat data.

    Raises:
        GradlessError: nothing fits; the message lists what there is.
    """
    if (template is None) != (labels is None):
        raise GradlessError("--template and --labels go together, such as --template '{text} It was' --labels 0=bad,1=good.")
    if template is not None and labels is not None:
        return Task("template", classification(template, labels))
    if name is not None:
        if name == "chat":
            return Task("chat", chat(tokenizer))
        if name not in TASKS:
            raise GradlessError(f"there is no task {name!r}; there are {', '.join(TASKS)} and chat, or give --template.")
        return TASKS[name]
    if "messages" in first_row:
        return Task("chat", chat(tokenizer))
    if {"prompt", "completion"} <= first_row.keys():
        return TASKS["completion"]
    raise GradlessError(
        f"columns {', '.join(first_row)} do not tell what to learn; give --task ({', '.join(TASKS)}), or "
        "--template and --labels."
    )
