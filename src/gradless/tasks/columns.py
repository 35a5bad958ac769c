"""Types of a row's columns. Every value is checked here before a task reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gradless.errors import GradlessError


@dataclass(frozen=True)
class Kind:
    """A type of value: its name in messages, and a test whether a value has it."""

    name: str
    holds: Callable[[object], bool]


@dataclass(frozen=True)
class Maybe:
    """A value that may be null, or a column that may be missing."""

    kind: Spec


Spec = Kind | Maybe | list["Spec"] | Mapping[str, "Spec"]
"""A type: a `Kind`, `[S]` for a list of S, or `{"name": S, ...}` for an object that has at least these columns."""


def _is_label(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, bool | int) or (isinstance(value, str) and bool(value.strip()))


TEXT = Kind("a text", lambda value: isinstance(value, str))
WORDS = Kind("a text that is not blank", lambda value: isinstance(value, str) and bool(value.strip()))
VALUE = Kind(
    "a text or a number",
    lambda value: isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)),
)
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LABEL = Kind("a label (a text, a whole number, true or false)", _is_label)


def check(value: object, spec: Spec, name: str) -> None:
    """Check a value against a type.

    Args:
        value: anything that a reader of data files may return.
        spec: its type.
        name: of the value in messages, such as "column 'text'".

    Raises:
        GradlessError: the value, or one inside it, is missing or of another type; the message names it.
    """
    if isinstance(spec, Maybe):
        if value is not None:
            check(value, spec.kind, name)
    elif isinstance(spec, Kind):
        if not spec.holds(value):
            raise GradlessError(f"{name} is {shown(value)}; it must be {spec.name}.")
    elif isinstance(spec, list):
        if not isinstance(value, list):
            raise GradlessError(f"{name} is {shown(value)}; it must be a list.")
        for number, each in enumerate(value, 1):
            check(each, spec[0], f"{name}, entry {number}")
    else:
        needed = ", ".join(repr(key) for key, inner in spec.items() if not isinstance(inner, Maybe))
        if not isinstance(value, dict):
            raise GradlessError(f"{name} is {shown(value)}; it must be an object with {needed}.")
        for key, inner in spec.items():
            if key in value:
                check(value[key], inner, f"{name}, {key!r}")
            elif not isinstance(inner, Maybe):
                raise GradlessError(f"{name} has no {key!r}; it must be an object with {needed}.")


def shown(value: object) -> str:
    """A value of a row, in a few words for messages."""
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case str():
            return f"the text {value[:40]!r}" if value.strip() else "a blank text"
        case int() | float():
            return "a number"
        case list():
            return "a list" if value else "an empty list"
        case dict():
            return "an object"
    return f"of type {type(value).__name__}"
