"""A record of the compiled kernels that passed their self-test on this machine, so that it does not run at every start.

A pass is valid for one library, the sources of this package that the test runs, one processor, and the versions of torch,
numpy, Python and the C library. If any byte of these differs, the test runs again. A failure is not recorded.
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
    """Everything on which a pass depends, one line each."""
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
    """Whether the library passed in these circumstances."""
    with contextlib.suppress(OSError, RuntimeError, UnicodeDecodeError):
        said = circumstances(library)
        return _place(said).read_text() == said
    return False


def remember(library: Path) -> None:
    """Write down that the library passed. If nothing can be written, the test runs again next time."""
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
    """The processor's own description, without values that change while it runs."""
    with contextlib.suppress(OSError):
        one = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return repr(
            [line for line in one if line.startswith(("vendor", "cpu family", "model", "stepping", "microcode", "flags"))]
        )
    return platform.processor()
