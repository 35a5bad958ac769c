"""What is said of a file that cannot be read."""

from __future__ import annotations

from pathlib import Path

from gradless.errors import GradlessError

SHOWN, SAID = 80, 400
"""Characters of a name, and of another library's message."""


def damaged(path: Path, what: str) -> GradlessError:
    """What to say of a file that contradicts itself or its format."""
    return GradlessError(f"{path}: {what}; the file is damaged: download or convert it again.")


def truncated(path: Path, size: int, where: str) -> GradlessError:
    """What to say of a file of `size` bytes that should have more."""
    return GradlessError(f"{path} is truncated: it has {size} bytes, but {where}. Download or copy it again.")


def shown(name: str) -> str:
    """A name out of a file, as a message may show it: short."""
    return name[:SHOWN] + "…" * (len(name) > SHOWN)


def said(error: BaseException) -> str:
    """Another library's message, as a sentence may hold it: printable, in one line, short."""
    text = " ".join("".join(each if each.isprintable() else " " for each in str(error)).split())
    return text[:SAID] + "…" * (len(text) > SAID) or type(error).__name__
