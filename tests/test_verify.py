"""One writer, one base: locks, changed bases, temporaries of killed processes, `gradless verify`, and the last resort."""

import json
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from gradless import cli, tuning
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.files import Snapshot, locked, replacing, set_aside, sweep
from gradless.journal import Journal
from tests.test_cli import start, tune, wait_for_steps


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory):
    from tests.tiny import tiny_data

    folder = tmp_path_factory.mktemp("finished")
    assert tune(tiny, tiny_data(folder / "rows.tsv"), folder / "run") == 0
    return folder / "run"


def report(capsys, *arguments):
    status = main(["verify", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_what_a_run_left_belongs_together(tiny, finished, capsys):
    status, seen = report(capsys, finished, "--base", tiny)
    assert (status, seen["journal"], seen["base"], seen["tuned"]) == (0, "belongs", "belongs", "belongs")
    assert (seen["steps"], seen["finished"], seen["why"]) == (4, True, {})


def test_a_tuned_file_or_a_base_that_was_changed_does_not_belong(finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    changed = bytearray((run / "model.gguf").read_bytes())
    changed[-1] ^= 1
    (run / "model.gguf").write_bytes(changed)
    status, seen = report(capsys, run, "--base", run / "model.gguf")
    assert (status, seen["base"], seen["tuned"]) == (1, "does not belong", "does not belong")
    assert "model.gguf is not what the run wrote" in seen["why"]["tuned"]


def test_the_whole_steps_before_a_damage_are_kept(tiny, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    with sqlite3.connect(run / "journal.db") as connection:
        connection.execute("UPDATE steps SET lr = '[9.0]' WHERE step = 2")
    connection.close()
    damaged = (run / "journal.db").read_bytes()
    status, seen = report(capsys, run, "--salvage")
    assert (status, seen["journal"], seen["steps"]) == (1, "does not belong", 2)
    assert (run / "journal.db").read_bytes() == damaged
    kept = Journal.open(run / "journal.salvaged.db")
    assert list(kept.estimates()) == list(Journal.open(finished / "journal.db").estimates())[:2]
    kept.close()
    assert main(["replay", str(tiny), str(run / "journal.salvaged.db"), "--output", str(tmp_path / "a.gguf")]) == 0


def test_a_page_that_cannot_be_read_costs_the_steps_from_there_on(tmp_path):
    from tests.test_journal import HEADER, estimate

    path = tmp_path / "journal.db"
    journal = Journal.create(path, HEADER)
    for step in range(200):
        journal.append(estimate(step), 0.0)
    journal.finish()
    content = bytearray(path.read_bytes())
    content[-8192:-4096] = bytes(4096)  # one of the last pages: the first ones are the tables' roots
    path.write_bytes(content)
    with pytest.raises(GradlessError):
        Journal.open(path)
    kept = Journal.salvage(path, tmp_path / "kept.db")
    assert 0 < kept < 200
    assert Journal.open(tmp_path / "kept.db").steps == kept


# -- one writer -------------------------------------------------------------------------------------------------------


def test_a_second_process_is_told_who_holds_a_run(tiny, rows, tmp_path, capsys):
    first = start(tiny, rows, tmp_path / "run")
    wait_for_steps(tmp_path / "run", 2)
    for more in (["--resume"], ["--overwrite"], []):
        assert tune(tiny, rows, tmp_path / "run", *more) == 1
        assert f"is in use: process {first.pid} on " in capsys.readouterr().err
    assert first.wait(timeout=120) == 0
    assert Journal.open(tmp_path / "run" / "journal.db").steps == 150
    assert not (tmp_path / "run" / ".lock").exists()


def test_a_lock_goes_with_its_process_and_a_folder_that_was_made_for_nothing_too(tmp_path):
    code = f"from gradless.files import locked; c = locked(__import__('pathlib').Path({str(tmp_path / 'a')!r}), 'a run')"
    killed = subprocess.run(
        [sys.executable, "-c", code + "; c.__enter__(); __import__('os').kill(__import__('os').getpid(), 9)"]
    )
    assert killed.returncode == -signal.SIGKILL
    assert (tmp_path / "a" / ".lock").exists()
    with locked(tmp_path / "a", "a run"), pytest.raises(GradlessError, match=r"process \d+ on .* is writing a run there"):
        locked(tmp_path / "a", "a run").__enter__()
    with locked(tmp_path / "b", "a run"):
        assert (tmp_path / "b").is_dir()
    assert not (tmp_path / "b").exists()


# -- one base ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_base_that_changes_in_mid_run_ends_it_without_a_tuned_file(tiny, rows, tmp_path, how, monkeypatch, capsys):
    base = tmp_path / "base.gguf"
    shutil.copy(tiny, base)
    append = Journal.append

    def change(journal, estimate, seconds):
        append(journal, estimate, seconds)
        if estimate.step == 1 and how == "in place":
            with base.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"\x55")
        elif estimate.step == 1:
            shutil.copy(tiny, tmp_path / "other.gguf")
            (tmp_path / "other.gguf").replace(base)

    monkeypatch.setattr(Journal, "append", change)
    assert tune(base, rows, tmp_path / "run") == 1
    assert "was changed while it was in use" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.gguf").exists()
    monkeypatch.undo()
    journal = Journal.open(tmp_path / "run" / "journal.db", to_go_on=True)
    assert journal.steps == 2
    journal.close()
    shutil.copy(tiny, base)
    assert tune(base, rows, tmp_path / "run", "--resume") == 0
    assert main(["verify", str(tmp_path / "run"), "--base", str(tiny)]) == 0


def test_a_base_whose_bytes_changed_unseen_is_not_exported(tiny, rows, tmp_path, monkeypatch, capsys):
    """The clock and the size say that nothing happened; the hash says that something did."""
    base = tmp_path / "base.gguf"
    shutil.copy(tiny, base)
    monkeypatch.setattr(Snapshot, "check", lambda _self: None)
    finish = tuning.train

    def train(*given):
        finish(*given)
        base.write_bytes(base.read_bytes()[:-1] + b"\x55")

    monkeypatch.setattr(tuning, "train", train)
    assert tune(base, rows, tmp_path / "run") == 1
    assert "is no longer the base of the run in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.gguf").exists()


@pytest.mark.slow
def test_a_base_that_becomes_shorter_in_mid_run_is_a_sentence_and_no_crash(tiny, rows, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(tiny, base)
    running = start(base, rows, tmp_path / "run")
    wait_for_steps(tmp_path / "run", 3)
    os.truncate(base, 4096)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 1
    assert any(
        reason in " ".join(said.split()) for reason in ("was changed while it was in use", "became shorter while it was")
    )
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "model.gguf").exists()


def test_reading_a_page_that_is_gone_is_a_sentence_and_status_1(tmp_path):
    (tmp_path / "file").write_bytes(bytes(8192))
    code = (
        "import os, mmap; from gradless.cli import LOST_PAGE; from gradless.kernels.cpu import end_on_lost_page\n"
        f"end_on_lost_page(LOST_PAGE); file = open({str(tmp_path / 'file')!r}, 'rb')\n"
        "pages = mmap.mmap(file.fileno(), 8192, prot=mmap.PROT_READ)\n"
        f"os.truncate({str(tmp_path / 'file')!r}, 0); pages[5000]"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (1, cli.LOST_PAGE)


def test_a_folder_whose_configuration_was_changed_is_not_the_base(dense, rows, tmp_path, capsys):
    shutil.copytree(dense, tmp_path / "base")
    assert tune(tmp_path / "base", rows, tmp_path / "run", "--method", "mezo") == 0
    config = tmp_path / "base" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"rms_norm_eps": 1e-3}))
    command = ["replay", str(tmp_path / "base"), str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "again")]
    assert main(command) == 1
    assert "its config.json differs" in capsys.readouterr().err


# -- temporaries ------------------------------------------------------------------------------------------------------


def test_a_temporary_lies_where_nobody_else_can_plant_a_link(tmp_path):
    with replacing(tmp_path / "model.gguf") as temporary:
        assert stat.S_IMODE(temporary.parent.stat().st_mode) == 0o700
        assert temporary.parent.parent == tmp_path
        temporary.write_text("whole")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("model.gguf", "whole")]


def test_a_link_at_the_target_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "model.gguf").symlink_to(tmp_path / "mine")
    with replacing(tmp_path / "model.gguf") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "mine").read_text() == "mine"
    assert (tmp_path / "model.gguf").read_text() == "new"


def test_what_a_killed_process_wrote_or_set_aside_is_cleared_up_and_a_live_ones_is_left(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / ".x.123.tmp").mkdir()
    (tmp_path / ".x.123.tmp" / "x").write_text("half")
    (tmp_path / ".old.123.aside").mkdir()
    (tmp_path / ".old.123.aside" / "old").write_text("older")
    with replacing(tmp_path / "live") as temporary:
        sweep(tmp_path)
        temporary.write_text("live")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"live": "live", "old": "older"}


def test_a_sweep_before_a_writer_holds_its_folder_costs_it_nothing(tmp_path, monkeypatch):
    made = []

    def disturbed(**named):
        made.append(mkdtemp(**named))
        if len(made) == 1:
            sweep(tmp_path)
        return made[-1]

    mkdtemp = tempfile.mkdtemp
    monkeypatch.setattr(tempfile, "mkdtemp", disturbed)
    with replacing(tmp_path / "live") as temporary:
        temporary.write_text("live")
    assert len(made) == 2
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"live": "live"}


def test_what_was_set_aside_comes_back_when_the_process_is_killed(tmp_path):
    (tmp_path / "journal.db").write_text("old")
    code = (
        "import os; from pathlib import Path; from gradless.files import set_aside\n"
        f"with set_aside([Path({str(tmp_path / 'journal.db')!r})]): os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGKILL
    assert not (tmp_path / "journal.db").exists()
    with locked(tmp_path, "a run"):
        assert (tmp_path / "journal.db").read_text() == "old"


def test_set_aside_drops_what_was_there_once_it_is_told_to(tmp_path):
    (tmp_path / "a").write_text("old")
    with set_aside([tmp_path / "a"]) as drop:
        drop()
        assert list(tmp_path.iterdir()) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")])
def test_whatever_a_library_calls_a_full_disk_it_is_one_sentence_and_nothing_is_left(tmp_path, error):
    with pytest.raises(GradlessError, match=r"could not write .*No space left on device.*; nothing was changed"):
        _write(tmp_path / "model", error)
    assert list(tmp_path.iterdir()) == []


def test_a_fault_of_ours_is_not_taken_for_a_full_disk(tmp_path):
    with pytest.raises(ZeroDivisionError):
        _write(tmp_path / "model", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def _write(path, error):
    with replacing(path) as temporary:
        temporary.mkdir()
        raise error


# -- the last resort --------------------------------------------------------------------------------------------------


def test_whatever_nobody_thought_of_is_one_sentence_and_a_log(tmp_path, monkeypatch, capsys):
    def broken(_parsed):
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setitem(cli._COMMANDS, "info", broken)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main(["info", "model.gguf"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "(ZeroDivisionError: two)" in said
    assert "raise ZeroDivisionError" in (tmp_path / "gradless" / "gradless-error.log").read_text()


def test_the_log_lies_in_the_output_folder_if_there_is_one(tmp_path, monkeypatch, capsys):
    def broken(_parsed):
        raise MemoryError

    monkeypatch.setitem(cli._COMMANDS, "replay", broken)
    assert main(["replay", "a", "b", "--output", str(tmp_path)]) == 1
    assert str(tmp_path / "gradless-error.log") in capsys.readouterr().err
    assert Path(tmp_path / "gradless-error.log").is_file()
