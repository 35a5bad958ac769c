"""Files are written whole or not at all: in a private folder beside their place, flushed to the disk, then renamed.

A folder has one writer at a time. A lock tells the leftovers of a killed process from the work of a live one, because the
kernel releases it with the process. The next start in a folder cleans up:

    .NAME.RANDOM.tmp      a private folder for files that are being written; removed
    .NAME.RANDOM.aside    files that --overwrite moved out of the way; put back
"""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from gradless.errors import GradlessError

try:
    import fcntl
except ImportError:  # not a POSIX system: no locks and no sweep there
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in a run's folder that the writing process locks; it names that process."""
WRITING, ASIDE = ".tmp", ".aside"
ABSENT = ".absent"
"""A file in an .aside folder: the names, one a line, that did not exist before and may be written meanwhile."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file or folder, and move it to `path` if the block succeeds.

    Nobody else may enter the folder of the temporary path, so no link can be planted at its name. If the block fails, `path` is
    unchanged and nothing is left behind. A link at `path` is replaced, not its target.

    Raises:
        GradlessError: the disk is full or cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        with _private(path.parent, path.name, WRITING) as folder:
            temporary = folder / path.name
            yield temporary
            for written in [temporary, *temporary.rglob("*")]:
                _flush(written)
            with set_aside([path] if path.is_dir() and not path.is_symlink() else []):
                temporary.replace(path)
        _flush(path.parent)
    except Exception as error:
        # tokenizers raises a bare Exception if the disk is full
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise GradlessError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}; nothing was changed there. "
            "Free some space or choose another --output, then run the same command again."
        ) from error


@contextmanager
def set_aside(paths: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Move files and folders of one folder out of the way while the block writes new ones.

    On success, or when the block calls the yielded function, the originals are deleted. On failure they are put back and new
    files are removed. If the process is killed, the next `sweep` of the folder does this.

    Raises:
        GradlessError: the originals cannot be moved; they stay in place.
    """
    named = list(paths)
    present = [path for path in named if os.path.lexists(path)]
    if not present:
        yield lambda: None
        return
    with ExitStack() as stack:
        with _moving(present[0].parent):
            folder = stack.enter_context(_private(present[0].parent, "old", ASIDE))
            try:
                (folder / ABSENT).write_text("".join(f"{path.name}\n" for path in named if path not in present))
            except OSError:
                shutil.rmtree(folder, ignore_errors=True)  # nothing lies aside yet
                raise

        def drop() -> None:
            if folder.exists():
                doomed = folder.with_suffix(WRITING)  # now a sweep removes it
                with _moving(folder.parent):
                    folder.replace(doomed)
                shutil.rmtree(doomed, ignore_errors=True)

        try:
            with _moving(folder.parent):
                for path in present:
                    path.replace(folder / path.name)
            yield drop
            drop()
        finally:
            if folder.exists():
                with suppress(OSError):  # the next sweep tries again
                    _put_back(folder)


@contextmanager
def _moving(folder: Path) -> Iterator[None]:
    """Turn an error of moving files in `folder` into a sentence."""
    try:
        yield
    except OSError as error:
        raise GradlessError(
            f"the content of {folder} cannot be replaced ({error.strerror}); nothing was changed there. Give another --output."
        ) from error


@contextmanager
def _private(parent: Path, name: str, kind: str) -> Iterator[Path]:
    """A new folder that nobody else may enter, locked inside the block. A `WRITING` folder is removed afterwards."""
    folder, handle = _locked_folder(parent, name, kind)
    try:
        yield folder
    finally:
        if kind == WRITING:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked_folder(parent: Path, name: str, kind: str) -> tuple[Path, int]:
    """A new folder that nobody else may enter, and its open, locked handle."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=kind, dir=parent))
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:  # a sweep came before the lock
            continue
        if _lock(handle) and folder.exists():
            return folder, handle
        os.close(handle)


def _lock(handle: int) -> bool:
    """Try to lock an open file or folder. Returns whether this process holds it now."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


def sweep(folder: Path) -> None:
    """Remove the unfinished files of killed processes in a folder, and put back what they had set aside.

    Folders that a live process has locked are left alone.
    """
    if fcntl is None:
        return
    for left in sorted(folder.glob(".*")):
        if left.suffix not in (WRITING, ASIDE) or left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):
            if left.stat().st_uid != os.geteuid():  # only one's own files are put back or removed
                continue
            handle = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if left.suffix == ASIDE:
                    _put_back(left)
                else:
                    shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(handle)


def _put_back(aside: Path) -> None:
    """Put the originals back in place of the files written since."""
    absent = aside / ABSENT
    if absent.exists():
        for line in absent.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                remove(aside.parent / Path(line.strip()).name)
        absent.unlink()
    for path in sorted(aside.iterdir()):
        place = aside.parent / path.name
        remove(place)
        path.replace(place)
    aside.rmdir()


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Flush a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Lock a folder for this process, after a sweep. A missing folder is made.

    Args:
        folder: of a run or an attack.
        what: the folder's content in messages, such as "a run".

    Raises:
        GradlessError: another process holds it, or it cannot be written.
    """
    if folder.exists() and not folder.is_dir():
        raise GradlessError(f"{folder} is a file; give --output a folder.")
    made = not folder.exists()
    lock = folder / LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = _held(lock, what)
    except OSError as error:
        if made:
            with suppress(OSError):
                folder.rmdir()
        raise GradlessError(f"{folder} cannot be written ({error.strerror}); give another --output.") from error
    try:
        sweep(folder)
        yield
    finally:
        with suppress(OSError):  # if the disk is read-only now, the file stays, but unlocked
            lock.unlink(missing_ok=True)
        os.close(handle)
        if made:
            with suppress(OSError):  # fails if it has content now
                folder.rmdir()


def _held(lock: Path, what: str) -> int:
    """Lock the lock file and return its open handle."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        if not _lock(handle):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise GradlessError(f"{lock.parent} is in use: {holder} is writing {what} there; wait, or give another --output.")
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            break
        os.close(handle)  # its holder has removed it in the meantime
    try:
        os.ftruncate(handle, 0)
        os.pwrite(
            handle, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')},".encode(), 0
        )
    except OSError:
        with suppress(OSError):
            lock.unlink()
        os.close(handle)
        raise
    return handle


def claim(output: Path, what: str, *, held: bool, resume: bool, overwrite: bool) -> None:
    """Refuse a used output folder, unless the user resumes or overwrites it.

    Args:
        output: the folder.
        what: its content in messages, such as "a run".
        held: whether it has such content.
        resume: the user wants to go on with it.
        overwrite: the user wants to replace it.

    Raises:
        GradlessError: the folder's content and the user's wish contradict each other.
    """
    if resume and overwrite:
        raise GradlessError("--resume and --overwrite contradict each other; give one.")
    if held and not (resume or overwrite):
        raise GradlessError(
            f"{output} holds {what}; give --resume to go on with it, --overwrite to replace it, or another --output."
        )
    if resume and not held:
        raise GradlessError(f"{output} holds no {what.split()[-1]} to resume; leave --resume out to start one.")


def covers(target: Path, source: Path) -> bool:
    """Whether writing `target` would replace `source`: they are the same path, or `target` is a folder around it."""
    return target.resolve() in (source.resolve(), *source.resolve().parents)


def cache_folder() -> Path:
    """The folder of gradless in the user's cache directory; it may not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradless"


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@dataclass(frozen=True)
class Snapshot:
    """Device, inode, size and time of a file, or of a folder's files: a cheap check whether they have changed."""

    seen: dict[Path, tuple[int, int, int, int]]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """The snapshot of an existing file or folder."""
        files = [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir()))
        return cls({file: _face(file) for file in files})

    def check(self) -> None:
        """Compare with the files as they are now.

        Raises:
            GradlessError: a file was replaced, changed or removed.
        """
        for file, before in self.seen.items():
            if not file.is_file() or _face(file) != before:
                raise GradlessError(
                    f"{file} was changed while it was in use, so nothing was made from it: put back the file that the run "
                    "began with, then run the same command with --resume."
                )


def _face(file: Path) -> tuple[int, int, int, int]:
    seen = file.stat()
    return seen.st_dev, seen.st_ino, seen.st_size, seen.st_mtime_ns


def checksums(path: Path) -> dict[str, str]:
    """The SHA-256 of a file, or of every file in a folder, by its path from the folder of `path`."""
    files = [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*")))
    return {str(file.relative_to(path.parent)): sha256(file) for file in files}


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
