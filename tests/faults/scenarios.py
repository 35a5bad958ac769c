"""What is disturbed: commands, the folder that each works in, and what must come of it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import signal
import sqlite3
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gradless.attacks.log import ANSWER
from gradless.attacks.oracle import TRIED
from gradless.files import ASIDE, LOCK, WRITING
from tests.faults.server import Outcome, Server, Way
from tests.tiny import tiny_data, tiny_gguf

METHODS = ("qzo", "nzo", "ezo", "quzo", "zoqo", "mezo", "lora", "bits")
"""Every method, an adapter, and a base that the run itself quantizes."""
VICTIM = """\
import numpy as np
weight = np.load("weight.npy")
def predict(batch):
    return batch.numpy().reshape(len(batch), -1) @ weight.T
"""
STOPPED = 130
"""The exit status of a run that was told to stop."""
SPACE, WRITES = ("create", "mkdir", "write"), ("write",)
STILL = ("lock", "flush", "map", "open")
"""Calls after which the folder is as it was before them."""

Tree = dict[str, Any]
"""The files and folders under a folder by their names, each as what it says: without times, and without where SQLite put it."""


@dataclass(frozen=True)
class Scenario:
    """A command that is disturbed.

    Attributes:
        name: of it.
        command: after `gradless`.
        folder: what it works in; nothing else may change.
        before: what lies there before; None for nothing.
        replaces: it gives --overwrite.
        plain: what makes the same from nothing, undisturbed.
    """

    name: str
    command: list[str]
    folder: Path
    before: Path | None = None
    replaces: bool = False
    plain: list[str] = field(default_factory=list)

    def set_up(self) -> None:
        """Make the folder as it is before the command."""
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.before is None:
            self.folder.mkdir(parents=True)
        else:
            shutil.copytree(self.before, self.folder, symlinks=True)


class Lost(AssertionError):
    """What a fault left is neither as before, nor complete, nor can it be resumed; or nothing says so in a sentence."""


@dataclass
class Trial:
    """A scenario, its undisturbed end, and what faults do to it.

    Attributes:
        calls: (kind, path) of each call of the undisturbed command that may change something.
        states: how many different folders the faults left; each was recovered.
    """

    scenario: Scenario
    server: Server

    def __post_init__(self) -> None:
        one = self.scenario
        one.set_up()
        self.begun = tree(one.folder)
        first = self._undisturbed(one.command)
        self.calls, self.seconds = first.calls, first.seconds
        self.ended = tree(one.folder)
        one.set_up()
        self._undisturbed(one.command)
        _same(tree(one.folder), self.ended, "two undisturbed commands differ")
        if one.plain:
            shutil.rmtree(one.folder)
            one.folder.mkdir()
            self._undisturbed(one.plain)
            _same(tree(one.folder), self.ended, "it differs from one that was never disturbed")
        self._recovered: set[str] = set()

    @property
    def states(self) -> int:
        return len(self._recovered)

    def points(self, way: Way) -> Iterator[int]:
        """The calls at which something can go wrong in this way, and differently than at the call before."""
        for at, (kind, _) in enumerate(self.calls):
            if way == Way.FULL and kind not in SPACE:
                continue
            if way == Way.GONE and kind == "lock":
                continue
            if way == Way.TORN and kind not in WRITES:
                continue
            if way == Way.KILL and at and self.calls[at - 1][0] in STILL:
                continue
            yield at

    def fault(self, way: Way, at: int) -> None:
        """Let one call go wrong; look at what is left, and recover.

        Raises:
            Lost: see there.
        """
        self.scenario.set_up()
        outcome = self.server.run(self.scenario.command, self.scenario.folder, way, at)
        removing = way == Way.GONE or (way == Way.ONCE and outcome.calls[at : at + 1] and outcome.calls[at][0] == "unlink")
        self._judge(outcome, may_leave_temporaries=outcome.killed or bool(removing))

    def kill(self, *moments: float, number: signal.Signals = signal.SIGKILL) -> int:
        """Kill the command after so many seconds, then its resumption, and so on; recover. How many were killed.

        Raises:
            Lost: see there.
        """
        self.scenario.set_up()
        killed, command = 0, self.scenario.command
        for moment in moments:
            outcome = self.server.kill(command, moment, number)
            killed += outcome.killed or outcome.status == STOPPED
            if not outcome.killed and "leave --resume out" not in outcome.said:
                break
            command = [*self.scenario.command, "--resume"]
        self._judge(outcome, may_leave_temporaries=True)
        return killed

    def _undisturbed(self, command: list[str]) -> Outcome:
        outcome = self.server.run(command, self.scenario.folder)
        if outcome.status != 0:
            raise Lost(f"undisturbed, {command} says: {outcome.said}")
        return outcome

    def _judge(self, outcome: Outcome, *, may_leave_temporaries: bool) -> None:
        left = tree(self.scenario.folder)
        if not outcome.killed:
            _check_sentence(outcome)
            if outcome.status == 0:
                _same({k: v for k, v in left.items() if not (may_leave_temporaries and _temporary(k))}, self.ended, "it ended")
        if not may_leave_temporaries and (stale := [name for name in left if _temporary(name) and name not in self.begun]):
            raise Lost(f"{stale[0]} is left, and the process lived to remove it; it said: {outcome.said}")
        for name, content in left.items():
            if name in self.ended and not name.endswith(".db") and content not in (self.ended[name], self.begun.get(name)):
                raise Lost(f"{name} is there, and neither as before nor complete")
        state = _state(self.scenario.folder, left)
        if state not in self._recovered:
            self._recover()
            self._recovered.add(state)

    def _recover(self) -> None:
        """Do what the messages say until the command has done its work; compare what is there then."""
        one = self.scenario
        if one.replaces and self.begun:
            with _copied(one.folder):
                self._old_or_new()
        command = one.command
        outcome = self.server.run(command)
        if outcome.status == 1 and "--resume" in outcome.said and "--resume" not in command:
            outcome = self.server.run([*command, "--resume"])
        elif outcome.status == 1 and "--overwrite" in outcome.said and "--overwrite" not in command:
            _same(tree(one.folder), self.ended, "it says that its work is done")
            outcome = self.server.run([*command, "--overwrite"])
        if outcome.status != 0:
            raise Lost(f"it can neither be begun nor resumed: {outcome.said}")
        _same(tree(one.folder), self.ended, "it was recovered")

    def _old_or_new(self) -> None:
        """What was to be replaced is there as it was, or the new one can be resumed."""
        command = [each for each in self.scenario.command if each != "--overwrite"]
        outcome = self.server.run([*command, "--resume"] if command[0] in ("tune", "attack") else command)
        expected = self.ended if outcome.status == 0 else self.begun
        found = tree(self.scenario.folder)
        if outcome.status != 0:  # a command that is refused need not clean up
            found = {name: content for name, content in found.items() if not _temporary(name)}
        if found != expected and command[0] not in ("tune", "attack"):
            expected = self.ended
        _same(found, expected, f"after an --overwrite and then the command without it ({outcome.said.strip()})")


def _check_sentence(outcome: Outcome) -> None:
    """A failure is one sentence, and exit status 1."""
    said = outcome.said.strip()
    if outcome.status not in (0, 1, STOPPED) or "Traceback" in said:
        raise Lost(f"exit status {outcome.status}: {said[-2000:]}")
    if outcome.status == 1 and (not said.startswith("gradless: ") or len(said.splitlines()) != 1):
        raise Lost(f"not one sentence: {said}")
    if "please report" in said:
        raise Lost(f"nobody thought of it: {said}")


def _temporary(name: str) -> bool:
    return any(part == LOCK or (part.startswith(".") and part.endswith((WRITING, ASIDE))) for part in Path(name).parts)


def _same(found: Tree, expected: Tree, when: str) -> None:
    for name in sorted({*found, *expected}):
        if found.get(name) != expected.get(name):
            what = "differs" if name in found and name in expected else "is missing" if name in expected else "is there"
            raise Lost(f"{when}: {name} {what}: {str(found.get(name))[:600]} | {str(expected.get(name))[:600]}")


# -- what a folder holds --------------------------------------------------------------------------------------------------


def tree(folder: Path) -> Tree:
    """What a folder holds; see `Tree`."""
    found: Tree = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = path.readlink()
        else:
            found[name] = _content(path) if path.is_file() else "a folder"
    for name in [name for name in found if name.endswith((".db-wal", ".db-shm", ".db-journal"))]:
        if name.rpartition("-")[0] in found:
            del found[name]  # its database was read with it
    return found


def _content(path: Path) -> Any:
    if path.suffix == ".db":
        return _rows(path)
    if path.name == LOCK:
        return "a lock"
    raw = path.read_bytes()
    if path.name.endswith((".db-wal", ".db-shm", ".db-journal")):
        return len(raw)
    if path.name == "README.md":
        raw = re.sub(rb"skipped\), \d+ s", b"skipped)", raw)
    if path.name == "summary.json":
        with contextlib.suppress(ValueError):
            return _timeless(json.loads(raw))
    if path.name == "loss.png":  # its points are the journal's; which codes moved in a step is not noted if a kill came between
        raw = raw[-12:]
    return f"{len(raw)} bytes, SHA-256 {hashlib.sha256(raw).hexdigest()}"


def _rows(path: Path) -> Any:
    """The tables of a database, read from a copy; None if there are none, and its bytes if it cannot be read."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for suffix in ("", "-wal", "-journal"):
            if (source := path.with_name(path.name + suffix)).exists():
                shutil.copyfile(source, copy.with_name(copy.name + suffix))
        connection = sqlite3.connect(copy)
        try:
            names = [
                name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
            ]
            tables = {}
            for name in names:
                rows = connection.execute(f"SELECT * FROM {name}")
                columns = [column[0] for column in rows.description]
                tables[name] = [
                    {k: _plain(v) for k, v in zip(columns, row, strict=True) if k not in ("seconds", "moved")} for row in rows
                ]
            if "calls" in tables:
                tables["calls"] = _answers(tables["calls"])
            return tables or None
        except sqlite3.DatabaseError:
            return path.read_bytes()
        finally:
            connection.close()


def _answers(calls: list[dict[str, Any]]) -> list[Any]:
    """What a log of queries holds, but for the input that was asked again: after a fault that is another one."""
    answers = np.concatenate([np.frombuffer(call["answers"], ANSWER) for call in calls] or [np.empty(0, ANSWER)])
    held: list[Any] = answers[~np.isin(answers["input"], TRIED)].tolist()
    return held


def _plain(value: Any) -> Any:
    with contextlib.suppress(ValueError, TypeError):
        return _timeless(json.loads(value))
    return value


def _timeless(value: Any) -> Any:
    return {k: v for k, v in value.items() if k != "seconds"} if isinstance(value, dict) else value


def _state(folder: Path, left: Tree) -> str:
    """What tells one folder that a fault left from another: what it says, and where SQLite put it."""
    sizes = [
        (str(path.relative_to(folder)), path.stat().st_size)
        for path in sorted(folder.rglob("*"))
        if ".db" in path.name and path.is_file()
    ]
    return re.sub(r"\.[^./']+\.(tmp|aside)", r".\1", repr((sizes, left)))


@contextlib.contextmanager
def _copied(folder: Path) -> Iterator[None]:
    """Put a folder back as it was after what is done to it inside."""
    with tempfile.TemporaryDirectory() as spare:
        shutil.copytree(folder, Path(spare) / "copy", symlinks=True)
        yield
        shutil.rmtree(folder)
        shutil.copytree(Path(spare) / "copy", folder, symlinks=True)


# -- the scenarios --------------------------------------------------------------------------------------------------------


class Materials:
    """A tiny model, quantized and dense, its rows, images and a model to attack; scenarios over them.

    Args:
        folder: an empty one, the current folder of the server.
    """

    def __init__(self, folder: Path, server: Server) -> None:
        self.folder, self.server = folder, server
        self.work = folder / "work"
        self.base, self.rows, self.dense = folder / "base.gguf", folder / "rows.tsv", folder / "dense"
        rng = np.random.default_rng(0)
        weight = rng.standard_normal((4, 27)).astype(np.float32)
        images = rng.integers(0, 256, (4, 3, 3, 3), dtype=np.uint8)
        np.save(folder / "weight.npy", weight)
        np.savez(folder / "images.npz", images=images, labels=(images.reshape(4, -1) / 255 @ weight.T).argmax(1))
        (folder / "victim.py").write_text(VICTIM)

    def models(self) -> None:
        """Make the models, and what every run makes first."""
        tiny_gguf(self.base)
        tiny_data(self.rows)
        self.server.warm(["dequantize", str(self.base), "--output", str(self.dense)])
        self.server.warm(self.tune("qzo", self.folder / "warm"))

    def tune(self, method: str, output: Path, *more: str) -> list[str]:
        """The command of a run of two steps."""
        given = {
            "mezo": [str(self.dense), "--method", "mezo"],
            "lora": [str(self.dense), "--method", "zoqo", "--lora", "8"],
            "bits": [str(self.dense), "--method", "zoqo", "--bits", "4"],
        }.get(method, [str(self.base), "--method", method])
        task = ["--template", "{text} is\\n", "--labels", "0=n,1=y", "--eval", str(self.rows), "--eval-rows", "4"]
        sizes = ["--batch-size", "4", "--steps", "2", "--threads", "1"]
        return ["tune", given[0], str(self.rows), *given[1:], *task, *sizes, "--output", str(output), "--json", *more]

    def run(self, method: str) -> Scenario:
        return Scenario(f"tune {method}", self.tune(method, self.work / "run"), self.work)

    def overwrite(self) -> Scenario:
        before = self._made("old", lambda output: self.tune("quzo", output / "run", "--seed", "1"))
        plain = self.tune("qzo", self.work / "run")
        return Scenario("tune --overwrite", [*plain, "--overwrite"], self.work, before, replaces=True, plain=plain)

    def resume(self) -> Scenario:
        """A run that was killed before its export, its steps in SQLite's write-ahead log."""
        plain = self.tune("qzo", self.work / "run")
        return Scenario("tune --resume", [*plain, "--resume"], self.work, self._killed(plain, "model.gguf"), plain=plain)

    def replay(self) -> Scenario:
        journal = self._made("replayed", lambda output: self.tune("qzo", output / "run")) / "run" / "journal.db"
        command = ["replay", str(self.base), str(journal), "--output", str(self.work / "tuned.gguf"), "--json"]
        return Scenario("replay", command, self.work)

    def quantize(self, *, replaces: bool = False) -> Scenario:
        plain = ["quantize", str(self.dense), "--bits", "4", "--output", str(self.work / "packed"), "--json"]
        if not replaces:
            return Scenario("quantize", plain, self.work)
        before = self._made("packed8", lambda output: [*plain[:2], "--bits", "8", "--output", str(output / "packed")])
        return Scenario("quantize --overwrite", [*plain, "--overwrite"], self.work, before, replaces=True, plain=plain)

    def dequantize(self) -> Scenario:
        command = ["dequantize", str(self.base), "--output", str(self.work / "plain"), "--json"]
        return Scenario("dequantize", command, self.work)

    def attacked(self, output: Path, *more: str) -> list[str]:
        """The command of an attack of a few queries."""
        what = ["--model", "victim:predict", "--images", "images.npz", "--eps", "20/255", "--max-queries", "20"]
        return ["attack", *what, "--output", str(output), "--json", *more]

    def attack(self) -> Scenario:
        return Scenario("attack", self.attacked(self.work / "attack"), self.work)

    def attack_overwrite(self) -> Scenario:
        before = self._made("attacked", lambda output: self.attacked(output / "attack", "--seed", "1"))
        plain = self.attacked(self.work / "attack")
        return Scenario("attack --overwrite", [*plain, "--overwrite"], self.work, before, replaces=True, plain=plain)

    def attack_resume(self) -> Scenario:
        plain = self.attacked(self.work / "attack")
        return Scenario("attack --resume", [*plain, "--resume"], self.work, self._killed(plain, "result.npz"), plain=plain)

    def _made(self, name: str, command: Callable[[Path], list[str]]) -> Path:
        """A folder that holds what a command writes."""
        folder = self.folder / name
        if not folder.exists():
            folder.mkdir()
            outcome = self.server.run(command(folder))
            assert outcome.status == 0, outcome.said
        return folder

    def _killed(self, command: list[str], product: str) -> Path:
        """What is left of a command that was killed before it wrote a product."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        outcome = self.server.run(command, self.work)
        at = next(i for i, (_, path) in enumerate(outcome.calls) if product in path)
        shutil.rmtree(self.work)
        self.work.mkdir()
        assert self.server.run(command, self.work, Way.KILL, at).killed
        folder = self.folder / f"killed before {product}"
        self.work.rename(folder)
        return folder
