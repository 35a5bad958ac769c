"""The tasks: how a row becomes a prompt and candidate answers. The built-in prompts are MeZO's (2305.17333, appendix)."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from gradless.errors import GradlessError
from gradless.objectives import Example
from gradless.tasks.chat import COLUMNS, REFUSED_COLUMNS, chat
from gradless.tasks.columns import LABEL, TEXT, VALUE, WORDS, Kind, Spec, check, shown
from gradless.tasks.data import Row
from gradless.types import Tokenizer

Maker = Callable[[Row], Iterable[Example]]


@contextmanager
def naming(source: str, number: int) -> Iterator[None]:
    """Every error inside becomes a `GradlessError` that names the row."""
    try:
        yield
    except GradlessError as error:
        joint = " " if str(error).startswith("has ") else ": "
        raise GradlessError(f"{source}, row {number}{joint}{error}") from error
    except Exception as error:  # an unforeseen kind of row
        raise GradlessError(f"{source}, row {number} cannot be read: {type(error).__name__}: {error}.") from error


@dataclass(frozen=True)
class Task:
    """A name and a rule that makes examples of a row.

    Attributes:
        name: of the task.
        make: makes a row's examples; it only sees rows whose columns have the declared types.
        columns: the columns that each row must have, and their types.
        aliases: column -> another name for it.
        more: further columns that the task reads.
        refused: columns that are refused, because they would change what is learned -> what to do instead.
    """

    name: str
    make: Maker
    columns: Mapping[str, Spec] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    more: Sequence[str] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def examples(self, rows: Iterable[Row], source: str = "the data") -> list[Example]:
        """Examples of all rows.

        Raises:
            GradlessError: a row lacks a column, has one of another type, or has a label without a verbalizer; the message
                names the row.
        """
        found: list[Example] = []
        for number, row in enumerate(rows, 1):
            with naming(source, number):
                found += self.examples_of(row)
        return found

    def examples_of(self, row: Row) -> list[Example]:
        """Examples of one row."""
        if not isinstance(row, dict) or not all(isinstance(name, str) for name in row):
            raise GradlessError(f"it is {shown(row)}; it must be an object with named columns.")
        for name, text in self.refused.items():
            if row.get(name) not in (None, "", [], {}):
                raise GradlessError(f"column {name!r} {text}.")
        row = row | {name: row[alias] for name, alias in self.aliases.items() if name not in row and alias in row}
        for name, spec in self.columns.items():
            if name not in row:
                raise GradlessError(f"has no column {name!r}, which task {self.name} needs; it has {', '.join(row)}.")
            check(row[name], spec, f"column {name!r}")
        examples = list(self.make(row))
        for example in examples:
            _check_example(example)
        return examples

    def unread(self, rows: Iterable[Row]) -> list[str]:
        """The columns that the task does not read, without those that are always null."""
        read = {*self.columns, *self.aliases.values(), *self.more}
        return list({name: None for row in rows for name in row if name not in read and row[name] is not None})


def _check_example(example: Example) -> None:
    """Refuse an example with equal candidates or invalid text."""
    if len(set(example.candidates)) < len(example.candidates):
        raise GradlessError(f"two of its candidates are the same: {', '.join(map(repr, example.candidates))}.")
    for text in (example.prompt, *example.candidates):
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise GradlessError(f"it holds half of a character (a lone surrogate, {text[error.start]!a}).") from error


def classification(name: str, template: str, labels: dict[str, str], kind: Kind = TEXT, **aliases: str) -> Task:
    """A task with a prompt from a template and one verbalizer for each label.

    Args:
        name: of the task.
        template: a text with {column} in the places of a row's values; the answer follows after a space or a newline.
        labels: label in the data -> verbalizer; several labels may share one.
        kind: type of the template's columns.
        aliases: other names of columns, as name="other".

    Raises:
        GradlessError: the template holds no column name or more than column names, or there are fewer than two words.
    """
    words = tuple(dict.fromkeys(labels.values()))
    pieces = _pieces(template)
    columns = [column for _, column in pieces if column is not None]
    if len(words) < 2 or not all(word.strip() for word in words):
        raise GradlessError(f"labels need at least two different words, none of them blank; there are {', '.join(words)}.")

    def make(row: Row) -> list[Example]:
        prompt = "".join(text + ("" if column is None else str(row[column])) for text, column in pieces)
        return [Example(prompt, words, words.index(labels[_label(row["label"], labels)]))]

    return Task(name, make, {**dict.fromkeys(columns, kind), "label": LABEL}, aliases)


def _pieces(template: str) -> list[tuple[str, str | None]]:
    """The texts of a template, each with the column behind it."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise GradlessError(f"the template {template!r} cannot be read: {error}; write {{{{ for a brace.") from error
    for _, column, spec, conversion in parsed:
        if column is None:
            continue
        if spec or conversion or not column or column.isdecimal() or set(".[]") & set(column):
            given = column + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise GradlessError(
                f"the template {template!r} holds {{{given}}}; only names of columns go in braces; write {{{{ for a brace."
            )
        if column == "label":
            raise GradlessError(f"the template {template!r} holds {{label}}, the answer to be learned; leave it out.")
    if all(column is None for _, column, _, _ in parsed):
        raise GradlessError(f"the template {template!r} holds no {{column}}, so all rows would read the same.")
    return [(text, column) for text, column, _, _ in parsed]


def _label(value: object, labels: Mapping[str, object]) -> str:
    """The label that a row's value spells."""
    match value:
        case bool():
            spellings = [str(value).lower()]
        case float():
            spellings = [str(int(value)), str(value)]
        case _:
            spellings = [str(value).strip()]
    found = next((spelling for spelling in spellings if spelling in labels), None)
    if found is None:
        raise GradlessError(f"label {spellings[0]!r} has no verbalizer; there are some for {', '.join(map(repr, labels))}.")
    return found


NO_YES = {"false": "No", "true": "Yes", "0": "No", "1": "Yes"}
FIRST_SECOND = {"0": 0, "1": 1}
_BOOLQ = classification("boolq", "{passage} {question}?", NO_YES)


def _boolq(row: Row) -> Iterable[Example]:
    return _BOOLQ.make({**row, "question": row["question"].rstrip("?")})


def _wsc(row: Row) -> list[Example]:
    target = row["target"]
    prompt = (
        f'{row["text"]}\nIn the previous sentence, does the pronoun "{target["span2_text"].lower()}" '
        f"refer to {target['span1_text']}? Yes or No?\n"
    )
    return [_no_yes(prompt, row["label"])]


def _no_yes(prompt: str, label: object) -> Example:
    words = ("No", "Yes")
    return Example(prompt, words, words.index(NO_YES[_label(label, NO_YES)]))


def _copa(row: Row) -> list[Example]:
    joint = {"effect": "so", "cause": "because"}[row["question"]]
    prompt = f"{row['premise'].rstrip('.')} {joint}"
    candidates = tuple(row[c][0].lower() + row[c][1:] for c in ("choice1", "choice2"))
    return [Example(prompt, candidates, FIRST_SECOND[_label(row["label"], FIRST_SECOND)])]


def _multirc(row: Row) -> list[Example]:
    passage = row["passage"]
    return [
        _no_yes(
            f'{passage["text"]}\nQuestion: {question["question"]}\nI found this answer "{answer["text"]}". '
            "Is that correct? Yes or No?\n",
            answer["label"],
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


def _are_answers(value: object) -> bool:
    texts = value.get("text") if isinstance(value, dict) else value
    return isinstance(texts, list) and all(map(WORDS.holds, texts))


def completion(row: Row) -> list[Example]:
    """Rows with `prompt` and `completion`: the completion is learned as it is."""
    return [Example(row["prompt"], (row["completion"],), verbatim=True)]


def by_shape(tokenizer: Tokenizer, train_on: str) -> Maker:
    """A function that makes examples of conversations and completions; each row's columns say which it is."""
    of_conversation: Maker | None = None

    def make(row: Row) -> Iterable[Example]:
        nonlocal of_conversation
        if "messages" in row and row["messages"] is None and row.get("prompt") is not None:
            row = {name: value for name, value in row.items() if name != "messages"}
        if "messages" not in row and not any(isinstance(row.get(name), list) for name in ("prompt", "completion")):
            return TASKS["completion"].examples_of(row)
        of_conversation = of_conversation or chat(tokenizer, train_on)
        return of_conversation(row)

    return make


TASKS = {
    task.name: task
    for task in (
        classification("sst2", "{text} It was", {"0": "terrible", "1": "great"}, text="sentence"),
        classification(
            "rte",
            '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
            {"entailment": "Yes", "not_entailment": "No", "0": "Yes", "1": "No"},
            premise="sentence1",
            hypothesis="sentence2",
        ),
        classification(
            "cb",
            'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
            {"entailment": "Yes", "contradiction": "No", "neutral": "Maybe", "0": "Yes", "1": "No", "2": "Maybe"},
        ),
        Task("boolq", _boolq, _BOOLQ.columns),
        Task("wsc", _wsc, {"text": TEXT, "target": {"span1_text": TEXT, "span2_text": TEXT}, "label": LABEL}),
        classification(
            "wic",
            'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n{sentence1}\n{sentence2}\n',
            NO_YES,
        ),
        Task(
            "copa",
            _copa,
            {
                "premise": TEXT,
                "choice1": WORDS,
                "choice2": WORDS,
                "question": Kind("'effect' or 'cause'", lambda value: value in ("effect", "cause")),
                "label": LABEL,
            },
        ),
        Task(
            "multirc",
            _multirc,
            {"passage": {"text": TEXT, "questions": [{"question": TEXT, "answers": [{"text": TEXT, "label": LABEL}]}]}},
        ),
        Task(
            "squad",
            _squad,
            {
                "title": TEXT,
                "context": TEXT,
                "question": TEXT,
                "answers": Kind("a list of texts that are not blank, or an object with such a list as 'text'", _are_answers),
            },
        ),
        Task(
            "completion",
            completion,
            {"prompt": TEXT, "completion": WORDS},
            refused=REFUSED_COLUMNS
            | dict.fromkeys(("messages", "tools", "chat_template_kwargs"), "belongs to a conversation, and this row is none"),
        ),
    )
}


def choose_task(
    name: str | None,
    template: str | None,
    labels: dict[str, str] | None,
    first_row: Row,
    tokenizer: Tokenizer,
    train_on: str = "all",
) -> Task:
    """The task that the user names, or the one that fits the columns of the data.

    Args:
        name: of a built-in task, or None.
        template: the user's prompt, instead of a built-in task.
        labels: label -> verbalizer, for that template.
        first_row: of the data.
        tokenizer: of the model, for chat data.
        train_on: "all" of the assistant's messages of a conversation, or the "last" one.

    Raises:
        GradlessError: no task fits; the message lists the tasks.
    """
    if (template is None) != (labels is None):
        raise GradlessError("--template and --labels go together, such as --template '{text} It was' --labels 0=bad,1=good.")
    if template is not None and name is not None:
        raise GradlessError(f"--template and --task {name} are two tasks; leave one of them out.")
    if train_on != "all" and (template is not None or name not in (None, "chat")):
        raise GradlessError("--train-on is for conversations; leave it out for other tasks.")
    if template is not None and labels is not None:
        return classification("template", template, labels, VALUE)
    if name is not None:
        if name == "chat":
            return Task("chat", chat(tokenizer, train_on), more=COLUMNS, refused=REFUSED_COLUMNS)
        if name not in TASKS:
            raise GradlessError(f"there is no task {name!r}; there are {', '.join(TASKS)} and chat, or give --template.")
        return TASKS[name]
    if {"messages", "prompt", "completion", "chosen"} & first_row.keys():
        kind = "chat" if "messages" in first_row else "completion"
        return Task(kind, by_shape(tokenizer, train_on), more=COLUMNS, refused=REFUSED_COLUMNS)
    raise GradlessError(
        f"columns {', '.join(first_row)} do not tell what to learn; give --task ({', '.join(TASKS)}), or "
        "--template and --labels."
    )
