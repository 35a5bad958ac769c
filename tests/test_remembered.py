"""A kernel library's passed self-test is remembered, and nothing else is."""

from __future__ import annotations

import pytest

from gradless import kernels
from gradless.kernels import cpu, remembered


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kernels._own.cache_clear()
    yield tmp_path / "gradless" / remembered.FOLDER
    kernels._own.cache_clear()


def tried(monkeypatch, result: str | None) -> list[int]:
    """Have the self-test answer, and count how often it is asked."""
    calls: list[int] = []
    monkeypatch.setattr(kernels, "first_difference", lambda *_: (calls.append(1), result)[1])
    return calls


def test_a_passed_self_test_runs_once(cache, monkeypatch):
    calls = tried(monkeypatch, None)
    assert kernels.name() == "cpu"
    kernels._own.cache_clear()
    assert kernels.name() == "cpu"
    assert len(calls) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_failure_is_not_remembered(cache, monkeypatch):
    calls = tried(monkeypatch, "Q4_0, scale")
    for _ in range(2):
        assert kernels.name() == "torch"
        kernels._own.cache_clear()
    assert len(calls) == 2
    assert not cache.exists()


@pytest.mark.parametrize("what", ["library", "torch", "processor", "content"])
def test_nothing_is_believed_where_anything_differs(cache, monkeypatch, tmp_path, what):
    remembered.remember(cpu.LIBRARY)
    assert remembered.passed(cpu.LIBRARY)
    library = cpu.LIBRARY
    if what == "library":
        library = tmp_path / cpu.LIBRARY.name
        library.write_bytes(cpu.LIBRARY.read_bytes()[:-1] + b"x")
    elif what == "torch":
        monkeypatch.setattr(remembered.torch, "__version__", "0")
    elif what == "processor":
        monkeypatch.setattr(remembered, "_processor", lambda: "another")
    else:
        next(cache.iterdir()).write_text("library ?")
    assert not remembered.passed(library)


def test_a_cache_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    remembered.remember(cpu.LIBRARY)
    assert not remembered.passed(cpu.LIBRARY)
