"""Which compiled kernels passed their self-test here before, so that it need not run at every start.

A pass is remembered for one library, this package's meaning of it (the sources that the test runs), one processor and the
versions of what lies between: where a byte of any of these differs, nothing is known. A failure is not remembered.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from gradless.errors import GradlessError
from gradless.files import cache_folder, write_text

FOLDER = "self-test"
_PROCESSOR = ("vendor", "cpu family", "model", "stepping", "microcode", "flags")
_PACKAGE = Path(__file__).parents[1]


def circumstances(library: Path) -> str:
    """What a pass is remembered for, a line each."""
    sources = [*_PACKAGE.glob("*.py"), *_PACKAGE.glob("*.npy"), *(_PACKAGE / "kernels").rglob("*.py")]
    return "\n".join(
        (
            f"library {_hash([library])}",
            f"sources {_hash(sorted(sources))}",
            f"torch {torch.__version__} {torch.__config__.show()!r}",
            f"numpy {np.__version__}, python {sys.version!r}, {platform.platform()}, {platform.libc_ver()}",
            f"processor {torch.backends.cpu.get_cpu_capability()} {_processor()}",
            "",
        )
    )


def passed(library: Path) -> bool:
    """Whether the library passed in just these circumstances."""
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        said = circumstances(library)
        return _place(said).read_text() == said
    return False


def remember(library: Path) -> None:
    """Write down that the library passed; where nothing can be written, it is tried again next time."""
    with contextlib.suppress(OSError, RuntimeError, GradlessError):
        said = circumstances(library)
        write_text(_place(said), said)


def _place(said: str) -> Path:
    return cache_folder() / FOLDER / hashlib.sha256(said.encode()).hexdigest()


def _hash(files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in files:
        found.update(f"{file.name} {file.stat().st_size}\n".encode())
        found.update(file.read_bytes())
    return found.hexdigest()


def _processor() -> str:
    """The processor's own description, without what changes while it runs."""
    with contextlib.suppress(OSError):
        one = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return repr(
            [line for line in one if line.startswith(("vendor", "cpu family", "model", "stepping", "microcode", "flags"))]
        )
    return platform.processor()
