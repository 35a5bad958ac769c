"""The journal: durable, chained, whole."""

import math
import shutil
import sqlite3

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless.errors import GradlessError
from gradless.journal import Journal
from gradless.methods import Estimate

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
    journal._connection.execute("PRAGMA max_page_count = 1")

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
