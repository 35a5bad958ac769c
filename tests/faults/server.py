"""A process that imports everything once, then forks for every command: a run with a fault in it takes a second, not ten.

`Server` starts it with the shim before libc (shim.c), and asks it over its standard input and output, a JSON line each.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE = 300.0
"""Seconds after which a command hangs."""


class Way(IntEnum):
    """What goes wrong at a call; the shim's `enum way`."""

    COUNT = 0  # nothing: calls are only counted
    ONCE = 1  # this call fails
    FULL = 2  # the disk is full from here on: a write is cut short, what needs space fails, renaming and removing do not
    GONE = 3  # the disk is read-only from here on
    KILL = 4  # the process is killed before the call
    TORN = 5  # and half of what it writes is on the disk


@dataclass(frozen=True)
class Outcome:
    """What became of a command.

    Attributes:
        status: its exit status; minus the number of the signal that ended it.
        said: what it wrote on standard error.
        calls: (kind, path) of every call that would change a file in the folder watched.
        seconds: it took.
    """

    status: int
    said: str
    calls: list[tuple[str, str]]
    seconds: float

    @property
    def killed(self) -> bool:
        return self.status < 0


def compiled(folder: Path) -> Path | None:
    """The shim as a library; None if there is no C compiler, or no Linux."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or not sys.platform.startswith("linux"):
        return None
    library = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-w", "-o", library, source, "-ldl"], check=True)
    return library


class Server:
    """The forking process, as its client sees it.

    Args:
        shim: see `compiled`.
        folder: the process's current folder.
    """

    def __init__(self, shim: Path, folder: Path) -> None:
        more = {"LD_PRELOAD": str(shim), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        more |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
        more |= {"XDG_CACHE_HOME": str(folder / "cache")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env={**os.environ, **more},
            text=True,
        )

    def warm(self, arguments: list[str]) -> None:
        """Run a command in the process itself, so that its children find in memory what every run makes first."""
        self._ask(warm=arguments)

    def run(self, arguments: list[str], watched: Path | None = None, way: Way = Way.COUNT, at: int = 0) -> Outcome:
        """Run a command in a child.

        Args:
            arguments: after `gradless`.
            watched: the folder in which a call goes wrong; None for none.
            way: what goes wrong.
            at: which call does, from 0.
        """
        return self._outcome(arguments=arguments, watched=str(watched or ""), way=int(way), at=at)

    def kill(self, arguments: list[str], after: float, number: signal.Signals = signal.SIGKILL) -> Outcome:
        """Run a command in a child, and send it a signal after so many seconds."""
        return self._outcome(arguments=arguments, after=after, signal=int(number))

    def _outcome(self, **request: Any) -> Outcome:
        answer = self._ask(**request)
        outcome = Outcome(answer["status"], answer["said"], [(kind, path) for kind, path in answer["calls"]], answer["seconds"])
        if outcome.status == -signal.SIGALRM:
            raise TimeoutError(f"{request} hangs")
        return outcome

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps(request), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the forking process ended with {self.process.wait()}")
        found: dict[str, Any] = json.loads(answer)
        return found


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a command prints is no answer
    shim = ctypes.CDLL(None)
    shim.faults_trace.restype = ctypes.c_char_p
    sys.path.insert(0, os.getcwd())
    for line in sys.stdin:
        request = json.loads(line)
        if "warm" in request:
            status = _command(request["warm"])
            assert status == 0, request["warm"]
            gc.collect()
            gc.freeze()
            print("{}", file=answers, flush=True)
            continue
        with tempfile.TemporaryFile() as said:
            began = time.monotonic()
            shim.faults_arm(b"", 0, 0)
            child = os.fork()
            if child == 0:
                os.dup2(said.fileno(), 2)
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                shim.faults_arm(request.get("watched", "").encode(), request.get("way", 0), request.get("at", 0))
                status = 99
                with contextlib.suppress(SystemExit):
                    status = _command(request["arguments"])
                sys.stderr.flush()
                os._exit(status)
            if "after" in request and not _ended(child, began + request["after"]):
                os.kill(child, request["signal"])
            if not _ended(child, began + PATIENCE):
                os.kill(child, signal.SIGALRM)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            calls = [line.split(" ", 1) for line in shim.faults_trace().decode().splitlines()]
            said.seek(0)
            answer = {"status": status, "said": said.read().decode(), "calls": calls, "seconds": time.monotonic() - began}
        print(json.dumps(answer), file=answers, flush=True)


def _ended(child: int, deadline: float) -> bool:
    """Wait for a child until a moment of the monotonic clock; whether it has ended."""
    while time.monotonic() < deadline:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return True
        time.sleep(0.002)
    return False


def _command(arguments: list[str]) -> int:
    """`gradless` with these arguments; a traceback that it lets out is printed as Python would."""
    from gradless.cli import main

    try:
        return main(arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        return 70


if __name__ == "__main__":
    serve()
