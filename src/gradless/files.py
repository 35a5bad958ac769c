"""Whole files or none: written under a temporary name, flushed to the disk, then renamed."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gradless.errors import GradlessError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; put it in place when the block succeeds, remove it when it fails.

    Raises:
        GradlessError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise GradlessError(
            f"could not write {path}: {error.strerror or error}; nothing was changed there. "
            "Free some space or choose another --output, then run the same command again."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield the temporary path of a folder to be made; put it in place of `path` when the block succeeds, else remove it.

    Raises:
        GradlessError: the disk is full or the folder cannot be written; `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        with set_aside([path]):
            temporary.replace(path)
    except OSError as error:
        raise GradlessError(f"could not write {path}: {error}; nothing was changed there.") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def set_aside(paths: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Move files and folders out of the way of what is written inside. They are removed when the block succeeds, or calls
    what is yielded; if it fails before, they are put back in place of what it wrote."""
    moved: dict[Path, Path] = {}

    def drop() -> None:
        for aside in moved.values():
            _remove(aside)
        moved.clear()

    try:
        for path in filter(Path.exists, paths):
            aside = path.with_name(f".{path.name}.{os.getpid()}.aside")
            path.replace(aside)
            moved[path] = aside
        yield drop
        drop()
    finally:
        for path, aside in moved.items():
            _remove(path)
            aside.replace(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def claim(output: Path, what: str, *, held: bool, resume: bool, overwrite: bool) -> None:
    """Refuse an output folder that holds something, unless told what to do with it.

    Args:
        output: the folder.
        what: "a run", say.
        held: whether it holds one.
        resume: the user wants to go on with it.
        overwrite: the user wants it replaced.

    Raises:
        GradlessError: what is held and what is wanted do not go together.
    """
    if output.exists() and not output.is_dir():
        raise GradlessError(f"{output} is a file; give --output a folder.")
    if resume and overwrite:
        raise GradlessError("--resume and --overwrite contradict each other; give one.")
    if held and not (resume or overwrite):
        raise GradlessError(
            f"{output} holds {what}; give --resume to go on with it, --overwrite to replace it, or another --output."
        )
    if resume and not held:
        raise GradlessError(f"{output} holds no {what.split()[-1]} to resume; leave --resume out to start one.")


def covers(target: Path, source: Path) -> bool:
    """Whether writing `target` would replace `source`: it is that path, or a folder around it."""
    return target.resolve() in (source.resolve(), *source.resolve().parents)


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
