"""One cell of docs/models.md: an architecture in a format, from the folder to the byte-equal replay of what was tuned.

A cell works, or it is refused in one sentence. What is neither is a fault, and is named by the check that found it.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gradless import objectives, run
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.dense import DenseModel
from gradless.formats.folder import is_quantized
from gradless.formats.folder_model import load_folder
from gradless.formats.gguf_model import load_gguf
from gradless.formats.load import load, open_model
from gradless.formats.quantized import QuantizedModel
from gradless.independence import independence
from gradless.methods.recipe import Setup
from gradless.methods.registry import build_method
from gradless.objectives import Rows, TokenizedExample, collate
from gradless.replaying import replay
from gradless.report import curve
from gradless.training.options import RunOptions
from gradless.tuning import tune
from tests.conformance import folders
from tests.tiny import tiny_data

METHODS = {True: ("qzo", "nzo", "ezo", "quzo", "zoqo", "mezo"), False: ("mezo",)}
"""Those of quantized and of dense models."""
ASKING: dict[str, Any] = {"template": "{text} is\\n", "labels": "0=n,1=y"}
STEPS: dict[str, dict[str, Any]] = {
    "qzo": {"lr": 1.0},
    "nzo": {"lr": 100.0},
    "ezo": {},
    "quzo": {"eps": 0.5, "lr": 30.0},
    "zoqo": {"share": 0.2, "lr": 1.0},
    "mezo": {"lr": 0.1, "eps": 1e-2},
}
"""Options with which three steps change something."""
IDS = torch.tensor([[3, 97, 200, 41, 41, 17, 128, 250, 9, 77, 63, 5], [80, 6, 6, 240, 31, 99, 12, 180, 55, 2, 140, 23]])
LENGTHS = (3, 17, 9, 40, 12, 90)
"""Tokens of the sequences whose losses together are their losses alone; one is longer than a tiny sliding window."""
EXACT, LOSS, ROUNDED, REREAD = 2.0**-10, 2.0**-10, 0.25, 5e-3
"""How far fp32 logits may be from transformers', relative to their spread; a loss in a batch from its loss alone, in nats; bf16
logits of a dequantized model; a bf16 loss from that of the same weights, whose rows may be laid out anew where a router is near
the edge."""


@dataclass
class Cell:
    """What was found.

    Attributes:
        architecture, format: of the cell.
        refused: the sentence with which the model was refused as a whole, or "".
        absent: whether no tool could write this model in the format.
        faults: what is neither right nor refused.
        rows: how the model's rows are laid out.
        methods: the sentence with which each method was refused; "" where its three steps replay to the byte.
        tuned: how many values each method searches, by method.
    """

    architecture: str
    format: str
    refused: str = ""
    absent: bool = False
    faults: list[str] = field(default_factory=list)
    rows: str = ""
    methods: dict[str, str] = field(default_factory=dict)
    tuned: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def state(self) -> str:
        """ "works", "refused", "absent" or "open"."""
        if self.faults:
            return "open"
        return "absent" if self.absent else "refused" if self.refused else "works"

    @contextmanager
    def looking(self, what: str) -> Iterator[None]:
        """Note what goes wrong in a check as a fault, unless it is a refusal in one sentence, which is raised again."""
        try:
            yield
        except folders.Absent:
            raise
        except GradlessError as error:
            if "\n" in str(error) or len(str(error)) > 1000:
                self.faults.append(f"{what}: not one sentence: {str(error)[:300]}")
            else:
                raise
        except Exception as error:
            self.faults.append(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


@contextmanager
def trying(architecture: str, form: str, folder: Path) -> Iterator[Cell]:
    """A cell that is tried inside; a refusal there is the whole cell's."""
    cell, began = Cell(architecture, form), time.perf_counter()
    try:
        yield cell
    except folders.Absent:
        cell.absent = True
    except GradlessError as error:
        cell.refused = _sentence(error, folder)
    cell.seconds = round(time.perf_counter() - began, 2)


def check(architecture: str, form: str, folder: Path, methods: tuple[str, ...] | None = None) -> Cell:
    """Try an architecture in a folder's format, with all methods or with some."""
    with trying(architecture, form, folder) as cell:
        with cell.looking("write"):
            base, judge = folders.write(architecture, form, folder)
        if not cell.faults:
            check_base(cell, base, judge, folder, methods)
    return cell


def check_base(cell: Cell, base: Path, judge: Any, folder: Path, methods: tuple[str, ...] | None = None) -> None:
    """Everything that a model is checked for once it lies on the disk.

    Args:
        judge: transformers' own model of the same weights, in fp32; None where the logits have another judge.
    """
    with cell.looking("load"):
        loaded = load_in(base, torch.float32)
    if cell.faults:
        return
    if judge is not None:
        with cell.looking("logits"):
            near(logits(loaded.model), logits(judge), EXACT, "logits")
    with cell.looking("rows"):
        cell.rows = independence(loaded.model).rows.value
        _check_rows(loaded.model, independence(load(base).model).rows)
    if isinstance(loaded, QuantizedModel):
        with cell.looking("dequantize"):
            output = folder / "plain"
            _command(["dequantize", str(base), "--output", str(output)])
            near(logits(folders.judge(output)), logits(loaded.model), ROUNDED, "dequantized logits")
    rows = tiny_data(folder / "rows.tsv", rows=8)
    for method in methods or METHODS[loaded.quantized]:
        try:
            with cell.looking(method):
                cell.tuned[method] = _check_method(base, method, rows, folder / method)
            cell.methods[method] = ""
        except GradlessError as error:
            cell.methods[method] = _sentence(error, folder)


def _sentence(error: GradlessError, folder: Path) -> str:
    return str(error).replace(str(folder), "DIR")


def load_in(base: Path, dtype: torch.dtype) -> Any:
    """A folder's or a GGUF file's model in a dtype, by what `load` calls."""
    if base.suffix == ".gguf":
        return load_gguf(base, dtype=dtype)
    return (load_folder if is_quantized(base) else DenseModel.load)(base, dtype=dtype)


@torch.inference_mode()
def logits(model: Any) -> Tensor:
    """Of two rows of one length: fp32."""
    found: Tensor = model(IDS, use_cache=False).logits.float()
    return found


def near(ours: Tensor, theirs: Tensor, tolerance: float, what: str) -> None:
    """Assert that two models' logits agree."""
    assert ours.shape == theirs.shape, f"{what} are {tuple(ours.shape)}, not {tuple(theirs.shape)}"
    off = float((ours - theirs).square().mean().sqrt() / theirs.std())
    assert off <= tolerance, f"{what} are off by {off:.3g} of their spread"


@torch.inference_mode()
def _check_rows(model: Any, rows: Rows) -> None:
    generator = torch.Generator().manual_seed(1)
    ids = [tuple(torch.randint(5, 250, (n,), generator=generator).tolist()) for n in LENGTHS]
    examples = [TokenizedExample((each[:2],), (each[2:],), 0) for each in ids]
    together = objectives.losses(model, collate(examples, rows=rows))[0]
    alone = torch.cat([objectives.losses(model, collate([each], rows=Rows.ALONE))[0] for each in examples])
    off = float((together - alone).abs().max())
    assert off <= LOSS, f"{rows.value} rows: a loss is off by {off:.3g} nats from its loss alone"


def _check_method(base: Path, method: str, rows: Path, output: Path) -> int:
    """Three steps, the file read again, and a replay; returns how many values were searched."""
    options = RunOptions(
        method=method, steps=3, batch_size=4, eval=str(rows), eval_every=100, output=str(output), **ASKING, **STEPS[method]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curve, "plot_run", lambda *_: None)  # a third of the time, and the same for all
        summary = tune(str(base), str(rows), options, quiet=True)
    if not summary["finished"]:  # a run ends with its step where it is interrupted, and so does the suite
        raise KeyboardInterrupt
    assert (summary["steps"], summary["skipped"]) == (3, 0), "steps were skipped"
    tuned = next(path for path in (output / "model", output / "model.gguf") if path.exists())
    assert _bytes(tuned) != _bytes(base), "three steps change nothing"
    again = output / ("again" + tuned.suffix)
    replay(str(base), str(output / "journal.db"), str(again), quiet=True)
    different = [name for name, content in _bytes(tuned).items() if _bytes(again).get(name) != content]
    assert not different, f"the replay differs in {', '.join(different)}"
    reread = run.evaluate(str(tuned), str(rows), RunOptions(batch_size=4, **ASKING), quiet=True)["loss"]
    assert abs(reread - summary["after"]["loss"]) < REREAD, f"read again the loss is {reread}, not {summary['after']['loss']}"
    return sum(space.values.numel() for space in _spaces(base, output / "journal.db"))


def _spaces(base: Path, journal: Path) -> list[Any]:
    from gradless.journal import Journal

    header = Journal.open(journal).header
    return list(build_method(open_model(base), Setup(header["method"], header["groups"])).spaces)


def _bytes(path: Path) -> dict[str, bytes]:
    """The weights of a folder or a file, by file name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {file.name: file.read_bytes() for file in sorted(path.glob("*.safetensors"))}


def _command(arguments: list[str]) -> None:
    """Run the command line.

    Raises:
        GradlessError: it refused, with its sentence.
    """
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(arguments)
    assert "unexpected error" not in said.getvalue(), said.getvalue()
    if status:
        raise GradlessError(said.getvalue().removeprefix("gradless: ").strip())
