"""Dataclass fields as command line flags."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, TypeVar

from gradless.errors import GradlessError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The allowed values of a number: from `least` (exclusive if `above`) to `most`."""

    least: float
    most: float
    above: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        return self.least <= value <= self.most and not (self.above and value == self.least)

    def __str__(self) -> str:
        if self.above or (self.whole and self.least == 1):
            return f"a number above zero{', whole' * self.whole} and at most {self.most:,}"
        return f"a {'whole ' * self.whole}number from {self.least:,} {'to' if self.least else 'on, at most'} {self.most:,}"


def whole(least: int, most: int) -> Range:
    """Whole numbers."""
    return Range(least, most, whole=True)


def above_zero(most: float) -> Range:
    """Numbers above zero."""
    return Range(0, most, above=True)


def option(default: T, text: str, **more: object) -> T:
    """A dataclass field with its help text and further metadata for argparse."""
    return field(default=default, metadata={"help": text, **more})


def check_ranges(options: DataclassInstance) -> None:
    """Check every number against its option's `within`, a `Range`. None and allowed texts, such as "auto", pass.

    Raises:
        GradlessError: a number is out of range, infinite or NaN.
    """
    for each in fields(options):
        value, within = getattr(options, each.name), each.metadata.get("within")
        if (
            within is not None
            and value is not None
            and value not in within
            and not ("str" in each.type and isinstance(value, str))
        ):
            raise GradlessError(f"{each.name} is {value!r}; it must be {within}.")


def check_choices(options: object, each: Field[T]) -> None:
    """Refuse a value that is none of an option's `choices`, and an option without the one that it `needs`.

    Raises:
        GradlessError: see above.
    """
    value, choices, needs = getattr(options, each.name), _choices(each), each.metadata.get("needs")
    if choices and value not in (each.default, *choices):
        raise GradlessError(f"{each.name} is {value!r}; it can be {', '.join(map(str, choices))}.")
    if needs and value != each.default and getattr(options, needs) in (None, False):
        flag = needs.replace("_", "-")
        raise GradlessError(f"{each.name} goes with --{flag}; give it too, or leave {each.name} out.")


def check_values(options: DataclassInstance, of: Iterable[Field[T]]) -> None:
    """Refuse numbers out of range, and for the fields `of` choices that are none and options without the one they need.

    Raises:
        GradlessError: see above.
    """
    check_ranges(options)
    for each in of:
        check_choices(options, each)


def add_flags(command: argparse.ArgumentParser, options: type, names: Iterable[str] | None = None) -> None:
    """Add flags for the fields of a dataclass, or for `names` in their order. Flags that are not given are absent from the
    result."""
    known = {each.name: each for each in fields(options)}
    for each in map(known.__getitem__, known if names is None else names):
        text, flag = each.metadata["help"], "--" + each.name.replace("_", "-")
        if each.default is not None and each.default is not False:
            text += f" (default: {each.default})"
        if each.type == "bool":
            command.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        else:
            kind = next(kind for kind in (int, float, str) if kind.__name__ in str(each.type))
            command.add_argument(
                flag,
                type=each.metadata.get("parse", kind),
                default=argparse.SUPPRESS,
                choices=_choices(each),
                metavar=each.metadata.get("metavar", None if "choices" in each.metadata else "N"),
                help=text,
            )


def _choices(each: Field[T]) -> list[object] | None:
    """What a flag can be: the option's choices, and its default text if that is none of them."""
    choices = each.metadata.get("choices")
    if choices is None:
        return None
    own = [each.default] if isinstance(each.default, str) and each.default not in choices else []
    return [*own, *choices]
