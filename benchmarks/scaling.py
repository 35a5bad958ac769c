"""How a step's time grows: with the model, the tokens of a batch, the size of a group, and threads. The weights are random.

    python benchmarks/scaling.py [--json] [--plot docs/scaling.png]

Every point is a model of its own; a QZO step and two plain forwards are timed side by side, with bf16 and int8 activations.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from random_model import linear_weights, random_model
from timing import Times, medians, ratio, shown
from torch import nn
from transformers import LlamaConfig

from gradless import QZO
from gradless.layers import reading_at, set_activations
from gradless.spaces import BlockSpace
from gradless.tensor import Part
from gradless.training.batches import PAIR_TOKENS

VOCABULARY, LENGTH = 32_000, 64
SHAPES = {  # hidden size, layers, intermediate size
    "15M": (256, 8, 768),
    "50M": (512, 12, 1536),
    "135M": (768, 16, 2048),
    "400M": (1024, 28, 2816),
    "1.5B": (2048, 28, 6144),
}
MODEL, TOKENS, TYPE = "135M", 512, "int4/64"
SERIES = {
    "model": [(name, TOKENS, TYPE, 0) for name in SHAPES],
    "tokens": [(MODEL, tokens, TYPE, 0) for tokens in (64, 256, 512, 1024, 4096)],
    "group": [(MODEL, TOKENS, kind, 0) for kind in ("int4/32", "int4/64", "Q4_K")],
    "threads": [(MODEL, TOKENS, TYPE, threads) for threads in range(1, torch.get_num_threads() + 1)],
}
"""Of each curve its points: model, tokens a batch, block type (32, 64 or 256 weights share a d), threads (0: all)."""


def timed(shape: str, tokens: int, kind: str, threads: int) -> Times:
    """A QZO step and two forwards, with bf16 and with int8 activations, of one point."""
    hidden, layers, intermediate = SHAPES[shape]
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64, "num_hidden_layers": layers}
    model = random_model(LlamaConfig(vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=intermediate, **heads), kind)
    head = model.get_output_embeddings()
    optimizer = QZO([BlockSpace(packed, Part.SCALE) for packed in linear_weights(model)], lr=1e-6, eps=1e-2)
    ids = torch.randint(VOCABULARY, (-(-tokens // LENGTH), LENGTH))

    def losses(copies: int) -> torch.Tensor:
        """Of a batch and its copies, on the last token of each sequence."""
        batch = ids.repeat(copies, 1)
        with reading_at(head, torch.arange(len(batch)), torch.full((len(batch),), LENGTH - 1)):
            logits = model(batch, use_cache=False).logits[0].float()
        return nn.functional.cross_entropy(logits, batch[:, 0], reduction="none").view(copies, -1).mean(1)

    def step(activations: str) -> None:
        set_activations(model, activations)
        optimizer.step(lambda: losses(1), (lambda: losses(2)) if ids.numel() <= PAIR_TOKENS else None)

    def forwards(activations: str) -> None:
        set_activations(model, activations)
        losses(1), losses(1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    variants = {}
    for activations in ("bf16", "int8"):
        variants[f"step, {activations}"] = lambda activations=activations: step(activations)
        variants[f"two forwards, {activations}"] = lambda activations=activations: forwards(activations)
    with torch.inference_mode():
        times = medians(variants, samples=5, rounds=10)
    torch.set_num_threads(before)
    return times


def plot(curves: dict[str, list[tuple[str, Times]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(16, 4), layout="constrained")
    for axis, (name, points) in zip(axes, curves.items(), strict=True):
        for variant, style in zip(points[0][1], ("C0-o", "C0--", "C1-o", "C1--"), strict=True):
            axis.plot(
                [label for label, _ in points], [1000 * times[variant]["median"] for _, times in points], style, label=variant
            )
        axis.set(xlabel=name, ylabel="ms")
        axis.set(yscale="log") if name in ("model", "tokens") else axis.set(ylim=(0, None))
    axes[0].legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    arguments = parser.parse_args()
    curves: dict[str, list[tuple[str, Times]]] = {}
    for name, points in SERIES.items():
        which = {"model": 0, "tokens": 1, "group": 2, "threads": 3}[name]
        curves[name] = [(str(point[which]), timed(*point)) for point in points]
        if not arguments.json:
            print(f"\n| {name} | step, bf16, ms | / two forwards | step, int8, ms | / two forwards |\n|---|---|---|---|---|")
            for label, times in curves[name]:
                cells = []
                for activations in ("bf16", "int8"):
                    step = f"step, {activations}"
                    cells += [f"{1000 * times[step]['median']:.0f}", shown(ratio(times, step, f"two forwards, {activations}"))]
                print(f"| {label} | {' | '.join(cells)} |", flush=True)
    if arguments.json:
        print(json.dumps(curves))
    if arguments.plot:
        plot(curves, arguments.plot)


if __name__ == "__main__":
    main()
