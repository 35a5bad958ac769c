"""The places of the assistant's turns in a conversation's text, as a chat template renders it.

A template is a program, and only its output shows which characters are whose. A turn is located by rendering parts of the
conversation, or the conversation with another text in the turn's place, and comparing. If a template marks turns itself, with
{% generation %}, its marks are used.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from transformers.utils.chat_template_utils import render_jinja_template

from gradless.errors import GradlessError
from gradless.readers.templates import bounded_rendering
from gradless.types import Tokenizer

T = TypeVar("T")
Message = dict[str, Any]
Span = tuple[int, int]
"""A range of characters: from a start up to an end."""
_SPECIAL, _LONGEST = re.compile(r"<[^<>\s]{1,62}>|\[/?[A-Z_]{1,61}\]"), 64
"""The look of a special token, and its largest length."""
MARKS = range(0x100000, 0x10FFFE)
"""Private-use characters, put in the place of a message's text."""


def render(run: Callable[[], T]) -> T:
    """Run a chat template with limits on time and memory. transformers keeps it in a sandbox. All templates run here.

    Raises:
        GradlessError: the template fails, or refuses its messages.
    """
    try:
        with bounded_rendering():
            return run()
    except Exception as error:  # a template is a program that may raise anything
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise GradlessError(f"its messages do not fit the model's chat template: {text.rstrip('.')}.") from error


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with a row's tools and variables.

    Attributes:
        tokenizer: of the model.
        tools: JSON schemas of the tools that the assistant may call, or None.
        variables: further variables that the template can read.
        form: brings a message into the form that the template takes.
    """

    tokenizer: Tokenizer
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    form: Callable[[Message], Message] = lambda message: message

    def render(self, messages: Sequence[Message], *, prompting: bool = False) -> str:
        """The text of some messages, with `prompting` followed by the generation prompt."""
        apply, chosen = self.tokenizer.apply_chat_template, {"add_generation_prompt": prompting, **self.variables}
        return str(render(lambda: apply(list(map(self.form, messages)), self.tools, tokenize=False, **chosen)))

    @property
    def source(self) -> str:
        """The source text of the template."""
        return str(self.tokenizer.get_chat_template(tools=self.tools))

    def marked(self, messages: Sequence[Message], whole: str) -> list[Span]:
        """The parts of the conversation's text that the template marks as the assistant's; empty if it marks none."""
        if not re.search(r"\{%-?\s*generation\b", self.source):
            return []
        given, names = list(map(self.form, messages)), {**self.tokenizer.special_tokens_map, **self.variables}
        chosen = {"chat_template": self.source, "return_assistant_tokens_mask": True, **names}
        texts, spans = render(lambda: render_jinja_template([given], self.tools, **chosen))
        return list(spans[0]) if texts == [whole] else []


def locate(template: Template, messages: Sequence[Message], wanted: Sequence[int], whole: str) -> list[Span]:
    """The characters of `whole` to be learned for each wanted message.

    A span begins after the template's generation prompt and ends where the next message begins, so it holds the token that ends
    the turn. If earlier turns are rendered differently from last ones (without reasoning), or the generation prompt is no part
    of the text, a span begins with the first character that depends on the message.

    Args:
        template: of the model.
        messages: of the conversation.
        wanted: ascending indices of messages of the assistant.
        whole: the text of the conversation.

    Raises:
        GradlessError: a turn cannot be located for certain.
    """
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    marked = template.marked(messages, whole)
    if len(marked) == len(turns):
        spans = [marked[turns.index(i)] for i in wanted]
    else:
        spans = [_by_prefix(template, messages, i, whole) or _by_comparison(template, messages, i, whole) for i in wanted]
    end_before = 0
    for i, (start, end) in zip(wanted, spans, strict=True):
        if not end_before <= start < end <= len(whole):
            raise _not_found(i)
        end_before = end
    return spans


def left_out(template: Template, messages: Sequence[Message]) -> list[int]:
    """Indices of messages whose content, or whose name of a called tool, the template leaves out."""
    texts: dict[str, tuple[int, str]] = {}

    def mark(i: int, text: str) -> str:
        if not text.strip():
            return text
        texts[chr(MARKS[len(texts)])] = i, text.strip()
        return next(reversed(texts))

    marked = []
    for i, message in enumerate(messages):
        other = {**message, "content": mark(i, message["content"])}
        if "tool_calls" in message:
            functions = [{**call["function"], "name": mark(i, call["function"]["name"])} for call in message["tool_calls"]]
            calls = zip(message["tool_calls"], functions, strict=True)
            other["tool_calls"] = [{**call, "function": function} for call, function in calls]
        marked.append(other)
    try:
        written = template.render(marked)
        return [i for each, (i, _) in texts.items() if each not in written]
    except GradlessError:  # the template depends on the texts
        written = template.render(messages)
        return [i for i, text in texts.values() if text not in written]


def _by_prefix(template: Template, messages: Sequence[Message], i: int, whole: str) -> Span | None:
    """The turn, if the text of the messages up to it is the beginning of the whole text."""
    before, upto = _try(template, messages[:i], prompting=True), _try(template, messages[: i + 1])
    if before is None or upto is None or not (whole.startswith(upto) and upto.startswith(before)):
        return None
    return len(before), len(upto)


def _by_comparison(template: Template, messages: Sequence[Message], i: int, whole: str) -> Span:
    """The turn: the part of the text that changes with the turn's text."""
    mark = next(chr(c) for c in MARKS if chr(c) not in whole)
    other = [*messages[:i], {"role": "assistant", "content": mark}, *messages[i + 1 :]]
    changed = _try(template, other)
    if changed is None or changed.count(mark) != 1:
        raise _not_found(i)
    before, alone = _try(template, messages[:i], prompting=True), _try(template, messages[:i])
    upto, upto_changed = _try(template, messages[: i + 1]), _try(template, other[: i + 1])

    start = _shared(whole, changed)
    if upto is not None and whole.startswith(upto):
        end = len(upto)
    else:
        same = _shared(whole[start:], changed[start:], at_end=True)
        if len(_SPECIAL.sub("?", changed[changed.index(mark) + 1 : len(changed) - same])) > 1:
            raise _not_found(i)  # the text behind the turn depends on it, such as a tool's answer on the call
        end = len(whole) - same
        if upto is not None and upto_changed is not None:
            closing = upto[len(upto) - _shared(upto, upto_changed, at_end=True) :]
            end += _shared(closing, whole[end:])

    if before is not None and whole.startswith(before) and len(before) < end:
        start = len(before)
    elif before is not None and alone is not None and before.startswith(alone) and before != alone:
        prompt = before[len(alone) :]
        at = whole.rfind(prompt, max(start - len(prompt), 0), start + len(prompt))
        start = start if at < 0 else at + len(prompt)
    return start, end


def _shared(a: str, b: str, *, at_end: bool = False) -> int:
    """Length of the common beginning, or end, of two texts. It never cuts a special token."""
    if at_end:
        n = bisect_left(range(min(len(a), len(b))), True, key=lambda k: a[len(a) - k - 1 :] != b[len(b) - k - 1 :])
    else:
        n = bisect_left(range(min(len(a), len(b))), True, key=lambda k: a[: k + 1] != b[: k + 1])
    for text in (a, b):
        cut = len(text) - n if at_end else n
        for piece in _SPECIAL.finditer(text, max(cut - _LONGEST, 0), cut + _LONGEST):
            if piece.start() < cut < piece.end():
                n = len(text) - piece.end() if at_end else piece.start()
    return n


def _try(template: Template, messages: Sequence[Message], *, prompting: bool = False) -> str | None:
    """The text of some messages, or None if the template refuses them alone."""
    try:
        return template.render(messages, prompting=prompting)
    except GradlessError:
        return None


def _not_found(i: int) -> GradlessError:
    return GradlessError(
        f"the model's chat template does not show where message {i + 1}, the assistant's, begins and ends; leave that row out, "
        "or give prompt and completion as texts."
    )
