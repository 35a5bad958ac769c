"""Untrusted JSON: bounded in size, depth and numbers, with unique names."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gradless.errors import GradlessError

MOST_DEPTH = 64
"""Largest depth of nesting."""
MOST_DIGITS = 40
"""Largest number of digits in a number; tokenizers' `model_max_length` of 10^30 has 31."""
SPARE = 48 << 20
"""Bytes of memory that reading may take, in addition to twice the size of the file."""


def read_object(path: Path, *, infinities: bool = False) -> dict[str, Any]:
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


def parse_object(raw: bytes, where: str, size: int, *, infinities: bool = False) -> dict[str, Any]:
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


def whole(content: dict[str, Any], name: str, where: str, *, least: int, most: int, default: int | None = None) -> int:
    """A whole number of an object.

    Raises:
        GradlessError: the value is missing without a default, is no whole number, or is out of range.
    """
    value = content.get(name, default)
    if type(value) is not int or not least <= value <= most:
        raise GradlessError(f"{where}: {name} is {shown_value(value)}; it must be a whole number from {least} to {most}.")
    return value


def mapping(
    content: dict[str, Any], name: str, where: str, *, of: Callable[[Any], bool] | None = None, what: str = ""
) -> dict[str, Any]:
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


def shown_value(value: Any) -> str:
    """A value from a file, short enough for a message."""
    match value:
        case dict():
            return f"an object of {len(value)} values"
        case list():
            return f"a list of {len(value)}"
        case str():
            return ascii(value[:40]) + "…" * (len(value) > 40)
    return json.dumps(value)


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
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


def _flat(content: Any) -> bool:
    """Whether values are nested at most `MOST_DEPTH` deep."""
    level = [content]
    for _ in range(MOST_DEPTH + 1):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [each for one in inner for each in one if isinstance(each, dict | list)]
        if not level:
            return True
    return False
