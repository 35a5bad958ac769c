"""Three runs of an earlier version, kept as it wrote them (tests/old_runs): they still open, replay and resume.

Made at e9e30c5 by `gradless tune base.gguf rows.tsv TASK --method METHOD`, each with a journal of format 3.
"""

import hashlib
import json
import shutil
import sqlite3
from pathlib import Path

import pytest

from gradless.cli import main
from gradless.journal import Journal

RUNS = Path(__file__).parent / "old_runs"
TUNED = json.loads((RUNS / "tuned.json").read_text())
"""SHA-256 of the tuned file that each run wrote."""
TASK = ["--template", "{text} is\\n", "--labels", "0=n,1=y", "--batch-size", "4", "--steps", "6"]
STEPS = 6


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("method", TUNED)
def test_an_old_run_replays_to_the_byte(tmp_path, method):
    shutil.copy(RUNS / f"{method}.db", tmp_path / "journal.db")
    assert main(["replay", str(RUNS / "base.gguf"), str(tmp_path / "journal.db"), "--output", str(tmp_path / "out.gguf")]) == 0
    assert sha256(tmp_path / "out.gguf") == TUNED[method]


@pytest.mark.parametrize("method", TUNED)
def test_an_old_run_that_was_interrupted_resumes_after_the_steps_that_it_made(tmp_path, method):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(RUNS / f"{method}.db", run / "journal.db")
    with sqlite3.connect(run / "journal.db") as connection:
        connection.execute("DELETE FROM steps WHERE step >= 3")
        connection.execute("DELETE FROM finished")
    connection.close()
    begun = list(Journal.open(run / "journal.db").estimates())
    command = ["tune", str(RUNS / "base.gguf"), str(RUNS / "rows.tsv"), *TASK, "--method", method, "--output", str(run)]
    assert main([*command, "--resume", "--allow-changes"]) == 0
    journal = Journal.open(run / "journal.db")
    assert journal.steps == STEPS
    assert list(journal.estimates())[:3] == begun
    journal.close()
    again = tmp_path / "again.gguf"
    assert main(["replay", str(RUNS / "base.gguf"), str(run / "journal.db"), "--output", str(again)]) == 0
    assert again.read_bytes() == (run / "model.gguf").read_bytes()
