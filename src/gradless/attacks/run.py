"""`gradless attack`: from a model and a file of images to a folder of results."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from gradless.attacks.answers import read_classes, read_labels
from gradless.attacks.base import Attack, AttackResult, Figures
from gradless.attacks.criteria import Criterion, Misclassification, TargetedMisclassification
from gradless.attacks.labels import LabelAttack
from gradless.attacks.log import QueryLog
from gradless.attacks.models import TorchModule, called, is_address, load
from gradless.attacks.onnx_file import OnnxFile
from gradless.attacks.options import AttackOptions
from gradless.attacks.oracle import Oracle, Predict
from gradless.attacks.report import write_report
from gradless.attacks.trial import Trial
from gradless.attacks.zo_sign_sgd import ZOSignSGDAttack
from gradless.attacks.zoqo import SignHunter, ZOQOAttack
from gradless.errors import GradlessError
from gradless.files import claim, locked, set_aside, write_text
from gradless.readers.npz import read_arrays

ATTACKS: dict[str, type[Attack]] = {"zoqo": ZOQOAttack, "signhunter": SignHunter, "zo_signsgd": ZOSignSGDAttack}
WRITTEN = ("queries.db", "queries.db-wal", "queries.db-shm", "result.npz", "report.html", "summary.json")
"""The files of an output folder."""
MAY_CHANGE = {"output", "resume", "overwrite", "rate", "timeout", "max_total_queries"}
"""Options that may differ when an attack is resumed."""
LATER = {"repeat": 1}
"""Options that older logs lack, with the values that they had then. A log names them only if their values differ."""


class Outcome(Figures):
    """The figures of an attack, and the paths of the files written."""

    output: str
    result: str
    report: str


def attack(model: str, images: str, options: AttackOptions, *, quiet: bool = False) -> Outcome:
    """Attack every image of a .npz file and write the results.

    Args:
        model: see `models.load`.
        images: a .npz with `images` (n, ...), floats in [0, 1] or bytes, and `labels`, see `answers.read_labels`.
        options: see `AttackOptions`.
        quiet: print nothing.

    Returns:
        `AttackResult.summary()` and the paths of the files written.

    Raises:
        GradlessError: options, images or answers that cannot be used; the answers so far are kept in queries.db.
    """
    options.check()
    pixels, labels = read_images(Path(images))
    with locked(Path(str(options.output)), "an attack"):
        return _attack(model, pixels, labels, options, quiet=quiet)


def _attack(model: str, pixels: torch.Tensor, labels: NDArray[np.generic], options: AttackOptions, *, quiet: bool) -> Outcome:
    output, method = Path(str(options.output)), make(options)
    begun = (output / "queries.db").is_file()
    claim(output, "an attack", held=begun, resume=options.resume, overwrite=options.overwrite)
    pixels = method.checked(pixels)
    goal = TargetedMisclassification if options.targeted else Misclassification
    criterion = goal(read_labels(labels, len(pixels)))
    predict = load(model, rate=options.rate, timeout=options.timeout)
    header = {name: value for name, value in asdict(options).items() if name not in MAY_CHANGE}
    header = {name: value for name, value in header.items() if name not in LATER or value != LATER[name]}
    header["model"], header["images"] = called(model), hashlib.sha256(pixels.numpy().tobytes() + labels.tobytes()).hexdigest()
    with set_aside(output / name for name in WRITTEN if options.overwrite) as drop:
        log = QueryLog(output / "queries.db", header)
        try:
            with Line(len(pixels), quiet=quiet) as line:
                asked = _Model(predict, log.path)
                if isinstance(predict, TorchModule | OnnxFile):
                    line.say(_right(asked, pixels, criterion, options))
                trial = Trial(is_address(model), line.say) if options.repeat == 1 else None
                result = method.attack(asked, pixels, criterion, log=log, progress=line, trial=trial)
                at_once = int((result.success & (result.queries <= options.repeat)).sum())
                if 2 * at_once > len(pixels):
                    why = "does the model get them wrong as they are?"
                    line.say(f"{at_once} of {len(pixels)} images were found by their first query: {why}")
        finally:
            log.close()
            if log.calls:
                drop()
    return _write(output, header, pixels, criterion.classes, result)


def _right(predict: Predict, images: torch.Tensor, criterion: Criterion, options: AttackOptions) -> str:
    """A sentence on how many of the unchanged images the model takes for the criterion's classes. These calls do not count."""
    agreed, size = 0, options.batch_size
    with torch.no_grad():
        for start in range(0, len(images), size):
            classes = read_classes(predict(images[start : start + size].clone()), len(images[start : start + size]))
            agreed += int((classes == criterion.classes[start : start + size]).sum())
    what = "takes for their targets" if options.targeted else "is right on"
    return f"the model {what} {agreed} of {len(images)} images as they are"


@dataclass
class _Model:
    """The model, wrapped so that its own exceptions become a `GradlessError` that names the log."""

    predict: Predict
    log: Path

    def __call__(self, batch: object) -> object:
        try:
            return self.predict(batch)
        except GradlessError:
            raise
        except Exception as error:
            raise GradlessError(
                f"the model failed ({type(error).__name__}: {error}); its answers so far are in {self.log}: fix it and "
                "run the same command with --resume."
            ) from error


def make(options: AttackOptions) -> Attack:
    """The attack that the options name."""
    more: dict[str, Any] = {} if options.method != "zoqo" else {"directions": options.directions}
    if options.method != "signhunter":
        more["bits"] = 8 if options.bits is None and options.method == "zoqo" else options.bits
    shared = ("norm", "pixel_bits", "max_queries", "max_total_queries", "batch_size", "repeat", "seed")
    assert options.eps is not None
    more |= {name: getattr(options, name) for name in shared}
    if options.labels_only:
        del more["directions"]
        return LabelAttack(options.eps, **more)
    return ATTACKS[options.method](options.eps, **more)


def read_images(path: Path) -> tuple[torch.Tensor, NDArray[np.generic]]:
    """Images, fp32, and labels of a .npz file; bytes are divided by 255.

    Raises:
        GradlessError: it cannot be read, lacks one of the two, or its images are neither floats nor bytes.
    """
    arrays = read_arrays(path, ("images", "labels"))
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 and images.dtype.kind != "f":
        raise GradlessError(f"{path} is no .npz with arrays `images` of floats in [0, 1] or of bytes: they are {images.dtype}.")
    whole = images.dtype == np.uint8
    return torch.from_numpy(np.asarray(images.astype(np.float32) / (255 if whole else 1))), labels


def _write(
    output: Path, header: dict[str, object], images: torch.Tensor, labels: torch.Tensor, result: AttackResult
) -> Outcome:
    result.save(output / "result.npz")
    write_report(output / "report.html", header, images, labels, result)
    summary = result.summary()
    write_text(output / "summary.json", json.dumps({**header, **summary}, indent=2) + "\n")
    return {**summary, "output": str(output), "result": str(output / "result.npz"), "report": str(output / "report.html")}


class Line:
    """A live line: images done, images found and median queries so far."""

    EVERY_SECONDS = 10.0
    """Seconds between two printed lines if the output is no terminal."""

    def __init__(self, images: int, *, quiet: bool) -> None:
        self.quiet, self.console = quiet, Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )
        self.bar = self.progress.add_task("", total=images, text="")
        self.printed = time.perf_counter()

    def __call__(self, oracle: Oracle) -> None:
        found, queries = oracle.found, oracle.queries
        done = int((~oracle.open(torch.arange(len(found)))).sum())
        text = f"{int(found.sum())} of {int((queries > 0).sum())} found"
        if bool(found.any()):
            text += f"  median queries {int(queries[found].median())}"
        text += f"  {int(queries.sum())} queries"
        self.progress.update(self.bar, completed=done, text=text)
        now = time.perf_counter()
        if not self.console.is_terminal and now - self.printed > self.EVERY_SECONDS:
            self.printed = now
            self.say(text)

    def say(self, text: str) -> None:
        """Print a sentence above the line."""
        if not self.quiet:
            self.console.print(text, highlight=False, markup=False)

    def __enter__(self) -> Line:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()
