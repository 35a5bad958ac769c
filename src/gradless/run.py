"""A run from files to files: what `gradless tune`, `eval` and `replay` do."""

from __future__ import annotations

import hashlib
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress

from gradless import evaluation, kernels, noise, objectives
from gradless.errors import GradlessError
from gradless.files import Snapshot, checksums, claim, covers, locked, remove, set_aside
from gradless.formats import packed
from gradless.formats.adapter import AdaptedModel, LoRA, attach_peft
from gradless.formats.dense import DenseModel
from gradless.formats.folder import WEIGHTS, Folder, is_quantized
from gradless.formats.folder_model import load_folder
from gradless.formats.gguf import GGUFFile
from gradless.formats.gguf_model import load_gguf
from gradless.formats.hub import local
from gradless.formats.quantized import QuantizedModel
from gradless.journal import Journal
from gradless.layers import set_activations
from gradless.objectives import TokenizedExample
from gradless.readers.sentences import said
from gradless.report.card import write_card
from gradless.spaces import Space
from gradless.tasks.data import read_rows
from gradless.tasks.prompts import Task, choose_task, naming
from gradless.training.options import CODES, MAY_CHANGE, MethodOptions, RunOptions, grid_name

if TYPE_CHECKING:  # transformers' trainer takes more than a second to import
    from gradless.training.trainer import ZOTrainer

DEFAULT_STEPS = 1000
CARD = "README.md"
WRITTEN = (
    CARD,
    "journal.db",
    "journal.db-wal",
    "journal.db-shm",
    "loss.png",
    "model.gguf",
    "model",
    "base",
    "adapter",
    "adapter.gguf",
)
"""What a run may write into its output folder."""
ROUNDING_EXAMPLES = 128


@dataclass(frozen=True)
class Prepared:
    """Tokenized examples, the task that made them, and facts about the data that a user should be told of."""

    examples: list[TokenizedExample]
    task: Task
    notes: list[str]


Model = QuantizedModel | DenseModel | AdaptedModel


def load_model(model: str | Path, *, trust_remote_code: bool = False) -> QuantizedModel | DenseModel:
    """Load a GGUF file, or a folder of a quantized or a dense model, by its path or its name on the Hub."""
    path = local(model, trust_remote_code=trust_remote_code)
    if not path.is_dir():
        return _noted(load_gguf(path))
    load = load_folder if is_quantized(path) else DenseModel.load
    return _noted(load(path, trust_remote_code=trust_remote_code))


def open_model(path: Path) -> Model:
    """What a replay needs of a model: the tensors, and no module around them where they are packed."""
    if path.is_dir() and not is_quantized(path):
        return _noted(DenseModel.load(path))
    return QuantizedModel(Folder.open(path) if path.is_dir() else GGUFFile.open(path))


LoadedModel = TypeVar("LoadedModel", bound=QuantizedModel | DenseModel)


def _noted(loaded: LoadedModel) -> LoadedModel:
    """A loaded model, and on standard error what its user should know of it."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded


def prepare(
    source: str,
    loaded: Model,
    options: RunOptions,
    *,
    split: str | None = None,
    limit: int | None = None,
    shuffled: bool = False,
) -> Prepared:
    """Read rows, make examples and tokenize them.

    Args:
        source: of the rows.
        loaded: the model, for its tokenizer and context.
        options: the run's.
        split: of a data set that is given by name; None for the options'.
        limit: use so many rows only.
        shuffled: take them in the seed's order, not the first.
    """
    rows = read_rows(source, split=split or options.split)
    order = list(range(len(rows)))
    if shuffled and limit is not None:
        order = noise.permutation(options.seed, 0, len(rows)).tolist()
    order = order[:limit]
    labels = None if options.labels is None else _parse_labels(options.labels)
    template = None if options.template is None else options.template.replace("\\n", "\n")
    task = choose_task(options.task, template, labels, rows[order[0]], loaded.tokenizer, options.train_on)
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or 2**31
    context = context if context > 0 else 2**31  # XLNet's -1 is no limit
    examples: list[TokenizedExample] = []
    remarks = Counter[str]()
    for i in order:
        with naming(source, i + 1):
            made = task.examples_of(rows[i])
            tokens = [
                objectives.tokenize(example, loaded.tokenizer, context=context, max_length=options.max_length)
                for example in made
            ]
        remarks.update(set().union(*(example.remarks for example in made)))
        remarks["nothing to learn in it"] += not made
        remarks["what is longer than --max-length is not learned"] += any(each.shortened for each in tokens)
        examples += tokens
    if not examples:
        raise GradlessError(f"{source} holds nothing to learn: no row makes an example.")
    notes = [f"{source}: {n} of {len(order)} rows: {remark}" for remark, n in remarks.items() if n]
    if unread := task.unread(rows[i] for i in order):
        notes.append(f"{source}: not read: {', '.join(unread)}")
    return Prepared(examples, task, notes)


def _parse_labels(text: str) -> dict[str, str]:
    pairs = [pair.split("=", 1) for pair in text.split(",")]
    if any(len(pair) != 2 or not pair[0] or not pair[1] for pair in pairs):
        raise GradlessError(f"--labels {text!r} is not of the form 0=terrible,1=great.")
    labels = {label.strip(): word.strip() for label, word in pairs}
    if len(labels) < len(pairs):
        raise GradlessError(f"--labels {text!r} names a label twice; keep one of the two.")
    return labels


def evaluate(model: str, data: str, options: RunOptions, *, adapter: str | None = None, quiet: bool = False) -> dict[str, Any]:
    """Measure a model on rows, with a PEFT folder's adapter where one is given.

    Returns:
        `accuracy`, `f1`, `loss`, `examples`, `seconds`.
    """
    loaded = load_model(model, trust_remote_code=options.trust_remote_code)
    set_activations(loaded.model, options.activations)
    if adapter is not None:
        attach_peft(loaded, Path(adapter))
    prepared = prepare(data, loaded, options, limit=options.eval_rows)
    for note in prepared.notes:
        Console(stderr=True, quiet=quiet).print(note, markup=False)
    return measure(loaded, prepared.examples, options.batch_size, quiet=quiet)


def measure(loaded: Model, examples: list[TokenizedExample], batch_size: int, *, quiet: bool = False) -> dict[str, Any]:
    """Metrics of a loaded model on examples, with a progress bar."""
    began = time.perf_counter()
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        bar = progress.add_task("evaluating", total=len(examples))
        metrics = evaluation.evaluate(
            loaded.model, examples, loaded.tokenizer, batch_size=batch_size, progress=lambda n: progress.advance(bar, n)
        )
    return {**metrics, "examples": len(examples), "seconds": round(time.perf_counter() - began, 2)}


def tune(model: str, data: str, options: RunOptions, *, quiet: bool = False) -> dict[str, Any]:
    """Tune a model; write the tuned model, the journal and the loss curve to `options.output`, which is ours meanwhile.

    Returns:
        A summary: `before` and `after` (metrics on --eval, where given), `steps`, `skipped`, `seconds`, `output`,
        `rounding` (losses before and after scales were rounded to the file's type), `finished`.
    """
    with locked(Path(options.output), "a run"):
        return _tune(model, data, options, quiet=quiet)


def _tune(model: str, data: str, options: RunOptions, *, quiet: bool) -> dict[str, Any]:
    from transformers import PrinterCallback

    from gradless.progress import NO_LIMIT, ProgressLine, stopping_on_interrupt
    from gradless.training.trainer import shared_words

    output = Path(options.output)
    if options.activations == "fp8" and options.method not in (*CODES, "mezo"):
        raise GradlessError(
            "qzo, nzo and ezo move the scales of groups, and fp8 activations need one scale a row; "
            "give --method quzo or zoqo, or leave --activations out."
        )
    _claim(output, options, [model, data, options.eval])
    if options.threads:
        torch.set_num_threads(options.threads)
    say = Console(stderr=True, quiet=quiet).print
    base = output / "base" if options.quantizes else None
    source = base if base is not None and options.resume else model
    say(f"loading {source}")
    snapshot = Snapshot.of(local(source, trust_remote_code=options.trust_remote_code))
    loaded: Model = load_model(source, trust_remote_code=options.trust_remote_code)
    train = prepare(data, loaded, options, limit=options.train_rows, shuffled=True)
    held_out = (
        None
        if options.eval is None
        else prepare(options.eval, loaded, options, split=options.eval_split, limit=options.eval_rows)
    )
    for note in dict.fromkeys((*train.notes, *(held_out.notes if held_out is not None else ()))):
        say(note, markup=False)
    with set_aside(output / name for name in WRITTEN if options.overwrite):
        if base is not None and not options.resume:
            say(f"quantizing {model} to {base}")
            quantize(loaded, base, options)
            snapshot, loaded = Snapshot.of(base), load_model(base)
        options = options.chosen(quantized=loaded.quantized, one_word=bool(shared_words(loaded.model, train.examples)))
        set_activations(loaded.model, options.activations)
        say(f"method: {options.method}; {how_it_multiplies(loaded, options)}")
        if options.lora is not None:
            assert not isinstance(loaded, AdaptedModel)
            loaded = AdaptedModel(loaded, LoRA(options.lora, options.lora_alpha, options.lora_bits, options.seed))

        steps = options.steps or (NO_LIMIT if options.max_minutes else DEFAULT_STEPS)
        before = resumed = None
        if held_out is not None:
            resumed = _first_evaluation(output) if options.resume else None
            before = resumed or measure(loaded, held_out.examples, options.batch_size, quiet=quiet)
            say(f"before: {_shown(before)}")
        trainer = _make_trainer(loaded, train, held_out, options, steps, output)
        trainer.snapshot = snapshot
        if not options.resume:
            trainer.begin()  # what is replaced goes only then
    line = ProgressLine(trainer, options, None if resumed else before, quiet=quiet)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(line)
    with stopping_on_interrupt(line), line:
        trainer.train(resume_from_checkpoint=str(output) if options.resume else None)
    journal = trainer.journal
    assert journal is not None
    summary: dict[str, Any] = {
        "finished": not line.interrupted,
        "steps": journal.steps,
        "skipped": trainer.skipped,
        "seconds": round(journal.seconds, 1),
        "output": str(output),
        "before": before,
    }
    if line.interrupted:
        journal.close()
        say(f"stopped after step {journal.steps}. To go on, run the same command with --resume.")
        return summary

    target = output / loaded.output_name
    _save(loaded, target, trainer.zeroth_order.spaces, snapshot, journal)
    written = _written(loaded, target)
    if isinstance(loaded, QuantizedModel) and loaded.tuned:
        some = (held_out or train).examples[:ROUNDING_EXAMPLES]
        summary["rounding"] = round_as_saved(loaded, some)
        say(_shown_rounding(summary["rounding"]))
    if held_out is not None:
        summary["after"] = measure(loaded, held_out.examples, options.batch_size, quiet=quiet)
        journal.evaluated(journal.steps, summary["after"], journal.seconds)
        say(f"after:  {_shown(summary['after'])}")
    write_card(output / CARD, journal, summary, model=str(base or model), target=target.name, data=data, held_out=options.eval)
    journal.finish({name: digest for path in written for name, digest in checksums(path).items()})
    from gradless.report.curve import plot_run

    plot_run(output / "journal.db", output / "loss.png")
    say(f"wrote {', '.join(map(str, written))}, {output / 'journal.db'}, loss.png and {CARD}")
    return summary


def how_it_multiplies(loaded: Model, options: RunOptions) -> str:
    """Which arithmetic the linear layers' forwards use, in a sentence."""
    if not isinstance(loaded, QuantizedModel):
        return "linear layers: dense weights"
    types = sorted({loaded.file.quantized[name].type_name for name in loaded.linear_layers()})
    if options.activations == "int8":
        return (
            f"linear layers: int8 activations times the codes of {', '.join(types)}, in integers ({kernels.name()} kernels); "
            "a head that scores single words stays in fp32"
        )
    if options.activations == "fp8":
        return f"linear layers: fp8 activations times the floats of {', '.join(types)}, as 8-bit floats (torch._scaled_mm)"
    return f"linear layers: {', '.join(types)} unpacked to bf16 ({kernels.name()} kernels)"


def quantize(loaded: Model, output: Path, options: RunOptions) -> dict[str, Any]:
    """Round a dense model's linear layers to the grid that the options name; write a packed folder."""
    grid, group = grid_name(options), None if options.group_size == "channel" else int(options.group_size)
    if not isinstance(loaded, DenseModel):
        raise GradlessError(
            f"{loaded.path} is no dense folder; only those are quantized (a GGUF file: gradless dequantize first)."
        )
    packed.quantize(loaded.model, loaded.tokenizer, grid, group, output, search=options.search)
    return {"output": str(output), "grid": grid, "bytes": (output / WEIGHTS).stat().st_size}


def _claim(output: Path, options: RunOptions, inputs: list[str | None]) -> None:
    """Refuse an output folder that holds a run, unless told what to do with it, or that would replace an input."""
    journal = output / "journal.db"
    for source in inputs:
        if source is not None and Path(source).resolve() in [(output / name).resolve() for name in WRITTEN]:
            raise GradlessError(f"{source} lies where {output} would be written; give another --output.")
    claim(output, "a run", held=Journal.is_begun(journal), resume=options.resume, overwrite=options.overwrite)


def _make_trainer(
    loaded: Model,
    train: Prepared,
    held_out: Prepared | None,
    options: RunOptions,
    steps: int,
    output: Path,
) -> ZOTrainer:
    from gradless.training.trainer import ZOConfig, ZOTrainer

    config = ZOConfig(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=2 * options.batch_size,
        gradient_accumulation_steps=options.accumulate,
        eval_strategy="no" if held_out is None else "steps",
        eval_steps=options.eval_every,
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        **{field.name: getattr(options, field.name) for field in fields(MethodOptions)},
        seed=options.seed,
    )
    shown = {name: value for name, value in vars(options).items() if name not in MAY_CHANGE}
    trainer = ZOTrainer(
        loaded.model,
        config,
        train_dataset=train.examples,
        eval_dataset=None if held_out is None else held_out.examples,
        checkpoint=loaded,
        processing_class=loaded.tokenizer,
        about={
            "options": shown,
            "task": train.task.name,
            "data": _fingerprint(train.examples),
            "base_files": loaded.identity(),
        },
    )
    trainer.allow_changes = options.allow_changes
    trainer.max_seconds = None if options.max_minutes is None else 60 * options.max_minutes
    trainer.schedule = _schedule(options, steps, trainer)
    return trainer


def _schedule(options: RunOptions, steps: int, trainer: ZOTrainer) -> Callable[[int], float]:
    """The factor of lr after so many steps; with --max-minutes, after so much of the time, whichever is further."""

    def factor(step: int) -> float:
        of_time = trainer.seconds / trainer.max_seconds if trainer.max_seconds else 0.0
        done = min(max(step / steps, of_time), 1.0)
        return {"linear": 1 - done, "constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2}[options.schedule]

    return factor


def _save(model: Model, target: Path, spaces: list[Space], snapshot: Snapshot, journal: Journal) -> None:
    """Write a tuned model, unless its base is no longer what the journal's steps were made with.

    Raises:
        GradlessError: the base was changed, before or while it was copied.
    """
    snapshot.check()
    if model.fingerprint() != journal.header["base"]:
        raise GradlessError(
            f"{model.path} is no longer what the run in {journal.path} began with: its hash differs, so that nothing was "
            "written; put it back and run the same command with --resume."
        )
    model.save(target, spaces)
    try:
        snapshot.check()
    except GradlessError:
        for path in _written(model, target):
            remove(path)
        raise


def _fingerprint(examples: list[TokenizedExample]) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()


def _first_evaluation(output: Path) -> dict[str, float] | None:
    journal = Journal.open(output / "journal.db", to_go_on=True)
    found = [row for row in journal.evaluations() if row["step"] == 0]
    journal.close()
    return found[0] if found else None


def round_as_saved(loaded: QuantizedModel, examples: list[TokenizedExample]) -> dict[str, Any]:
    """Round the tuned block values as the saved file holds them, and measure what that costs.

    Returns:
        `before` and `after`: mean loss over the examples with fp32 values and with the file's own; `by_type`: the loss when
        only the tensors of one type are rounded, minus `before`. (An offset that is tuned together with its scale keeps its
        fp32 value here; in the file it is rounded too.)
    """
    types = sorted({weight.type_name for weight in loaded.tuned})

    def loss(rounded: list[str]) -> float:
        with ExitStack() as as_saved:
            for weight in loaded.tuned:
                if weight.type_name in rounded:
                    as_saved.enter_context(weight.read_at(loaded.file.saved(weight).to(weight.packed.device)))
            return evaluation.evaluate(loaded.model, examples, loaded.tokenizer, generating=False)["loss"]

    before = loss([])
    each = {name: loss([name]) - before for name in types} if len(types) > 1 else {}
    for weight in loaded.tuned:
        weight.tuned_values.values = loaded.file.saved(weight).to(weight.packed.device)
    after = loss([])
    by_type = each or dict.fromkeys(types, after - before)
    return {"before": before, "after": after, "by_type": by_type, "examples": len(examples)}


def replay(model: str, journal_path: str, output: str, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Rebuild a tuned model from its base and its journal, without data or forwards."""
    from gradless.training.trainer import build_optimizer

    target, path = Path(output), local(model)
    journal = Journal.open(Path(journal_path))
    snapshot = Snapshot.of(path) if path.exists() else None
    lora = journal.header.get("lora")
    source = open_model(path) if lora is None else AdaptedModel(load_model(path), LoRA(**lora))
    for file in _written(source, target):
        _check_free(file, [path, Path(journal_path)], overwrite=overwrite)
    check_base(path, source, journal)
    began = time.perf_counter()
    try:
        optimizer = build_optimizer(source, journal.header["groups"], journal.header["method"])
        with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
            bar = progress.add_task("replaying", total=journal.steps)
            for written in optimizer.replay(journal.estimates()):
                progress.advance(bar, len(written))
    except GradlessError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError, AssertionError) as error:
        raise GradlessError(
            f"{journal_path} is of no run that can be replayed ({type(error).__name__}: {said(error)}); restore it from a copy."
        ) from error
    seconds = time.perf_counter() - began
    assert snapshot is not None
    _save(source, target, optimizer.spaces, snapshot, journal)
    journal.close()
    return {
        "steps": optimizer.t,
        "seconds": round(seconds, 2),
        "steps_per_second": round(optimizer.t / seconds, 1),
        "output": output,
    }


def check_base(path: Path, source: Model, journal: Journal) -> None:
    """Raise unless a model is the one that a run began with.

    Raises:
        GradlessError: its weights differ, or a file beside them that says what it is.
    """
    if source.fingerprint() != journal.header.get("base"):
        raise GradlessError(
            f"{path} is not the base of {journal.path}: its hash differs; give the model that the run began with."
        )
    theirs, ours = journal.header.get("base_files"), source.identity()
    if theirs is not None and theirs != ours:
        name = next(name for name in sorted({*theirs, *ours}) if theirs.get(name) != ours.get(name))
        raise GradlessError(f"{path} is not the base of {journal.path}: its {name} differs; give the folder as it was then.")


def _written(model: Model, target: Path) -> list[Path]:
    """What saving a model to `target` writes."""
    return model.written(target) if isinstance(model, AdaptedModel) else [target]


def _check_free(target: Path, inputs: list[Path], *, overwrite: bool) -> None:
    """Refuse to write where something is, unless it may be replaced; never over an input, nor a folder around one."""
    if any(covers(target, source) for source in inputs):
        raise GradlessError(f"{target} is, or holds, what the replay reads; give another --output.")
    if target.exists() and not overwrite:
        raise GradlessError(f"{target} exists; give --overwrite to replace it, or another --output.")
    if target.is_dir() and not any((target / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise GradlessError(f"{target} is a folder that holds no model; give another --output.")


def _shown(metrics: dict[str, Any]) -> str:
    accuracy = f"accuracy {metrics['accuracy']:.4f}, " if "accuracy" in metrics else ""
    return f"{accuracy}loss {metrics['loss']:.4f}"


def _shown_rounding(report: dict[str, Any]) -> str:
    shares = ", ".join(f"{name} {change:+.5f}" for name, change in report["by_type"].items())
    return (
        f"rounding to what the file holds: loss {report['before']:.5f} -> {report['after']:.5f} "
        f"on {report['examples']} examples ({shares})"
    )
