"""Every method by its recipe: one contract for all, and a method that is added from outside."""

import ast
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from gradless import objectives
from gradless.batch import Batch, Closure
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.load import load
from gradless.journal import Journal
from gradless.methods.base import Measurement
from gradless.methods.registry import RECIPES, build_method, recipe, setup_of
from gradless.objectives import Example, tokenize
from gradless.training.batches import token_batch
from gradless.training.options import RunOptions
from gradless.training.start import RunSetting
from tests.tiny import tiny_data, tiny_gguf

SOURCE = Path(__file__).parents[1] / "src" / "gradless"
PAPERS = Path(__file__).parents[1] / "papers"
TASK = ["--template", "{text} is\\n", "--labels", "0=n,1=y"]


@pytest.fixture(scope="module")
def dense(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "model"
    assert main(["dequantize", str(tiny), "--output", str(folder)]) == 0
    return folder


def setting(name, path, **options):
    """A run of a method over sixteen rows, before its first step."""
    model = load(path)
    chosen = RunOptions(method=name, **options)
    rows = [tokenize(Example(f"{'az'[i % 2] * 3} {i}\n", ("n", "y"), i % 2), model.tokenizer, context=128) for i in range(16)]
    copies = recipe(name).copies(chosen)
    return RunSetting(model, chosen.method, chosen, 0, rows, 4, lambda part: token_batch(model.model, part, copies))


def values(method):
    return [space.values.clone() for space in method.spaces]


@pytest.mark.parametrize("name", RECIPES)
def test_measuring_and_estimating_write_nothing_and_only_apply_does(name, tiny, dense):
    run = setting(name, tiny if recipe(name).held_packed else dense)
    setup = recipe(name).setup(run)
    method = build_method(run.model, setup)
    found = setup_of(method, run.model)
    assert found.method == setup.method
    assert all(asked.items() <= group.items() for asked, group in zip(setup.groups, found.groups, strict=True))
    before, batches = values(method), run.first_batches(8)
    with torch.inference_mode():
        measurements = []
        for batch in batches:
            batch.first = sum(each.size for each in batches[: len(measurements)])
            measurements.append(method.measure(batch))
    estimates = [method.estimate(measurements) for _ in range(2)]
    assert estimates[0] == estimates[1]
    assert all(isinstance(each, Measurement) for each in measurements)
    assert all(torch.equal(a, b) for a, b in zip(before, values(method), strict=True))
    assert method.t == 0
    method.apply(estimates[0])
    assert method.t == 1
    again = build_method(setting(name, run.model.path).model, setup)
    for _ in again.replay(estimates[:1]):
        pass
    assert all(torch.equal(a, b) for a, b in zip(values(again), values(method), strict=True))


@pytest.mark.parametrize("name", RECIPES)
def test_a_step_with_a_closure_works_or_says_what_is_missing(name, tiny, dense):
    run = setting(name, tiny if recipe(name).held_packed else dense)
    method = build_method(run.model, recipe(name).setup(run))
    (batch,) = run.first_batches()
    closure = lambda: objectives.losses(run.model.model, batch.inputs)[0].mean()  # noqa: E731
    if name in ("nzo", "ezo"):
        with pytest.raises(GradlessError, match=r"this method needs .*, which Closure does not give"):
            method.step(closure)
    else:
        with torch.inference_mode():
            assert method.step(closure).finite
    with torch.inference_mode():
        assert method.step(batch).finite


def test_a_batch_refuses_what_it_cannot_answer_in_one_sentence(tiny):
    for ask in ("loss", "paired_loss", "losses", "paired_losses", "token_losses", "answer_scores", "outcome"):
        with pytest.raises(GradlessError, match=r"^this method needs .*, which Batch does not give: .*\.$"):
            getattr(Batch(), ask)()
    for ask in ("labels", "answer_tokens", "example_of_token"):
        with pytest.raises(GradlessError, match=r"^this method needs .*, which Closure does not give"):
            getattr(Closure(lambda: 0.0), ask)
    (batch,) = setting("qzo", tiny).first_batches()
    with torch.inference_mode():
        tokens = batch.token_losses()
        sequences = batch.losses()
    assert len(tokens) == len(sequences) == 4
    assert Closure(lambda: "an answer").outcome() == "an answer"


# -- names ------------------------------------------------------------------------------------------------------------


def files_outside_methods():
    """Source files that must not know a method: all but its folder, the registry, and the public list of names; the attack
    that is named after ZOQO is built on it."""
    for path in sorted(SOURCE.rglob("*.py")):
        inside = path.relative_to(SOURCE).parts
        of_a_method = inside[0] == "methods" and len(inside) == 3
        if not (of_a_method or inside[0] == "attacks" or inside in (("__init__.py",), ("methods", "registry.py"))):
            yield path


def test_no_method_is_named_outside_its_folder():
    found = []
    for path in files_outside_methods():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and node.value in RECIPES:
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {node.value!r}")
            if isinstance(node, ast.ImportFrom) and any(f"methods.{name}" in (node.module or "") for name in RECIPES):
                found.append(f"{path.relative_to(SOURCE)}:{node.lineno}: {node.module}")
    assert found == []


# -- a method from outside --------------------------------------------------------------------------------------------


@pytest.fixture
def fzoo(monkeypatch):
    """FZOO as papers/accelerations.py adds it."""
    monkeypatch.syspath_prepend(str(PAPERS))
    spec = importlib.util.spec_from_file_location("accelerations", PAPERS / "accelerations.py")
    before = dict(RECIPES)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "accelerations", module)
    spec.loader.exec_module(module)
    yield module.FZOO
    RECIPES.clear()
    RECIPES.update(before)


@pytest.mark.usefixtures("fzoo")
def test_a_method_from_outside_tunes_resumes_replays_and_is_shown(tmp_path, capsys):
    base, rows = tiny_gguf(tmp_path / "base.gguf"), tiny_data(tmp_path / "rows.tsv")
    options = ["--method", "fzoo", "--lr", "auto", "--q", "3", "--batch-size", "4", *TASK]
    for output, steps in (("whole", 4), ("cut", 2), ("cut", 4)):
        more = ["--resume"] if steps == 4 and output == "cut" else []
        run = tmp_path / output
        command = ["tune", str(base), str(rows), *options, "--steps", "4", "--output", str(run), *more]
        if steps == 2:
            stop_after(2, command)
        else:
            assert main(command) == 0
    whole, cut = (tmp_path / name / "model.gguf" for name in ("whole", "cut"))
    assert whole.read_bytes() == cut.read_bytes()
    journal = Journal.open(tmp_path / "whole" / "journal.db")
    assert journal.header["method"]["name"] == "fzoo"
    assert all(len(estimate.losses) == 3 for estimate in journal.estimates())
    assert main(["replay", str(base), str(tmp_path / "cut" / "journal.db"), "--output", str(tmp_path / "again.gguf")]) == 0
    assert (tmp_path / "again.gguf").read_bytes() == whole.read_bytes()
    assert "FZOO, a change of QZO" in (tmp_path / "whole" / "README.md").read_text()
    capsys.readouterr()
    assert main(["info", str(base), "--json"]) == 0
    assert "fzoo" in json.loads(capsys.readouterr().out)["tunable"]
    assert main(["plan", str(base), "--methods", "fzoo", "--json"]) == 0
    assert "fzoo" in json.loads(capsys.readouterr().out)["methods"]


def stop_after(steps, command):
    """Run a command until it has written so many steps, as if it was told to stop then."""
    from gradless.progress import ProgressLine

    def stepped(line, step):
        line.stopped = step >= steps

    original = ProgressLine.stepped
    ProgressLine.stepped = stepped
    try:
        assert main(command) == 130
    finally:
        ProgressLine.stepped = original
