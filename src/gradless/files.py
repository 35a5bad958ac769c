"""Whole files or none: written in a private folder beside their place, flushed to the disk, then renamed. One writer at a time.

A lock tells what a killed process left behind from what a live one is writing: the kernel lifts it with the process.

    .NAME.RANDOM.tmp      a private folder in which something is being written; removed
    .NAME.RANDOM.aside    what an --overwrite moved out of the way; put back
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
except ImportError:  # not a POSIX system: nothing is locked there, and nothing is swept
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file in a run's folder that its process holds locked; it says who that is."""
WRITING, ASIDE = ".tmp", ".aside"
ABSENT = ".absent"
"""In a folder of what was set aside: the names, a line each, of what may be written meanwhile and was not there before."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the temporary path of a file, or a folder, to be made; put it in place of `path` if the block succeeds.

    The temporary lies in a folder that nobody else may enter, so that no link can be planted at its name. If the block fails,
    `path` is as it was and nothing is left behind. A link at `path` is replaced, not what it points to.

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
        # tokenizers tells of a full disk by a bare Exception
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        raise GradlessError(
            f"could not write {path}: {getattr(error, 'strerror', None) or error}; nothing was changed there. "
            "Free some space or choose another --output, then run the same command again."
        ) from error


@contextmanager
def set_aside(paths: Iterable[Path]) -> Iterator[Callable[[], None]]:
    """Move files and folders of one folder out of the way of what is written inside.

    On success, or when the block calls the yielded function, they are deleted. On failure they are put back, and what was not
    there before is removed; if the process is killed, the next `sweep` of their folder does so.

    Raises:
        GradlessError: they cannot be moved; they are where they were.
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
                doomed = folder.with_suffix(WRITING)  # from here on a sweep removes it
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
                with suppress(OSError):  # what cannot be put back now stays aside, for the next sweep
                    _put_back(folder)


@contextmanager
def _moving(folder: Path) -> Iterator[None]:
    """Say so if what a folder holds cannot be moved out of the way."""
    try:
        yield
    except OSError as error:
        raise GradlessError(
            f"what {folder} holds cannot be replaced ({error.strerror}), and nothing of it was changed; give another --output."
        ) from error


@contextmanager
def _private(parent: Path, name: str, kind: str) -> Iterator[Path]:
    """A new folder that nobody else may enter, locked as long as this process uses it; then removed, if nothing lies aside."""
    folder, handle = _locked_folder(parent, name, kind)
    try:
        yield folder
    finally:
        if kind == WRITING:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _locked_folder(parent: Path, name: str, kind: str) -> tuple[Path, int]:
    """A new folder that nobody else may enter, and its open handle, which this process holds locked."""
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
    """Lock an open file or folder unless someone holds it; whether it is ours now."""
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
    """Remove what killed processes were writing in a folder, and put back what they had set aside.

    Other processes may write in it at the same time: what they hold locked is left.
    """
    if fcntl is None:
        return
    for left in sorted(folder.glob(".*")):
        if left.suffix not in (WRITING, ASIDE) or left.is_symlink() or not left.is_dir():
            continue
        with suppress(OSError):
            if left.stat().st_uid != os.geteuid():  # nobody puts back, or has removed, what is not theirs
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
    """Put what was set aside where it was, in place of what was written since."""
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
    """Have the disk hold what was written to a file or folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold a folder for this process, and make it if it is missing; what killed processes left in it is swept first.

    Args:
        folder: of a run or an attack.
        what: "a run", say.

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
        with suppress(OSError):  # a disk that cannot be written any more: nobody holds the lock that stays
            lock.unlink(missing_ok=True)
        os.close(handle)
        if made:
            with suppress(OSError):  # it holds something now
                folder.rmdir()


def _held(lock: Path, what: str) -> int:
    """The open file of a lock that this process holds from now on."""
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        if not _lock(handle):
            holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
            os.close(handle)
            raise GradlessError(f"{lock.parent} is in use: {holder} is writing {what} there; wait, or give another --output.")
        if lock.exists() and os.path.samestat(os.fstat(handle), lock.stat()):
            break
        os.close(handle)  # its holder has removed it meanwhile
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


def cache_folder() -> Path:
    """Where this user's programs keep what they can make again; it need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gradless"


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@dataclass(frozen=True)
class Snapshot:
    """A file, or the files of a folder, as they were at one time: enough to see cheaply whether they are the same still."""

    seen: dict[Path, tuple[int, int, int, int]]

    @classmethod
    def of(cls, path: Path) -> Snapshot:
        """Look at a file or a folder, which must be there."""
        files = [path] if path.is_file() else sorted(filter(Path.is_file, path.iterdir()))
        return cls({file: _face(file) for file in files})

    def check(self) -> None:
        """Raise if a file is another one now.

        Raises:
            GradlessError: a file was replaced, changed or removed.
        """
        for file, before in self.seen.items():
            if not file.is_file() or _face(file) != before:
                raise GradlessError(
                    f"{file} was changed while it was in use, so that nothing was made from it: put back the file that the run "
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
