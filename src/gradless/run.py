"""`gradless tune`, `eval` and `quantize`, from files to files."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from rich.console import Console
from rich.progress import Progress

from gradless import evaluation, kernels
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.evaluation import Metrics
from gradless.files import Snapshot, checksums, claim, locked, set_aside
from gradless.formats import packed
from gradless.formats.adapter import AdaptedModel, LoRA, attach_peft
from gradless.formats.dense import DenseModel
from gradless.formats.folder import WEIGHTS
from gradless.formats.hub import local
from gradless.formats.load import load
from gradless.formats.model import TunableModel
from gradless.formats.quantized import QuantizedModel
from gradless.journal import Journal
from gradless.layers import set_activations
from gradless.methods.registry import RECIPES, recipe
from gradless.objectives import TokenizedExample
from gradless.progress import NO_LIMIT, ProgressLine, stopping_on_interrupt
from gradless.replaying import save
from gradless.report.card import write_card
from gradless.tasks.prepare import prepare
from gradless.training.batches import MicroBatches, shared_words, token_batch
from gradless.training.loop import train as train_loop
from gradless.training.options import MAY_CHANGE, RunOptions, grid_name
from gradless.training.start import JOURNAL, RunSetting, check_same_run, create_journal
from gradless.training.start import prepare as prepare_run
from gradless.training.stepper import Clock, Stepper

DEFAULT_STEPS = 1000
CARD = "README.md"
WRITTEN = (
    CARD,
    JOURNAL,
    JOURNAL + "-wal",
    JOURNAL + "-shm",
    "loss.png",
    "model.gguf",
    "model",
    "base",
    "adapter",
    "adapter.gguf",
)
"""Names that a run may write into its output folder."""
ROUNDING_EXAMPLES = 128
"""Number of examples on which the cost of rounding to the file's types is measured."""


class Rounding(TypedDict):
    """The cost of rounding to the file's types; see `round_as_saved`."""

    before: float
    after: float
    by_type: dict[str, float]
    examples: int


class Summary(TypedDict):
    """The result of a run; see `tune`."""

    finished: bool
    steps: int
    skipped: int
    seconds: float
    output: str
    before: Metrics | None
    rounding: NotRequired[Rounding]
    after: NotRequired[Metrics]


def evaluate(model: str, data: str, options: RunOptions, *, adapter: str | None = None, quiet: bool = False) -> Metrics:
    """Measure a model on rows, with the adapter of a PEFT folder if one is given.

    Returns:
        `accuracy`, `f1`, `loss`, `examples`, `seconds`.
    """
    loaded = load(model, trust_remote_code=options.trust_remote_code)
    set_activations(loaded.model, options.activations)
    if adapter is not None:
        attach_peft(loaded, Path(adapter))
    prepared = prepare(data, loaded, options, limit=options.eval_rows)
    for note in prepared.notes:
        Console(stderr=True, quiet=quiet).print(note, markup=False)
    return measure(loaded, prepared.examples, options.batch_size, quiet=quiet)


def measure(loaded: TunableModel, examples: list[TokenizedExample], batch_size: int, *, quiet: bool = False) -> Metrics:
    """Metrics of a loaded model on examples, with a progress bar."""
    began = time.perf_counter()
    with Progress(console=Console(stderr=True), disable=quiet, transient=True) as progress:
        bar = progress.add_task("evaluating", total=len(examples))
        metrics = evaluation.evaluate(
            loaded.model, examples, loaded.tokenizer, batch_size=batch_size, progress=lambda n: progress.advance(bar, n)
        )
    return {**metrics, "examples": len(examples), "seconds": round(time.perf_counter() - began, 2)}


def tune(model: str, data: str, options: RunOptions, *, quiet: bool = False) -> Summary:
    """Tune a model; write the tuned model, the journal and the loss curve to `options.output`, which is locked meanwhile.

    Returns:
        A summary: `before` and `after` (metrics on --eval, if given), `steps`, `skipped`, `seconds`, `output`, `rounding`
        (losses before and after rounding scales to the file's type), `finished`.
    """
    with locked(Path(options.output), "a run"):
        return _tune(model, data, options, quiet=quiet)


def _tune(model: str, data: str, options: RunOptions, *, quiet: bool) -> Summary:
    output = Path(options.output)
    if options.activations == "fp8" and (options.method not in RECIPES or RECIPES[options.method].moves_scales):
        moving, others = ([name for name, each in RECIPES.items() if each.moves_scales is moves] for moves in (True, False))
        raise GradlessError(
            f"{', '.join(moving)} move the scales of groups, and fp8 activations need one scale a row; "
            f"give --method {' or '.join(others)}, or leave --activations out."
        )
    _claim(output, options, [model, data, options.eval])
    if options.threads:
        torch.set_num_threads(options.threads)
    say = Console(stderr=True, quiet=quiet).print
    base = output / "base" if options.quantizes else None
    source = base if base is not None and options.resume else model
    say(f"loading {source}")
    snapshot = Snapshot.of(local(source, trust_remote_code=options.trust_remote_code))
    loaded: TunableModel = load(source, trust_remote_code=options.trust_remote_code)
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
            snapshot, loaded = Snapshot.of(base), load(base)
        options = options.chosen(quantized=loaded.quantized, one_word=bool(shared_words(loaded.model, train.examples)))
        set_activations(loaded.model, options.activations)
        say(f"method: {options.method}; {how_it_multiplies(loaded, options)}")
        if options.lora is not None:
            assert isinstance(loaded, QuantizedModel | DenseModel)
            loaded = AdaptedModel(loaded, LoRA(options.lora, options.lora_alpha, options.lora_bits, options.seed))

        steps = options.steps or (NO_LIMIT if options.max_minutes else DEFAULT_STEPS)
        before = resumed = None
        if held_out is not None:
            resumed = _first_evaluation(output) if options.resume else None
            before = resumed or measure(loaded, held_out.examples, options.batch_size, quiet=quiet)
            say(f"before: {_shown(before)}")
        copies = recipe(options.method).copies(options)
        batch_of = partial(token_batch, loaded.model, copies=copies)
        setting = RunSetting(loaded, options.method, options, options.seed, train.examples, options.batch_size, batch_of)
        about = {
            "options": {name: value for name, value in vars(options).items() if name not in MAY_CHANGE},
            "task": train.task.name,
            "data": _fingerprint(train.examples),
            "base_files": loaded.identity(),
        }
        config = {"batch_size": options.batch_size, "accumulate": options.accumulate, "steps": steps, "schedule": "given"}
        journal = Journal.open(output / JOURNAL, to_go_on=True) if options.resume else None
        begun = prepare_run(setting, {**config, "seed": options.seed}, about, journal)
        if journal is None:
            journal = create_journal(output, begun.header)  # the old run is only removed after this
        else:
            check_same_run(journal, begun.header, list(about), allow_changes=options.allow_changes)
    if before is not None and resumed is None:
        journal.evaluated(0, before, 0.0)
    clock = Clock(journal.seconds, None if options.max_minutes is None else 60 * options.max_minutes)
    stepper = Stepper(begun.method, journal, clock, snapshot)
    order = MicroBatches(len(train.examples), batch_size=options.batch_size, accumulate=options.accumulate, seed=options.seed)

    def batches(step: int) -> Iterator[Batch]:
        return (batch_of([train.examples[i] for i in rows]) for rows in order.of_step(step))

    def evaluated() -> Metrics:
        assert held_out is not None
        return evaluation.evaluate(loaded.model, held_out.examples, loaded.tokenizer, batch_size=2 * options.batch_size)

    line = ProgressLine(stepper, steps, quiet=quiet)
    with stopping_on_interrupt(line), line:
        for _ in stepper.replay():
            pass
        line.begin()
        measured = None if held_out is None else evaluated
        train_loop(stepper, batches, steps, options.schedule, line, measured, options.eval_every)
    summary: Summary = {
        "finished": not line.stopped,
        "steps": journal.steps,
        "skipped": stepper.skipped,
        "seconds": round(journal.seconds, 1),
        "output": str(output),
        "before": before,
    }
    if line.stopped:
        journal.close()
        say(f"stopped after step {journal.steps}. To go on, run the same command with --resume.")
        return summary

    target = output / loaded.output_name
    save(loaded, target, snapshot, journal)
    written = loaded.written(target)
    if isinstance(loaded, QuantizedModel) and loaded.tuned:
        some = (held_out or train).examples[:ROUNDING_EXAMPLES]
        summary["rounding"] = round_as_saved(loaded, some)
        say(_shown_rounding(summary["rounding"]))
    if held_out is not None:
        summary["after"] = measure(loaded, held_out.examples, options.batch_size, quiet=quiet)
        journal.evaluated(journal.steps, summary["after"], journal.seconds)
        say(f"after:  {_shown(summary['after'])}")
    write_card(
        output / CARD,
        journal,
        stepper.skipped,
        before,
        summary.get("after"),
        model=str(base or model),
        target=target.name,
        data=data,
        held_out=options.eval,
    )
    journal.finish({name: digest for path in written for name, digest in checksums(path).items()})
    from gradless.report.curve import plot_run

    plot_run(output / JOURNAL, output / "loss.png")
    say(f"wrote {', '.join(map(str, written))}, {output / 'journal.db'}, loss.png and {CARD}")
    return summary


def how_it_multiplies(loaded: TunableModel, options: RunOptions) -> str:
    """The arithmetic of the linear layers' forwards, in a sentence."""
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


def quantize(loaded: TunableModel, output: Path, options: RunOptions) -> dict[str, object]:
    """Round a dense model's linear layers to the grid that the options name; write a packed folder."""
    grid, group = grid_name(options), None if options.group_size == "channel" else int(options.group_size)
    if not isinstance(loaded, DenseModel):
        raise GradlessError(
            f"{loaded.path} is not a dense folder, and only these are quantized; run gradless dequantize on a GGUF file first."
        )
    packed.quantize(loaded.model, loaded.tokenizer, grid, group, output, search=options.search)
    return {"output": str(output), "grid": grid, "bytes": (output / WEIGHTS).stat().st_size}


def _claim(output: Path, options: RunOptions, inputs: list[str | None]) -> None:
    """Refuse an output folder that would replace an input, or that holds a run, unless an option says what to do with it."""
    journal = output / JOURNAL
    for source in inputs:
        if source is not None and Path(source).resolve() in [(output / name).resolve() for name in WRITTEN]:
            raise GradlessError(f"{source} lies where {output} would be written; give another --output.")
    claim(output, "a run", held=Journal.is_begun(journal), resume=options.resume, overwrite=options.overwrite)


def _fingerprint(examples: list[TokenizedExample]) -> str:
    return hashlib.sha256(repr(examples).encode()).hexdigest()


def _first_evaluation(output: Path) -> Metrics | None:
    journal = Journal.open(output / JOURNAL, to_go_on=True)
    found = [row for row in journal.evaluations() if row["step"] == 0]
    journal.close()
    return found[0] if found else None


def round_as_saved(loaded: QuantizedModel, examples: list[TokenizedExample]) -> Rounding:
    """Round the tuned block values to the saved file's types, and measure the cost.

    Returns:
        `before` and `after`: the mean loss over the examples with fp32 values and with the file's; `by_type`: the loss with the
        tensors of only one type rounded, minus `before`. (An offset that is tuned together with its scale keeps its fp32 value
        here; in the file it is rounded too.)
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


def _shown(metrics: Metrics) -> str:
    accuracy = f"accuracy {metrics['accuracy']:.4f}, " if "accuracy" in metrics else ""
    return f"{accuracy}loss {metrics['loss']:.4f}"


def _shown_rounding(report: Rounding) -> str:
    shares = ", ".join(f"{name} {change:+.5f}" for name, change in report["by_type"].items())
    return (
        f"rounding to the file's types: loss {report['before']:.5f} -> {report['after']:.5f} "
        f"on {report['examples']} examples ({shares})"
    )
