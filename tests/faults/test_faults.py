"""A few faults and kills in every `make test`; all of them by `python -m tests.faults.run`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import run
from tests.faults.scenarios import Materials, Trial
from tests.faults.server import Server, Way, compiled


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Materials]:
    """What an attack needs, and a process in which its writes go wrong."""
    folder = tmp_path_factory.mktemp("faults").resolve()
    shim = compiled(folder)
    if shim is None:
        pytest.skip("needs Linux and a C compiler")
    server = Server(shim, folder)
    made = Materials(folder, server)
    server.warm(made.attacked(folder / "warm"))
    yield made
    server.close()


@pytest.fixture(scope="module")
def attack(materials: Materials) -> Trial:
    return Trial(materials.attack(), materials.server)


def test_every_kind_of_call_is_seen_of_python_and_of_sqlite(attack: Trial) -> None:
    kinds = {kind for kind, path in attack.calls if "queries.db" in path}
    assert {"create", "write", "flush", "lock", "rename", "unlink"} <= kinds
    assert {"create", "write", "flush", "rename"} <= {kind for kind, path in attack.calls if "result.npz" in path}


def test_what_is_renamed_was_flushed_before_and_its_folder_after(attack: Trial) -> None:
    renamed = [(at, Path(path)) for at, (kind, path) in enumerate(attack.calls) if kind == "rename"]
    assert {path.name for _, path in renamed} >= {"queries.db", "result.npz", "report.html", "summary.json"}
    for at, path in renamed:
        touched = [kind for kind, each in attack.calls[:at] if Path(each).name == path.name and kind in ("write", "flush")]
        assert touched[-1] == "flush", path
        assert ("flush", str(path.parent)) in attack.calls[at:], path


@pytest.mark.parametrize("way", [way for way in Way if way != Way.COUNT], ids=lambda way: way.name.lower())
def test_an_attack_is_as_before_or_complete_or_resumed_to_the_byte(attack: Trial, way: Way) -> None:
    points = list(attack.points(way))
    for at in points[:: len(points) // 2]:
        attack.fault(way, at)


@pytest.mark.slow
def test_everything_that_writes_survives_faults_and_kills(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["run", "--every", "30", "--kills", "16"])
    assert run.main() == 0
