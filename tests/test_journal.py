"""The journal: durable, chained, whole."""

import base64
import math
import shutil
import sqlite3
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless.errors import GradlessError
from gradless.journal import Journal, _unpacked
from gradless.methods.base import Estimate

HEADER = {"base": "abc", "environment": {"gradless": "0.1.0"}}


def estimate(step: int, d: float = 0.1) -> Estimate:
    return Estimate(step, ((1.0 + d, 1.0),), ((d,),), (1e-3,))


def written(path, steps=5, finish=True) -> None:
    journal = Journal.create(path, HEADER)
    for step in range(steps):
        journal.append(estimate(step), float(step))
    journal.finish() if finish else journal.close()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(width=64), min_size=1, max_size=4), st.floats(allow_nan=False))
def test_every_number_comes_back_as_it_was(tmp_path_factory, numbers, lr):
    path = tmp_path_factory.mktemp("journal") / "journal.db"
    put = Estimate(0, tuple((n, -n) for n in numbers), (tuple(numbers),), (lr,))
    journal = Journal.create(path, HEADER)
    journal.append(put, 1.0)
    journal.finish()
    (got,) = Journal.open(path).estimates()
    assert repr(got) == repr(put)


def test_a_finished_journal_stands_alone(tmp_path):
    written(tmp_path / "journal.db")
    assert [file.name for file in tmp_path.iterdir()] == ["journal.db"]
    journal = Journal.open(tmp_path / "journal.db")
    assert (journal.steps, journal.seconds, journal.header["base"]) == (5, 4.0, "abc")


def test_a_run_that_was_killed_can_be_opened_and_goes_on(tmp_path):
    journal = Journal.create(tmp_path / "alive" / "journal.db", HEADER)
    journal.append(estimate(0), 0.0)
    shutil.copytree(tmp_path / "alive", tmp_path / "killed")  # what a kill leaves: the file and its write-ahead log
    path = tmp_path / "killed" / "journal.db"
    again = Journal.open(path)
    assert again.steps == 1
    again.append(estimate(1), 1.0)
    again.finish()
    assert Journal.open(path).steps == 2


def test_nan_losses_are_kept(tmp_path):
    journal = Journal.create(tmp_path / "journal.db", HEADER)
    journal.append(Estimate(0, ((math.nan, 1.0),), ((math.nan,),), (1e-3,)), 0.0)
    journal.finish()
    (got,) = Journal.open(tmp_path / "journal.db").estimates()
    assert not got.finite


def test_none(tmp_path):
    with pytest.raises(GradlessError, match="there is no journal"):
        Journal.open(tmp_path / "journal.db")


@pytest.mark.parametrize("keep", [0, 50, 5000])
def test_cut_off(tmp_path, keep):
    path = tmp_path / "journal.db"
    written(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(GradlessError, match="is not a whole journal"):
        Journal.open(path)


def test_something_else(tmp_path):
    path = tmp_path / "journal.db"
    path.write_text("not a database, but long enough to look like one " * 100)
    with pytest.raises(GradlessError, match="is not a whole journal"):
        Journal.open(path)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ("UPDATE steps SET lr = '[1.0]' WHERE step = 2", "was changed: step 2"),
        ("UPDATE steps SET estimate = '[[9.0]]' WHERE step = 0", "was changed: step 0"),
        ("UPDATE header SET value = '\"other\"' WHERE name = 'base'", "was changed: step 0"),
        ("DELETE FROM steps WHERE step = 1", "was changed: step 1"),
        ("DELETE FROM steps WHERE step = 4", "is truncated: its run finished 5 steps and it holds 4"),
        ("UPDATE header SET value = '99' WHERE name = 'format'", "journal format 99"),
    ],
)
def test_edited(tmp_path, edit, message):
    path = tmp_path / "journal.db"
    written(path)
    with sqlite3.connect(path) as connection:
        connection.execute(edit)
    connection.close()
    with pytest.raises(GradlessError, match=message):
        Journal.open(path)


def test_a_full_disk_keeps_what_was_written(tmp_path):
    journal = Journal.create(tmp_path / "journal.db", HEADER)
    journal.append(estimate(0), 0.0)
    journal._database.connection.execute("PRAGMA max_page_count = 1")

    def fill():
        for step in range(1, 2000):
            journal.append(estimate(step), 0.0)

    with pytest.raises(GradlessError, match=r"step \d+ could not be written .*full.*--resume"):
        fill()
    written = journal.steps
    journal.close()
    assert Journal.open(tmp_path / "journal.db").steps == written


def test_evaluations_are_kept_in_order(tmp_path):
    journal = Journal.create(tmp_path / "journal.db", HEADER)
    journal.evaluated(10, {"loss": 0.5, "seconds": 99.0}, 2.0)
    journal.evaluated(0, {"loss": 1.0}, 0.0)
    assert [(row["step"], row["seconds"]) for row in journal.evaluations()] == [(0, 0.0), (10, 2.0)]


def test_two_writers_of_one_journal_do_not_mix_their_steps(tmp_path):
    path = tmp_path / "journal.db"
    one = Journal.create(path, HEADER)
    two = Journal.open(path, to_go_on=True)
    one.append(estimate(0), 0.0)
    with pytest.raises(GradlessError, match=r"is no longer this run's: another process wrote to it after 0 steps"):
        two.append(estimate(0, 0.5), 0.0)
    one.append(estimate(1), 0.0)
    two.close()
    one.finish()
    assert [each.d for each in Journal.open(path).estimates()] == [((0.1,),), ((0.1,),)]


def test_a_reader_sees_the_steps_that_it_checked_while_a_run_goes_on(tmp_path):
    path = tmp_path / "journal.db"
    live = Journal.create(path, HEADER)
    live.append(estimate(0), 0.0)
    reader = Journal.open(path)
    live.append(estimate(1), 0.0)
    assert len(list(reader.estimates())) == reader.steps == 1
    reader.close()
    live.finish()


def test_a_journal_without_its_log_says_that_steps_may_be_missing(tmp_path):
    journal = Journal.create(tmp_path / "run" / "journal.db", HEADER)
    journal.append(estimate(0), 0.0)
    (tmp_path / "copy").mkdir()
    shutil.copy(tmp_path / "run" / "journal.db", tmp_path / "copy")
    with pytest.raises(GradlessError, match=r"journal.db-wal, which may hold its last steps, is not beside it: copy both"):
        Journal.open(tmp_path / "copy" / "journal.db")


def test_a_killed_run_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    journal = Journal.create(tmp_path / "alive" / "journal.db", HEADER)
    journal.append(estimate(0), 0.0)
    shutil.copytree(tmp_path / "alive", tmp_path / "killed")
    path, connect = tmp_path / "killed" / "journal.db", sqlite3.connect
    (tmp_path / "killed" / "journal.db-shm").unlink()

    def read_only(name, **more):  # what SQLite says on a disk that is mounted to be read: root may write everywhere else
        if name == path:
            raise sqlite3.OperationalError("unable to open database file")
        return connect(name, **more)

    monkeypatch.setattr(sqlite3, "connect", read_only)
    again = Journal.open(path)
    assert [each.step for each in again.estimates()] == [0]
    again.close()
    assert sorted(file.name for file in path.parent.iterdir()) == ["journal.db", "journal.db-wal"]


@pytest.mark.parametrize("leave", [b"", b"SQLite"])
def test_what_a_kill_left_of_a_journal_that_never_began_is_no_journal(tmp_path, leave):
    path = tmp_path / "journal.db"
    if leave:  # a file with a write-ahead log and no tables, as earlier versions could leave it
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA journal_mode=WAL")
        connection.close()
    else:
        path.write_bytes(leave)
    assert not Journal.is_begun(path)
    written(path)
    assert Journal.is_begun(path)
    assert Journal.open(path).steps == 5


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE VIEW more AS SELECT * FROM steps",
        "CREATE TRIGGER quick AFTER INSERT ON steps BEGIN DELETE FROM header; END",
        "CREATE TABLE strange (a)",
        "ALTER TABLE steps ADD COLUMN more TEXT",
    ],
)
def test_a_database_with_more_than_a_runs_tables_is_refused(tmp_path, statement):
    path = tmp_path / "journal.db"
    written(path)
    with sqlite3.connect(path) as connection:
        connection.execute(statement)
    connection.close()
    with pytest.raises(GradlessError, match=r"has an unknown"):
        Journal.open(path)


def test_a_step_that_inflates_to_more_than_its_codes_can_hold_is_refused():
    bomb = zlib.compressobj(9, wbits=-zlib.MAX_WBITS)
    text = base64.b85encode(bomb.compress(bytes(10**7)) + bomb.flush()).decode()
    with pytest.raises(ValueError, match="more than its codes can"):
        _unpacked(text)


def test_a_finished_journal_names_what_was_written(tmp_path):
    journal = Journal.create(tmp_path / "journal.db", HEADER)
    journal.finish({"model.gguf": "abc"})
    assert Journal.open(tmp_path / "journal.db").written() == {"model.gguf": "abc"}
