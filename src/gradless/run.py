"""`gradless eval` and `quantize`, from files to files."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from gradless import evaluation
from gradless.errors import GradlessError
from gradless.evaluation import Metrics
from gradless.formats import packed
from gradless.formats.adapter import attach_peft
from gradless.formats.dense import DenseModel
from gradless.formats.folder import WEIGHTS
from gradless.formats.load import load
from gradless.formats.model import TunableModel
from gradless.layers import set_activations
from gradless.objectives import TokenizedExample
from gradless.tasks.prepare import prepare
from gradless.training.options import RunOptions, grid_name


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


def quantize(loaded: TunableModel, output: Path, options: RunOptions) -> dict[str, object]:
    """Round a dense model's linear layers to the grid that the options name; write a packed folder."""
    grid, group = grid_name(options), None if options.group_size == "channel" else int(options.group_size)
    if not isinstance(loaded, DenseModel):
        raise GradlessError(
            f"{loaded.path} is not a dense folder, and only these are quantized; run gradless dequantize on a GGUF file first."
        )
    packed.quantize(loaded.model, loaded.tokenizer, grid, group, output, search=options.search)
    return {"output": str(output), "grid": grid, "bytes": (output / WEIGHTS).stat().st_size}
