"""The fuzzer: mutated files through the parsers and through whole loads.

    python -m tests.fuzz.run --files 100000 --loads 5000 --seed 0

Every file is made from the seed and its own number, so `--only N` makes one again. A file passes if it is read, or is refused
as a `GradlessError`, within two seconds of processor time and 64 MB of memory beside twice its size. Files are tried in a child
process, so that one that ends the process is found too.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from gradless.errors import GradlessError
from tests.fuzz import targets

SECONDS, SPARE = 2.0, 64 << 20
CHILDS = 500
"""Files that one child tries."""


class Hang(BaseException):
    """A file took too long."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` in what takes more processor time."""

    def stop(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def resident(*, peak: bool) -> int:
    """Bytes of this process in memory now, or at most since `forget_peak`."""
    name = "VmHWM:" if peak else "VmRSS:"
    return next(
        int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    )


def forget_peak() -> None:
    """Begin the peak of resident memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def tried(read: Callable[[], object], size: int) -> tuple[str, str, float, int]:
    """What came of reading a file: "read", "refused" or a fault, its sentence or traceback, processor seconds and bytes."""
    forget_peak()
    before, began = resident(peak=False), time.process_time()
    outcome, said = "read", ""
    try:
        with limited(SECONDS):
            read()
    except GradlessError as error:
        outcome, said = "refused", str(error)
        if "\n" in said.strip() or not said.isprintable():
            outcome = "more than a sentence"
    except Hang:
        outcome, said = "hang", traceback.format_exc()
    except BaseException as error:
        outcome, said = type(error).__name__, traceback.format_exc()
        if isinstance(error, KeyboardInterrupt):
            raise
    seconds, held = time.process_time() - began, resident(peak=True) - before
    if outcome in ("read", "refused") and held > SPARE + 2 * size:
        outcome = "memory"
    return outcome, said, seconds, held


def run(target: targets.Target, numbers: range, seed: int, keep: Path | None = None) -> tuple[Counter[str], float, int]:
    """Try the files of these numbers; prints each fault. Returns outcomes, the most processor seconds and the most bytes."""
    outcomes, longest, most = Counter[str](), 0.0, 0
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        folder = Path(name)
        for number in numbers:
            random = Random(f"{seed} {target.name} {number}")
            path = target.make(folder, random)
            size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            outcome, said, seconds, held = tried(lambda path=path: target.read(path), size)
            outcomes[outcome] += 1
            longest, most = max(longest, seconds), max(most, held - 2 * size)
            if outcome not in ("read", "refused"):
                what = f"{target.name} {number}: {outcome}, {seconds:.1f} s, {held >> 20} MB for a file of {size} bytes"
                print(f"{what}\n{said}", flush=True)
                if keep is not None:
                    shutil.copytree(folder, keep / f"{target.name}-{number}", dirs_exist_ok=True)
            for file in folder.iterdir():
                shutil.rmtree(file) if file.is_dir() else file.unlink()
    return outcomes, longest, most


def in_child(target: targets.Target, numbers: range, seed: int, keep: Path | None) -> tuple[Counter[str], float, int]:
    """As `run`, in a process of its own: a file that ends it is a fault like others."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        outcomes, longest, most = run(target, numbers, seed, keep)
        with os.fdopen(write, "w") as pipe:
            json.dump((outcomes, longest, most), pipe)
        sys.stdout.flush()
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if said:
        outcomes, longest, most = json.loads(said)
        return Counter(outcomes), longest, most
    if len(numbers) == 1:
        print(f"{target.name} {numbers[0]}: ended the process, status {status}", flush=True)
        return Counter({"ended the process": 1}), 0.0, 0
    total, longest, most = Counter[str](), 0.0, 0
    middle = numbers.start + len(numbers) // 2
    for half in (range(numbers.start, middle), range(middle, numbers.stop)):
        more, took, held = in_child(target, half, seed, keep)
        total, longest, most = total + more, max(longest, took), max(most, held)
    return total, longest, most


def main() -> int:
    """Parse the command line, try the files, print the figures; 1 where there was a fault."""
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=0, help="Through the parsers.")
    parser.add_argument("--loads", type=int, default=0, help="Through whole loads.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="One target only: " + ", ".join((*targets.PARSERS, *targets.LOADS)))
    parser.add_argument("--only", type=int, help="The file of this number only.")
    parser.add_argument("--keep", type=Path, help="A folder for copies of files with a fault.")
    asked = parser.parse_args()
    total, began, faults = Counter[str](), time.perf_counter(), 0
    for count, named in ((asked.files, targets.PARSERS), (asked.loads, targets.LOADS)):
        chosen = {name: make for name, make in named.items() if count and asked.target in (None, name)}
        for name, make in chosen.items():
            target = make()
            share = -(-count // len(chosen))
            numbers = range(share) if asked.only is None else range(asked.only, asked.only + 1)
            outcomes, longest, most = Counter[str](), 0.0, 0
            for start in range(numbers.start, numbers.stop, CHILDS):
                more, took, held = in_child(target, range(start, min(start + CHILDS, numbers.stop)), asked.seed, asked.keep)
                outcomes, longest, most = outcomes + more, max(longest, took), max(most, held)
            total += outcomes
            shown = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
            print(
                f"{name:12} {sum(outcomes.values()):7} files: {shown}; at most {longest:.2f} s, {most / 1e6:.1f} MB", flush=True
            )
    faults = sum(n for outcome, n in total.items() if outcome not in ("read", "refused"))
    print(f"{sum(total.values())} files, {faults} faults, {time.perf_counter() - began:.0f} s, seed {asked.seed}")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
