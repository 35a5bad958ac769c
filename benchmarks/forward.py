"""Seconds of a forward with the losses of eight examples, one thread: to compare two checkouts, run it in both in turn.

    PYTHONPATH=src python benchmarks/forward.py MODEL.gguf

It prints the median and the least of eight forwards, and the sum of the losses: for examples that choose between two words, and
for completions of a few dozen tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from gradless import load_gguf, objectives
from gradless.objectives import TokenizedExample

FORWARDS = 8
LENGTHS = (40, 60, 80, 64) * 2
"""Tokens of each prompt, and of each completion."""


def ids(n: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(5, 1000, (n,), generator=generator).tolist())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    model = load_gguf(parser.parse_args().model).model.eval()
    torch.set_num_threads(1)
    drawn = torch.Generator().manual_seed(0)
    words = [TokenizedExample((ids(n, drawn),) * 2, ((3,), (4,)), 0) for n in LENGTHS]
    texts = [TokenizedExample((ids(n, drawn),), (ids(n, drawn),), 0) for n in LENGTHS]
    for name, examples in (("words", words), ("completions", texts)):
        batch = objectives.collate(examples)
        seconds = []
        with torch.inference_mode():
            objectives.losses(model, batch)
            for _ in range(FORWARDS):
                began = time.perf_counter()
                losses, _ = objectives.losses(model, batch)
                seconds.append(time.perf_counter() - began)
        print(f"{name:12} {statistics.median(seconds):.3f} s, least {min(seconds):.3f} s, loss {float(losses.sum()):.6f}")


if __name__ == "__main__":
    main()
