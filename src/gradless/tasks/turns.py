"""Where an assistant's turns stand in the text that a chat template makes of a conversation.

A template is a program: nothing but its output says which characters are whose. A turn is located by rendering parts of its
conversation, or the conversation with another text in the turn's place, and comparing. Templates that mark turns themselves,
with {% generation %}, are believed.
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

T = TypeVar("T")
Message = dict[str, Any]
Span = tuple[int, int]
"""Characters from a start up to an end."""
_SPECIAL, _LONGEST = re.compile(r"<[^<>\s]{1,62}>|\[/?[A-Z_]{1,61}\]"), 64
"""What looks like a special token, and how long it can be."""
MARKS = range(0x100000, 0x10FFFE)
"""Characters for private use: texts that stand in for a message's own."""


def render(run: Callable[[], T]) -> T:
    """Run a chat template: all of them run in here. transformers keeps them in a sandbox, and time and memory are bounded.

    Raises:
        GradlessError: the template fails, or refuses what it is given.
    """
    try:
        with bounded_rendering():
            return run()
    except Exception as error:  # a template is a program that may raise anything
        text = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise GradlessError(f"its messages do not fit the model's chat template: {text.rstrip('.')}.") from error


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template, with what a row gives it beside its messages.

    Attributes:
        tokenizer: of the model.
        tools: JSON schemas of the tools that the assistant may call, or None.
        variables: more names that the template can read.
        form: of the messages that it takes.
    """

    tokenizer: Any
    tools: list[dict[str, Any]] | None = None
    variables: dict[str, Any] = field(default_factory=dict)
    form: Callable[[Message], Message] = lambda message: message

    def render(self, messages: Sequence[Message], *, prompting: bool = False) -> str:
        """The text of some messages; `prompting`: followed by what begins the assistant's next one."""
        apply, chosen = self.tokenizer.apply_chat_template, {"add_generation_prompt": prompting, **self.variables}
        return str(render(lambda: apply(list(map(self.form, messages)), self.tools, tokenize=False, **chosen)))

    @property
    def source(self) -> str:
        """The template's own text."""
        return str(self.tokenizer.get_chat_template(tools=self.tools))

    def marked(self, messages: Sequence[Message], whole: str) -> list[Span]:
        """The parts of the conversation's text that the template marks as the assistant's; none where it marks nothing."""
        if not re.search(r"\{%-?\s*generation\b", self.source):
            return []
        given, names = list(map(self.form, messages)), {**self.tokenizer.special_tokens_map, **self.variables}
        chosen = {"chat_template": self.source, "return_assistant_tokens_mask": True, **names}
        texts, spans = render(lambda: render_jinja_template([given], self.tools, **chosen))
        return list(spans[0]) if texts == [whole] else []


def locate(template: Template, messages: Sequence[Message], wanted: Sequence[int], whole: str) -> list[Span]:
    """The characters of `whole` that the assistant is to learn for each wanted message.

    A span begins where the template's generation prompt ends, and ends where the next message begins: it holds the token that
    ends the turn. Where earlier turns are rendered otherwise than last ones (reasoning is dropped), or the generation prompt
    is no part of the text, a span begins with the first character that the message itself decides.

    Args:
        template: the model's.
        messages: of the conversation.
        wanted: indices of the assistant's messages, rising.
        whole: the conversation's text.

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
    """Indices of the messages of which the template does not write the content, or the name of a tool that is called."""
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
    except GradlessError:  # a template that looks into the texts
        written = template.render(messages)
        return [i for i, text in texts.values() if text not in written]


def _by_prefix(template: Template, messages: Sequence[Message], i: int, whole: str) -> Span | None:
    """A turn of a template that renders the beginning of a conversation as the whole one's beginning."""
    before, upto = _try(template, messages[:i], prompting=True), _try(template, messages[: i + 1])
    if before is None or upto is None or not (whole.startswith(upto) and upto.startswith(before)):
        return None
    return len(before), len(upto)


def _by_comparison(template: Template, messages: Sequence[Message], i: int, whole: str) -> Span:
    """A turn, as what changes where another text stands in its place."""
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
            raise _not_found(i)  # what follows depends on the turn, such as a tool's answer on the call
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
    """Characters with which both texts begin, or end. What looks like a special token is shared as a whole or not at all."""
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
    """The text of some messages, or None where the template does not take them alone."""
    try:
        return template.render(messages, prompting=prompting)
    except GradlessError:
        return None


def _not_found(i: int) -> GradlessError:
    return GradlessError(
        f"the model's chat template does not show where message {i + 1}, the assistant's, begins and ends; leave that row out, "
        "or give prompt and completion as texts."
    )
