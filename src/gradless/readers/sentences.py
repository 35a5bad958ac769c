"""Sentences about files that cannot be read."""

from __future__ import annotations

from pathlib import Path

from gradless.errors import GradlessError

SHOWN, SAID = 80, 400
"""Largest number of characters of a name, and of another library's message."""


def damaged(path: Path, what: str) -> GradlessError:
    """The error of a file that contradicts itself or its format."""
    return GradlessError(f"{path}: {what}; the file is damaged: download or convert it again.")


def truncated(path: Path, size: int, where: str) -> GradlessError:
    """The error of a file of `size` bytes that should have more."""
    return GradlessError(f"{path} is truncated: it has {size} bytes, but {where}. Download or copy it again.")


def shown(name: str) -> str:
    """A name from a file, short enough for a message."""
    return name[:SHOWN] + "…" * (len(name) > SHOWN)


def said(error: BaseException) -> str:
    """Another library's message, made printable, short and one line long."""
    text = " ".join("".join(each if each.isprintable() else " " for each in str(error)).split())
    return text[:SAID] + "…" * (len(text) > SAID) or type(error).__name__
