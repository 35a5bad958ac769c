"""Untrusted JSON: bounded in size, depth and numbers, with unique names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeGuard, TypeVar, overload

from gradless.errors import GradlessError

T = TypeVar("T")

MOST_DEPTH = 64
"""Largest depth of nesting."""
MOST_DIGITS = 40
"""Largest number of digits in a number; tokenizers' `model_max_length` of 10^30 has 31."""
SPARE = 48 << 20
"""Bytes of memory that reading may take, in addition to twice the size of the file."""


def read_object(path: Path, *, infinities: bool = False) -> dict[str, object]:
    """A file's JSON object.

    Args:
        path: of the file.
        infinities: allow NaN, Infinity and -Infinity, which transformers writes to a config.json.

    Raises:
        GradlessError: the file cannot be read, or holds no JSON object.
    """
    try:
        size = path.stat().st_size
        if size > SPARE:
            raise GradlessError(f"{path} has {size} bytes, and at most {SPARE} are read as JSON.")
        raw = path.read_bytes()
    except OSError as error:
        raise GradlessError(f"{path} cannot be read: {error.strerror or error}.") from error
    return parse_object(raw, str(path), size, infinities=infinities)


def parse_object(raw: bytes, where: str, size: int, *, infinities: bool = False) -> dict[str, object]:
    """The JSON object in some bytes.

    Args:
        raw: UTF-8.
        where: the source of the bytes, for messages.
        size: bytes of the whole file; it bounds the memory of the object.
        infinities: see `read_object`.

    Raises:
        GradlessError: there is no object, or it is nested too deeply, is too large, or has a name twice.
    """
    if cost(raw) > SPARE + 2 * size:
        raise GradlessError(f"{where} holds too much JSON for a file of {size} bytes; it is damaged: copy it again.")
    try:
        content = json.loads(
            raw.decode(),
            object_pairs_hook=_named_once,
            parse_int=_whole,
            parse_float=_finite,
            parse_constant=float if infinities else _no_number,
        )
        if not _flat(content):
            raise RecursionError
        if b"\\u" in raw:
            json.dumps(content, ensure_ascii=False).encode()  # refuses half of a surrogate pair
    except RecursionError as error:
        raise GradlessError(f"{where} is JSON that is nested more than {MOST_DEPTH} deep; copy it again.") from error
    except ValueError as error:
        raise GradlessError(f"{where} is not JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise GradlessError(f"{where} is no JSON object; copy it again.")
    return content


def cost(raw: bytes) -> int:
    """Upper bound of the bytes that parsing takes: the text, and for every value an object and its slot in a container."""
    width = 3 if raw.isascii() else 9  # each byte is held raw, and decoded in the text and in a string
    containers = raw.count(b"{") + raw.count(b"[")
    return width * len(raw) + 160 * containers + 90 * raw.count(b":") + 40 * raw.count(b",") + 30 * raw.count(b'"')


def whole(content: Mapping[str, object], name: str, where: str, *, least: int, most: int, default: int | None = None) -> int:
    """A whole number of an object.

    Raises:
        GradlessError: the value is missing without a default, is no whole number, or is out of range.
    """
    value = content.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise GradlessError(f"{where}: {name} is {shown_value(value)}; it must be a whole number from {least} to {most}.")
    return value


@overload
def mapping(content: Mapping[str, object], name: str, where: str) -> dict[str, object]: ...


@overload
def mapping(
    content: Mapping[str, object], name: str, where: str, *, of: Callable[[object], TypeGuard[T]], what: str
) -> dict[str, T]: ...


def mapping(
    content: Mapping[str, object],
    name: str,
    where: str,
    *,
    of: Callable[[object], TypeGuard[T]] | None = None,
    what: str = "",
) -> dict[str, T] | dict[str, object]:
    """An object within an object; empty if it is missing or null. `of` checks its values, and `what` names them in messages.

    Raises:
        GradlessError: it is no object, or one of its values fails the check.
    """
    value = content.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise GradlessError(f"{where}: {name} is {shown_value(value)}; it must be an object.")
    for key, each in value.items():
        if of is not None and not of(each):
            raise GradlessError(f"{where}: {name} holds {shown_value(each)} for {shown_value(key)}; it must be {what}.")
    return value


def is_text(value: object) -> TypeGuard[str]:
    """Whether a value is a text."""
    return isinstance(value, str)


def is_object(value: object) -> TypeGuard[dict[str, object]]:
    """Whether a value is an object."""
    return isinstance(value, dict)


def shown_value(value: object) -> str:
    """A value from a file, short enough for a message."""
    match value:
        case dict():
            return f"an object of {len(value)} values"
        case list():
            return f"a list of {len(value)}"
        case str():
            return ascii(value[:40]) + "…" * (len(value) > 40)
    return json.dumps(value)


def _named_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown_value(twice)} is there twice")
    return content


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise ValueError(f"a number has {len(digits)} digits")
    return int(digits)


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _flat(content: object) -> bool:
    """Whether values are nested at most `MOST_DEPTH` deep."""
    level = [content]
    for _ in range(MOST_DEPTH + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [each for one in inner for each in one if isinstance(each, dict | list)]
        if not level:
            return True
    return False
