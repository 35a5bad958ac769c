"""Fields of a dataclass that are flags of a command."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import field, fields
from typing import Any


def option(default: Any, text: str, **more: Any) -> Any:
    """A dataclass field with its help text and what argparse should know of it."""
    return field(default=default, metadata={"help": text, **more})


def add_flags(command: argparse.ArgumentParser, options: type, names: Collection[str] | None = None) -> None:
    """Flags for the fields of a dataclass, or for the named ones; absent flags stay absent in what argparse returns."""
    for each in fields(options):
        if names is not None and each.name not in names:
            continue
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
                choices=each.metadata.get("choices"),
                metavar=each.metadata.get("metavar", None if "choices" in each.metadata else "N"),
                help=text,
            )
