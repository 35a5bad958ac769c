"""Chat rows: conversations in the forms of TRL and OpenAI, and the turns of each that are learned."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from gradless.errors import GradlessError
from gradless.objectives import Example
from gradless.tasks.columns import OBJECT, TEXT, WORDS, Kind, Maybe, Spec, check
from gradless.tasks.data import Row, parsed
from gradless.tasks.turns import Message, Template, left_out, locate
from gradless.types import Tokenizer

ROLES = ("system", "developer", "user", "assistant", "tool")
COLUMNS = ("messages", "prompt", "completion", "tools", "chat_template_kwargs")
"""The columns of a conversation."""
REFUSED_COLUMNS = {
    **dict.fromkeys(("chosen", "rejected"), "is preference data, which is not learned; give the chosen answer as completion"),
    **dict.fromkeys(("functions", "function_call"), "is OpenAI's older form; write tools and tool_calls"),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), "is not read; only text is learned"),
    **dict.fromkeys(("system", "system_prompt", "history", "documents"), "is not read; write it into a message"),
    **dict.fromkeys(("label", "score", "reward"), "does not change what is learned; leave bad rows out, and that column too"),
    "weight": "is not read: each row counts once; leave that column out",
}
"""Columns that are refused, because they would change what is learned -> what to do instead."""
KEYS = ("role", "content", "weight", "tool_calls", "tool_call_id", "name", "reasoning_content", "thinking", "reasoning")
"""Keys of a message that are read."""
REFUSED_KEYS = {
    "function_call": "it is OpenAI's older form; write tool_calls",
    "refusal": "no chat template writes it; put its text into content",
    "audio": "only text is learned",
    "images": "only text is learned",
    "prefix": "an unfinished message is not read; write the whole message",
    **dict.fromkeys(("train", "training", "loss", "mask"), "write weight 0 for a message that is not to be learned"),
}
"""Keys of a message that are refused, because they would change what is learned -> what to do instead."""
RESERVED = ("tools", "messages", "documents", "conversation", "chat_template", "tokenize", "tokenizer_kwargs", "padding")
"""Names that a row's chat_template_kwargs may not set."""

_PARTS = Kind("a text, or a list of parts", lambda value: isinstance(value, str | list))
_ARGUMENTS = Kind("an object, or a text that holds one", lambda value: isinstance(value, str | dict))
_CALL: Spec = {"name": WORDS, "arguments": Maybe(_ARGUMENTS)}
_MESSAGE: Spec = {
    "role": WORDS,
    "content": Maybe(_PARTS),
    "weight": Maybe(Kind("0 or 1", lambda value: not isinstance(value, bool) and value in (0, 1))),
    "tool_calls": Maybe([OBJECT]),
    **dict.fromkeys(KEYS[4:], Maybe(TEXT)),
}


@dataclass(frozen=True)
class Conversation:
    """Messages as a chat template takes them, and the indices of the learned ones.

    Attributes:
        messages: role, content and tool calls of each.
        learned: ascending indices of the learned messages, all the assistant's; at least one.
        tools: JSON schemas of the tools, or None.
        variables: further variables for the template.
        remarks: facts about the row for its user.
    """

    messages: list[Message]
    learned: list[int]
    tools: list[Row] | None
    variables: Row
    remarks: tuple[str, ...]


def chat(tokenizer: Tokenizer, train_on: str = "all") -> Callable[[Row], list[Example]]:
    """A function that makes examples of rows with `messages`, or with a conversation as `prompt` and `completion`.

    Args:
        tokenizer: of the model.
        train_on: "all" of the assistant's messages, or the "last" one.

    Raises:
        GradlessError: the tokenizer has no chat template, or several and no default.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise GradlessError("this model's tokenizer has no chat template; use prompt and completion columns instead.")
    try:
        tokenizer.get_chat_template()
    except ValueError as error:
        raise GradlessError(f"this model's tokenizer cannot choose a chat template: {error}") from error

    def make(row: Row) -> list[Example]:
        conversation = read_conversation(row, train_on)
        template = Template(tokenizer, conversation.tools, conversation.variables)
        for name in conversation.variables:
            if not re.search(rf"\b{re.escape(name)}\b", template.source):
                raise GradlessError(f"chat_template_kwargs gives {name!r}, which the model's chat template does not read.")
        messages = conversation.messages
        template, whole = _written(template, messages)
        if template.tools and whole == replace(template, tools=None).render(messages):
            raise GradlessError("the model's chat template does not write the row's tools; leave that column out.")
        spans = locate(template, messages, conversation.learned, whole)
        return [_example(whole, spans, _remarks(conversation, whole))]

    return make


def _written(template: Template, messages: list[Message]) -> tuple[Template, str]:
    """The template with the first form in which it writes all messages, and their text."""
    refused: GradlessError | None = None
    for form in FORMS:
        if form is not FORMS[0] and list(map(form, messages)) == messages:
            continue
        given = replace(template, form=form)
        try:
            whole = given.render(messages)
            for i in left_out(given, messages):
                role = messages[i]["role"]
                raise GradlessError(f"the model's chat template does not write message {i + 1}, of role {role!r}.")
        except GradlessError as error:
            refused = refused or error
        else:
            return given, whole
    assert refused is not None
    raise refused


def _as_it_is(message: Message) -> Message:
    return message


def _with_text_arguments(message: Message) -> Message:
    """Tool arguments as JSON text, for templates that join them to other texts."""
    calls = [
        {**call, "function": {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}}
        for call in message.get("tool_calls", ())
    ]
    return {**message, "tool_calls": calls} if calls else message


def _without_content(message: Message) -> Message:
    """No content in a message that only calls a tool, for templates that test for a content."""
    if "tool_calls" not in message or message["content"].strip():
        return message
    return {name: value for name, value in message.items() if name != "content"}


def _with_parts(message: Message) -> Message:
    """Content as a list of parts, for templates of models that also see images."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


FORMS = (
    _as_it_is,
    _with_text_arguments,
    _without_content,
    lambda message: _without_content(_with_text_arguments(message)),
    _with_parts,
)
"""Forms in which chat templates take a message, tried in this order."""


def _example(whole: str, spans: list[tuple[int, int]], remarks: tuple[str, ...]) -> Example:
    start, end = spans[0][0], spans[-1][1]
    gaps = tuple((a - start, b - start) for (_, a), (b, _) in pairwise(spans) if a < b)
    return Example(whole[:start], (whole[start:end],), verbatim=True, gaps=gaps, remarks=remarks)


def read_conversation(row: Row, train_on: str = "all") -> Conversation:
    """A row's conversation: its `messages`, or its `prompt` and `completion`, of which only the second is learned.

    Raises:
        GradlessError: the row holds no conversation, or a part that cannot be learned; the message names the part.
    """
    present = {name: value for name, value in row.items() if value is not None}
    if "messages" in present and "completion" in present:
        raise GradlessError("has both messages and a completion; keep one of the two columns.")
    if "messages" in present:
        value, first = present["messages"], 0
        if isinstance(value, str) and value.strip():
            value = parsed(value, "column 'messages'")
        given = _messages(value, "column 'messages'")
    elif "messages" in row:
        raise GradlessError("column 'messages' is null; it must be a list of messages.")
    else:
        given, first = _prompt_and_completion(present)
    messages = [_message(message, number) for number, message in enumerate(given, 1)]
    if messages[-1]["role"] != "assistant":
        raise GradlessError(
            f"its last message is of role {messages[-1]['role']!r}; a conversation must end with the assistant's answer."
        )
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= first]
    learned = [i for i in (turns if train_on == "all" else turns[-1:]) if given[i].get("weight") != 0]
    if not learned:
        raise GradlessError("none of its messages is learned: their weight is 0; leave that row out.")
    for i in learned:
        if "tool_calls" not in messages[i] and not messages[i]["content"].strip():
            raise GradlessError(f"message {i + 1}, the assistant's, has no content to learn; leave it out, or give weight 0.")
    unread = sorted({name for message in given for name, value in message.items() if name not in KEYS and value is not None})
    remarks = [f"its messages' {', '.join(unread)} are not read"] if unread else []
    if "messages" in present and "prompt" in present:
        remarks.append("its prompt is not read beside its messages")
    return Conversation(messages, learned, _tools(present), _variables(present), tuple(remarks))


def _messages(value: Any, name: str) -> list[Message]:
    check(value, [_MESSAGE], name)
    if not value:
        raise GradlessError(f"{name} is an empty list; a conversation has messages.")
    return list(value)


def _prompt_and_completion(present: Row) -> tuple[list[Message], int]:
    """The messages of TRL's other form of a conversation, and the number of messages in its prompt."""
    for name in ("prompt", "completion"):
        if name not in present:
            raise GradlessError("has no messages, nor both prompt and completion.")
    prompt, completion = _messages(present["prompt"], "column 'prompt'"), present["completion"]
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    completion = _messages(completion, "column 'completion'")
    odd = next((message["role"] for message in completion if message["role"] not in ("assistant", "tool")), None)
    if odd is not None:
        raise GradlessError(f"column 'completion' holds a message of role {odd!r}; it may hold the assistant's and tools'.")
    return prompt + completion, len(prompt)


def _message(given: Message, number: int) -> Message:
    """A message as chat templates take it: the content is one text, and the arguments of a call are an object."""
    role, where = given["role"], f"message {number}, of role {given['role']!r},"
    if role not in ROLES:
        raise GradlessError(f"message {number} has the role {role!r}; there are {', '.join(ROLES)}.")
    for name, text in REFUSED_KEYS.items():
        if given.get(name) not in (None, [], {}):
            raise GradlessError(f"{where} has {name!r}: {text}.")
    calls = given.get("tool_calls") or []
    if role != "assistant" and (calls or given.get("weight") is not None):
        raise GradlessError(f"{where} has {'tool_calls' if calls else 'weight'}, which only the assistant's messages can have.")
    if given.get("content") is None and not calls:
        raise GradlessError(f"{where} has no content; it must be a text.")
    kept = {name: value for name, value in given.items() if name not in ("weight", "tool_calls") and value is not None}
    message = {**kept, "content": _text(given.get("content"), where)}
    if calls:
        message["tool_calls"] = [_call(call, f"{where} call {n}") for n, call in enumerate(calls, 1)]
    return message


def _text(content: Any, where: str) -> str:
    """A message's content, or the parts of it, as one text."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        check(part, {"type": TEXT}, f"{where} a part of its content")
        if part["type"] != "text":
            raise GradlessError(f"{where} has a part of type {part['type']!r}; only text is learned.")
        check(part, {"text": TEXT}, f"{where} a part of its content")
        texts.append(part["text"])
    return "".join(texts)


def _call(given: Row, where: str) -> Row:
    """A tool call in the form that chat templates read: the arguments are an object."""
    function = given.get("function", given)
    check(function, _CALL, where)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = parsed(arguments, f"{where}, its arguments,")
        check(arguments, OBJECT, f"{where}, its arguments,")
    outer = {name: value for name, value in given.items() if name not in ("name", "arguments")} if function is given else given
    return {"type": "function", **outer, "function": {**function, "arguments": arguments}}


def _tools(present: Row) -> list[Row] | None:
    """The schemas of a row's tools, from a list or from a JSON text of one."""
    tools: Any = present.get("tools")
    if isinstance(tools, str):
        tools = parsed(tools, "column 'tools'") if tools.strip() else None
    if tools is None:
        return None
    check(tools, [OBJECT], "column 'tools'")
    for number, tool in enumerate(tools, 1):
        check(tool.get("function", tool), {"name": WORDS}, f"column 'tools', entry {number}")
    return tools or None


def _variables(present: Row) -> Row:
    variables = present.get("chat_template_kwargs") or {}
    check(variables, OBJECT, "column 'chat_template_kwargs'")
    for name in variables:
        if name in RESERVED or name.startswith(("add_", "continue_", "return_", "sanitize_", "truncation", "max_length", "_")):
            raise GradlessError(f"chat_template_kwargs gives {name!r}, which is not the data's to decide.")
    return variables


def _remarks(conversation: Conversation, whole: str) -> tuple[str, ...]:
    """Remarks for the user about how a conversation is learned."""
    remarks = list(conversation.remarks)
    if any(m["role"] != "tool" and m.get("name", "") not in whole for m in conversation.messages):
        remarks.append("the chat template does not write its messages' names")
    for message in (conversation.messages[i] for i in conversation.learned):
        reasoning = (message.get(name, "") for name in KEYS[6:])
        if any(text.strip() not in whole for text in (message["content"], *reasoning)):
            remarks.append("the chat template does not write an answer as it stands (its reasoning, say): that is learned")
            break
    return tuple(remarks)
