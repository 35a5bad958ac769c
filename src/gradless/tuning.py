"""`gradless tune`, from files to files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from rich.console import Console

from gradless import evaluation, kernels
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.evaluation import Metrics
from gradless.files import Snapshot, checksums, claim, locked, set_aside
from gradless.formats.adapter import AdaptedModel, LoRA
from gradless.formats.dense import DenseModel
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
from gradless.run import measure, quantize
from gradless.tasks.prepare import Prepared, prepare
from gradless.training.batches import MicroBatches, shared_words, token_batch
from gradless.training.loop import train
from gradless.training.options import MAY_CHANGE, RunOptions
from gradless.training.start import JOURNAL, Begun, RunSetting, check_same_run, create_journal
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


def tune(model: str, data: str, options: RunOptions, *, quiet: bool = False) -> Summary:
    """Tune a model; write the tuned model, the journal and the loss curve to `options.output`, which is locked meanwhile.

    Returns:
        A summary: `before` and `after` (metrics on --eval, if given), `steps`, `skipped`, `seconds`, `output`, `rounding`
        (losses before and after rounding scales to the file's type), `finished`.
    """
    output = Path(options.output)
    with locked(output, "a run"):
        run = _Run(model, data, options, quiet=quiet)
        run.read()
        with set_aside(output / name for name in WRITTEN if options.overwrite):
            run.choose()
            run.begin()  # the old run is only removed after this
        return run.finish() if run.train() else run.summary


class _Run:
    """A run of `gradless tune`, phase by phase.

    Attributes:
        loaded: the model; with adapters if these are tuned.
        rows, held_out: what is trained on, and measured on.
        snapshot: of the base's files.
        before: metrics of the base, if there are held-out rows.
        begun: how the run searches.
        stepper: its steps.
        summary: see `tune`.
    """

    loaded: TunableModel
    rows: Prepared
    held_out: Prepared | None
    snapshot: Snapshot
    before: Metrics | None
    begun: Begun
    stepper: Stepper
    summary: Summary

    def __init__(self, model: str, data: str, options: RunOptions, *, quiet: bool) -> None:
        self.model, self.data, self.options, self.quiet = model, data, options, quiet
        self.output = Path(options.output)
        self.base = self.output / "base" if options.quantizes else None
        self.steps = options.steps or (NO_LIMIT if options.max_minutes else DEFAULT_STEPS)
        self.say = Console(stderr=True, quiet=quiet).print

    def read(self) -> None:
        """Load the model and read the rows."""
        options = self.options
        _check_activations(options)
        _claim(self.output, options, [self.model, self.data, options.eval])
        if options.threads:
            torch.set_num_threads(options.threads)
        source = self.base if self.base is not None and options.resume else self.model
        self.say(f"loading {source}")
        self.snapshot = Snapshot.of(local(source, trust_remote_code=options.trust_remote_code))
        self.loaded = load(source, trust_remote_code=options.trust_remote_code)
        self.rows = prepare(self.data, self.loaded, options, limit=options.train_rows, shuffled=True)
        self.held_out = None
        if options.eval is not None:
            self.held_out = prepare(options.eval, self.loaded, options, split=options.eval_split, limit=options.eval_rows)
        notes = (*self.rows.notes, *(self.held_out.notes if self.held_out is not None else ()))
        for note in dict.fromkeys(notes):
            self.say(note, markup=False)

    def choose(self) -> None:
        """Quantize a dense base if the options say so, choose the method, and give the model adapters if these are tuned."""
        if self.base is not None and not self.options.resume:
            self.say(f"quantizing {self.model} to {self.base}")
            quantize(self.loaded, self.base, self.options)
            self.snapshot, self.loaded = Snapshot.of(self.base), load(self.base)
        one_word = bool(shared_words(self.loaded.model, self.rows.examples))
        self.options = options = self.options.chosen(quantized=self.loaded.quantized, one_word=one_word)
        set_activations(self.loaded.model, options.activations)
        self.say(f"method: {options.method}; {how_it_multiplies(self.loaded, options)}")
        if options.lora is not None:
            assert isinstance(self.loaded, QuantizedModel | DenseModel)
            lora = LoRA(options.lora, options.lora_alpha, options.lora_bits, options.seed)
            self.loaded = AdaptedModel(self.loaded, lora)

    def begin(self) -> None:
        """Measure the base, set the method up, and create the journal; or open the journal of the run that goes on."""
        options, loaded = self.options, self.loaded
        resumed = _first_evaluation(self.output) if options.resume and self.held_out is not None else None
        self.before = resumed
        if self.held_out is not None:
            self.before = resumed or measure(loaded, self.held_out.examples, options.batch_size, quiet=self.quiet)
            self.say(f"before: {_shown(self.before)}")
        self.batch_of = partial(token_batch, loaded.model, copies=recipe(options.method).copies(options))
        setting = RunSetting(
            loaded, options.method, options, options.seed, self.rows.examples, options.batch_size, self.batch_of
        )
        about = {
            "options": {name: value for name, value in vars(options).items() if name not in MAY_CHANGE},
            "task": self.rows.task.name,
            "data": _fingerprint(self.rows.examples),
            "base_files": loaded.identity(),
        }
        config: dict[str, object] = {"batch_size": options.batch_size, "accumulate": options.accumulate, "steps": self.steps}
        config |= {"schedule": "given", "seed": options.seed}
        journal = Journal.open(self.output / JOURNAL, to_go_on=True) if options.resume else None
        self.begun = prepare_run(setting, config, about, journal)
        if journal is None:
            journal = create_journal(self.output, self.begun.header)
        else:
            check_same_run(journal, self.begun.header, list(about), allow_changes=options.allow_changes)
        if self.before is not None and resumed is None:
            journal.evaluated(0, self.before, 0.0)
        clock = Clock(journal.seconds, None if options.max_minutes is None else 60 * options.max_minutes)
        self.stepper = Stepper(self.begun.method, journal, clock, self.snapshot)

    def train(self) -> bool:
        """Run the steps that are left; returns whether the run came to its end."""
        options, journal = self.options, self.stepper.journal
        line = ProgressLine(self.stepper, self.steps, quiet=self.quiet)
        with stopping_on_interrupt(line), line:
            for _ in self.stepper.replay():
                pass
            line.begin()
            evaluate = None if self.held_out is None else self._evaluated
            train(self.stepper, self._batches(), self.steps, options.schedule, line, evaluate, options.eval_every)
        self.summary = {
            "finished": not line.stopped,
            "steps": journal.steps,
            "skipped": self.stepper.skipped,
            "seconds": round(journal.seconds, 1),
            "output": str(self.output),
            "before": self.before,
        }
        if line.stopped:
            journal.close()
            self.say(f"stopped after step {journal.steps}. To go on, run the same command with --resume.")
        return not line.stopped

    def finish(self) -> Summary:
        """Write the tuned model, measure it, and write the card and the curve."""
        journal, target = self.stepper.journal, self.output / self.loaded.output_name
        save(self.loaded, target, self.snapshot, journal)
        written = self.loaded.written(target)
        if isinstance(self.loaded, QuantizedModel) and self.loaded.tuned:
            some = (self.held_out or self.rows).examples[:ROUNDING_EXAMPLES]
            self.summary["rounding"] = round_as_saved(self.loaded, some)
            self.say(_shown_rounding(self.summary["rounding"]))
        if self.held_out is not None:
            after = measure(self.loaded, self.held_out.examples, self.options.batch_size, quiet=self.quiet)
            self.summary["after"] = after
            journal.evaluated(journal.steps, after, journal.seconds)
            self.say(f"after:  {_shown(after)}")
        write_card(
            self.output / CARD,
            journal,
            self.stepper.skipped,
            self.before,
            self.summary.get("after"),
            model=str(self.base or self.model),
            target=target.name,
            data=self.data,
            held_out=self.options.eval,
        )
        journal.finish({name: digest for path in written for name, digest in checksums(path).items()})
        from gradless.report.curve import plot_run

        plot_run(self.output / JOURNAL, self.output / "loss.png")
        self.say(f"wrote {', '.join(map(str, written))}, {self.output / JOURNAL}, loss.png and {CARD}")
        return self.summary

    def _batches(self) -> Callable[[int], Iterator[Batch]]:
        """A step's number -> its micro-batches."""
        options, examples = self.options, self.rows.examples
        order = MicroBatches(len(examples), batch_size=options.batch_size, accumulate=options.accumulate, seed=options.seed)
        return lambda step: (self.batch_of([examples[i] for i in rows]) for rows in order.of_step(step))

    def _evaluated(self) -> Metrics:
        assert self.held_out is not None
        loaded, examples = self.loaded, self.held_out.examples
        return evaluation.evaluate(loaded.model, examples, loaded.tokenizer, batch_size=2 * self.options.batch_size)


def _check_activations(options: RunOptions) -> None:
    """Refuse fp8 activations for a method that moves the scales of groups."""
    if options.activations == "fp8" and (options.method not in RECIPES or RECIPES[options.method].moves_scales):
        moving, others = ([name for name, each in RECIPES.items() if each.moves_scales is moves] for moves in (True, False))
        raise GradlessError(
            f"{', '.join(moving)} move the scales of groups, and fp8 activations need one scale a row; "
            f"give --method {' or '.join(others)}, or leave --activations out."
        )


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
