"""The command line, end to end on a tiny model."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from gradless.arguments import parser, run_options
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.journal import Journal
from gradless.methods.registry import RECIPES

TASK = ["--template", "{text} is", "--labels", "0=no,1=yes"]
ONE_TOKEN = ["--template", "{text} is\\n", "--labels", "0=n,1=y"]
"""Words that the byte-level tokenizer does not split."""


def tune(model, rows, output, *more):
    return main(["tune", str(model), str(rows), *TASK, "--batch-size", "4", "--steps", "4", "--output", str(output), *more])


def test_tune_eval_and_replay(tiny, rows, tmp_path, capsys):
    run = tmp_path / "run"
    assert tune(tiny, rows, run, "--eval", str(rows), "--eval-every", "2", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["finished"]
    assert summary["steps"] == 4
    assert set(summary["rounding"]["by_type"]) == {"Q4_1"}
    assert sorted(file.name for file in run.iterdir()) == ["README.md", "journal.db", "loss.png", "model.gguf"]
    assert (run / "model.gguf").stat().st_size == tiny.stat().st_size
    assert (run / "model.gguf").read_bytes() != tiny.read_bytes()
    assert [row["step"] for row in Journal.open(run / "journal.db").evaluations()] == [0, 2, 4]

    assert main(["eval", str(run / "model.gguf"), str(rows), *TASK, "--batch-size", "4", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert set(measured) >= {"accuracy", "loss", "examples", "seconds"}
    assert measured["loss"] == summary["after"]["loss"]

    again = tmp_path / "again.gguf"
    assert main(["replay", str(tiny), str(run / "journal.db"), "--output", str(again)]) == 0
    assert again.read_bytes() == (run / "model.gguf").read_bytes()
    assert main(["replay", str(tiny), str(run / "journal.db"), "--output", str(again)]) == 1
    assert "give --overwrite" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [
        ["--part", "both", "--absolute", "--eps", "1e-4", "--lr", "1e-8"],
        ["--part", "offset", "--train-unquantized", "--q", "2"],
        ["--lr", "auto", "--ratio", "0.2"],
        ["--method", "nzo", *ONE_TOKEN],
        ["--method", "nzo", *ONE_TOKEN, "--target-modules", "q_proj"],  # whose rows the file has in another order
        ["--method", "nzo", *ONE_TOKEN, "--part", "offset", "--accumulate", "2", "--q", "3", "--activations", "int8"],
        ["--method", "ezo"],
        ["--method", "ezo", "--lr", "1e-2", "--accumulate", "2"],
        ["--method", "mezo", "--distribution", "rademacher"],
        ["--method", "quzo", "--eps", "0.3", "--lr", "1e-2", "--q", "2"],
        ["--method", "quzo", "--share", "0.1", "--lr", "1e-1", "--roundings", "2", "--clamp"],
        ["--method", "zoqo", "--share", "0.1", "--lr", "0.5", "--q", "2"],
        ["--method", "zoqo", "--eps", "2", "--distribution", "uniform", "--whole-steps"],
    ],
)
def test_every_kind_of_run_replays_to_the_byte(tiny, rows, tmp_path, options):
    assert tune(tiny, rows, tmp_path / "run", *options) == 0
    target = tmp_path / "again.gguf"
    assert main(["replay", str(tiny), str(tmp_path / "run" / "journal.db"), "--output", str(target)]) == 0
    assert target.read_bytes() == (tmp_path / "run" / "model.gguf").read_bytes()
    assert target.read_bytes() != tiny.read_bytes()


@pytest.mark.parametrize(
    ("options", "method"),
    [
        (ONE_TOKEN, "nzo"),
        ([*ONE_TOKEN, "--q", "2"], "nzo"),
        ([*ONE_TOKEN, "--clip", "1"], "qzo"),
        ([*ONE_TOKEN, "--lr", "1e-3"], "qzo"),
        ([], "qzo"),
    ],
)
def test_what_learns_best_is_chosen_by_the_rows_and_the_options(tiny, rows, tmp_path, options, method):
    assert tune(tiny, rows, tmp_path / "run", *options) == 0
    journal = Journal.open(tmp_path / "run" / "journal.db")
    assert journal.header["method"]["name"] == journal.header["options"]["method"] == method
    assert tune(tiny, rows, tmp_path / "run", *options, "--resume") == 0


def test_inputs_are_never_replaced(tiny, rows, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    base = run / "model.gguf"
    base.write_bytes(tiny.read_bytes())
    assert tune(base, rows, run, "--overwrite") == 1
    assert "lies where" in capsys.readouterr().err
    assert tune(base, rows, tmp_path / "other") == 0
    journal = str(tmp_path / "other" / "journal.db")
    assert main(["replay", str(base), journal, "--output", str(base), "--overwrite"]) == 1
    assert base.read_bytes() == tiny.read_bytes()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--seed", "-1"], "seed is -1; it must be a whole number from 0 on"),
        (["--eps", "0"], r"eps is 0\.0; it must be a number above zero"),
        (["--batch-size", "0"], "batch_size is 0; it must be a number above zero"),
        (["--labels", "0:no"], "is not of the form"),
        (["--template", "{text", "--labels", "0=no"], "cannot be read"),
        (["--distribution", "uniform"], "gaussian or rademacher, not uniform"),
        (["--method", "quzo", "--eps", "1e-9"], "no code would ever move"),
        (["--method", "zoqo", "--share", "0.9"], "share is 0.9"),
        (["--share", "0.1"], "share is for quzo and zoqo"),
        (["--method", "ezo", "--q", "2"], "q is for nzo and qzo and quzo and zoqo and mezo; ezo does not read it"),
        (["--method", "ezo", "--eps", "2"], r"eps is 2\.0; it is relative"),
        (["--method", "quzo", "--lr", "auto"], "lr is 'auto'; it is a number for"),
        (["--method", "nzo", "--lr", "auto"], "lr is 'auto'; it is a number for"),
        (["--unquantized-lr", "1"], "unquantized_lr goes with --train-unquantized"),
        (["--method", "ezo", "--absolute"], "absolute is for qzo and quzo and zoqo; ezo does not read it"),
        (["--method", "ezo", "--clip", "1"], "clip is for qzo; ezo does not read it"),
        (["--ratio", "0.1"], "give --lr auto to qzo"),
        (["--method", "ezo", "--ratio", "0.1", "--lr", "1"], "ratio is for --lr auto"),
    ],
)
def test_values_that_cannot_work(tiny, rows, tmp_path, capsys, option, message):
    assert tune(tiny, rows, tmp_path / "run", *option) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_newline_in_a_template_is_written_as_it_is_in_python(tiny, rows, capsys):
    losses = []
    for template in ("{text}\\nIs it?", "{text}\nIs it?", "{text} Is it?"):
        assert main(["eval", str(tiny), str(rows), "--template", template, "--labels", "0=no,1=yes", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses[0] == losses[1] != losses[2]


def test_an_output_that_holds_a_run_is_refused(tiny, rows, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").write_text("a folder without a journal counts as empty")
    assert tune(tiny, rows, run) == 0
    assert tune(tiny, rows, run) == 1
    assert "give --resume to go on with it, --overwrite to replace it" in capsys.readouterr().err
    assert tune(tiny, rows, run, "--overwrite") == 0
    assert tune(tiny, rows, run, "--resume", "--overwrite") == 1
    assert tune(tiny, rows, tmp_path / "new", "--resume") == 1
    assert "holds no run to resume" in capsys.readouterr().err
    assert (run / "notes.txt").exists()


def test_a_dense_folder_is_tuned_by_mezo_and_replayed(tiny, rows, tmp_path):
    dense, run = tmp_path / "dense", tmp_path / "run"
    assert main(["dequantize", str(tiny), "--output", str(dense)]) == 0
    assert tune(dense, rows, run, "--lr", "1e-4") == 0
    assert main(["replay", str(dense), str(run / "journal.db"), "--output", str(tmp_path / "again")]) == 0
    ours, theirs = (folder / "model.safetensors" for folder in (run / "model", tmp_path / "again"))
    assert ours.read_bytes() == theirs.read_bytes()
    assert ours.read_bytes() != (dense / "model.safetensors").read_bytes()


def test_replay_refuses_another_base(tiny, rows, tmp_path, capsys):
    from tests.tiny import tiny_gguf

    assert tune(tiny, rows, tmp_path / "run") == 0
    other = tiny_gguf(tmp_path / "other.gguf", seed=1)
    assert main(["replay", str(other), str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "x.gguf")]) == 1
    assert "is not the base of" in capsys.readouterr().err
    assert not (tmp_path / "x.gguf").exists()


def test_a_full_disk_while_saving_is_one_sentence_and_the_journal_remains(tiny, rows, tmp_path, capsys, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradless.formats.gguf.shutil.copyfile", full)
    assert tune(tiny, rows, tmp_path / "run") == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert not (tmp_path / "run" / "model.gguf").exists()
    assert tune(tiny, rows, tmp_path / "run", "--resume") == 0
    assert (tmp_path / "run" / "model.gguf").exists()


def test_info_names_types_sizes_and_what_each_method_tunes(tiny, capsys):
    assert main(["info", str(tiny), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)
    assert {row["type"]: row["bits_per_weight"] for row in about["types"]} == {"Q4_1": 5.0, "Q8_0": 8.5, "F32": 32.0}
    assert about["tunable"]["qzo"]["tensors"] == about["tunable"]["ezo"]["with offsets"] == 14
    assert main(["info", str(tiny), "--eps", "1e-4"]) == 0
    shown = capsys.readouterr().out
    assert "leaves a perturbation of eps 0.0001 with a cosine of only" in shown
    assert "o_proj and down_proj alone, in the last 50% of the layers" in shown


def test_configuration_from_yaml_and_the_command_line_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("lr: 1e-3\neval-every: 7\nmethod: mezo\nsteps: 5\n")
    parsed = parser().parse_args(["tune", "m", "d", "--config", str(tmp_path / "run.yaml"), "--steps", "9"])
    options = run_options(parsed)
    assert (options.lr, options.eval_every, options.method, options.steps) == (1e-3, 7, "mezo", 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("speed: 9", "no option 'speed'"),
        ("- a", "not a list of"),
        ("lr: quick", "'quick', not a number"),
        ("steps: 2.5", "2.5, not a whole number"),
        ("steps: true", "True, not a whole number"),
        ("resume: 1", "1, not true or false"),
        ("task: [a]", "not text"),
    ],
)
def test_a_bad_configuration(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(GradlessError, match=message):
        run_options(parser().parse_args(["tune", "m", "d", "--config", str(tmp_path / "run.yaml")]))


def test_help_has_every_option_and_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    text = capsys.readouterr().out
    from dataclasses import fields

    from gradless.training.options import RunOptions

    assert all("--" + field.name.replace("_", "-") in text for field in fields(RunOptions))
    assert "examples:\n  gradless tune" in text


@pytest.mark.parametrize("method", ["auto", *RECIPES])
def test_every_method_can_be_named_and_auto_too(method):
    assert parser().parse_args(["tune", "a", "b", "--method", method]).method == method


def test_starting_up_imports_neither_torch_nor_transformers():
    code = "import sys, gradless.cli; gradless.cli.parser(); print({'torch', 'transformers', 'numpy'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def start(model, rows, output, *more):
    command = [sys.executable, "-m", "gradless.cli", "tune", str(model), str(rows), *TASK, "--batch-size", "4"]
    command += ["--steps", "150", "--output", str(output), *more]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def wait_for_steps(run, steps):
    import sqlite3

    for _ in range(1800):
        time.sleep(0.1)
        if (run / "journal.db").exists():
            try:
                with sqlite3.connect(f"file:{run / 'journal.db'}?mode=ro", uri=True) as connection:
                    done = connection.execute("SELECT count(*) FROM steps").fetchone()[0]
                if done >= steps:
                    return
            except sqlite3.OperationalError:
                pass
    raise AssertionError("the run did not get there")


def test_killed_or_interrupted_runs_resume_to_the_same_bytes(tiny, rows, tmp_path):
    whole = start(tiny, rows, tmp_path / "whole")
    assert whole.wait(timeout=120) == 0, whole.stderr.read()

    killed = start(tiny, rows, tmp_path / "cut")
    wait_for_steps(tmp_path / "cut", 5)
    killed.kill()
    killed.wait()
    done = Journal.open(tmp_path / "cut" / "journal.db").steps
    interrupted = start(tiny, rows, tmp_path / "cut", "--resume")
    wait_for_steps(tmp_path / "cut", done + 3)
    interrupted.send_signal(signal.SIGINT)
    assert interrupted.wait(timeout=60) == 130
    assert "run the same command with --resume" in " ".join(interrupted.stderr.read().split())
    rest = start(tiny, rows, tmp_path / "cut", "--resume")
    assert rest.wait(timeout=120) == 0, rest.stderr.read()
    assert (tmp_path / "cut" / "model.gguf").read_bytes() == (tmp_path / "whole" / "model.gguf").read_bytes()
