"""`gradless replay`: the tuned model again from its base and its journal, without data or forwards."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from gradless.errors import GradlessError
from gradless.files import Snapshot, covers, remove, sweep
from gradless.formats.adapter import AdaptedModel, LoRA
from gradless.formats.hub import local
from gradless.formats.load import load, open_model
from gradless.formats.model import TunableModel
from gradless.journal import Journal
from gradless.methods.recipe import Setup
from gradless.methods.registry import build_method
from gradless.readers.sentences import said


def replay(model: str, journal_path: str, output: str, *, overwrite: bool = False, quiet: bool = False) -> dict[str, object]:
    """Rebuild a tuned model from its base and its journal, without data or forwards."""
    target, path = Path(output), local(model)
    journal = Journal.open(Path(journal_path))
    snapshot = Snapshot.of(path) if path.exists() else None
    lora = journal.header.get("lora")
    source: TunableModel = open_model(path) if lora is None else AdaptedModel(load(path), LoRA(**lora))
    for file in source.written(target):
        _check_free(file, [path, Path(journal_path)], overwrite=overwrite)
    check_base(path, source, journal)
    began = time.perf_counter()
    try:
        optimizer = build_method(source, Setup(journal.header["method"], journal.header["groups"]))
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
            bar = progress.add_task("replaying", total=journal.steps)
            for written in optimizer.replay(journal.estimates()):
                progress.advance(bar, len(written))
    except GradlessError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise GradlessError(
            f"{journal_path} cannot be replayed ({type(error).__name__}: {said(error)}); restore it from a copy."
        ) from error
    seconds = time.perf_counter() - began
    assert snapshot is not None
    save(source, target, snapshot, journal)
    journal.close()
    return {
        "steps": optimizer.t,
        "seconds": round(seconds, 2),
        "steps_per_second": round(optimizer.t / seconds, 1),
        "output": output,
    }


def check_base(path: Path, source: TunableModel, journal: Journal) -> None:
    """Check that a model is the base of a run.

    Raises:
        GradlessError: its weights differ, or a file beside them that describes it.
    """
    if source.fingerprint() != journal.header.get("base"):
        raise GradlessError(
            f"{path} is not the base of {journal.path}: its hash differs; give the model that the run began with."
        )
    theirs, ours = journal.header.get("base_files"), source.identity()
    if theirs is not None and theirs != ours:
        name = next(name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name))
        raise GradlessError(f"{path} is not the base of {journal.path}: its {name} differs; give the folder as it was then.")


def _check_free(target: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse a target that exists, unless it may be replaced; always refuse an input, or a folder around one."""
    sweep(target.parent)
    if any(covers(target, source) for source in inputs):
        raise GradlessError(f"{target} is, or contains, an input of the replay; give another --output.")
    if target.exists() and not overwrite:
        raise GradlessError(f"{target} exists; give --overwrite to replace it, or another --output.")
    if target.is_dir() and not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise GradlessError(f"{target} is a folder that holds no model; give another --output.")


def save(model: TunableModel, target: Path, snapshot: Snapshot, journal: Journal) -> None:
    """Write a tuned model, unless its base has changed since the run began.

    Raises:
        GradlessError: the base has changed, before or during the copy.
    """
    snapshot.check()
    if model.fingerprint() != journal.header["base"]:
        raise GradlessError(
            f"{model.path} is no longer the base of the run in {journal.path}: its hash differs, so nothing was written; put "
            "the base back and run the same command with --resume."
        )
    model.save(target)
    try:
        snapshot.check()
    except GradlessError:
        for path in model.written(target):
            remove(path)
        raise
