"""Where a forward's time goes, and how much of it a second thread saves.

python benchmarks/parts.py [MODEL.gguf] [--activations int8]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from step import default_model

from gradless import kernels
from gradless.formats.gguf_model import load_gguf
from gradless.layers import reading_at, set_activations

PARTS = ("linear", "linear_int8", "attention", "gate", "rms_norm")
FORWARDS, SEQUENCES, LENGTH = 7, 8, 64


@contextmanager
def clocked(spent: Counter[str]) -> Iterator[None]:
    """Count the seconds spent in each kernel."""
    places = {name: kernels if name in vars(kernels) else kernels.on("cpu") for name in PARTS}
    own = {name: getattr(place, name) for name, place in places.items()}

    def timed(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **more: Any) -> Any:
            began = time.perf_counter()
            result = kernel(*arguments, **more)
            spent[name] += time.perf_counter() - began
            return result

        return run

    for name, kernel in own.items():
        setattr(places[name], name, timed(name, kernel))
    try:
        yield
    finally:
        for name, kernel in own.items():
            setattr(places[name], name, kernel)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--activations", choices=("bf16", "int8"), default="bf16")
    arguments = parser.parse_args()
    model = load_gguf(arguments.model).model
    set_activations(model, arguments.activations)
    ids, rows = torch.randint(100, 40_000, (SEQUENCES, LENGTH)), torch.arange(SEQUENCES)
    table: dict[int, Counter[str]] = {}
    for threads in (1, torch.get_num_threads()):
        torch.set_num_threads(threads)
        best: Counter[str] = Counter()
        for _ in range(FORWARDS):
            spent: Counter[str] = Counter()
            with clocked(spent), reading_at(model.get_output_embeddings(), rows, torch.full_like(rows, LENGTH - 1)):
                began = time.perf_counter()
                model(ids, use_cache=False)
                total = time.perf_counter() - began
            spent["all else: rotary, residuals, copies, Python"] = total - sum(spent.values())
            spent["a forward"] = total
            best = spent if not best or total < best["a forward"] else best
        table[threads] = best
    alone, together = table.values()
    print(f"| ms, the fastest of {FORWARDS} | one thread | {torch.get_num_threads()} threads | ratio |\n|---|---|---|---|")
    for name in alone:
        print(f"| {name} | {1000 * alone[name]:.1f} | {1000 * together[name]:.1f} | {together[name] / alone[name]:.2f} |")


if __name__ == "__main__":
    main()
