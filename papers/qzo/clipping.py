"""QZO's clipping of the directional derivative: how much it shrinks the estimate, and how often the loss spikes without it.

    python papers/qzo/clipping.py shrinkage
    python papers/qzo/clipping.py spikes        # runs that resume where they were stopped

The paper calls the clipped estimate unbiased. For a linear loss, d = g . z, Gaussian z give E[clip(d) z] = P(|d| < C) g: an
estimate of the right direction, shrunk by the share of derivatives that were not clipped. `shrinkage` measures both sides on
SmolLM2 in Q4_1 and SST-2, g being the gradient that backpropagation finds for the same scales.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from gradless.tasks.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import DATA, ROOT, TRAIN_ROWS, WEAK, model_path

QUERIES, ROWS, EPS = 400, 16, 5e-3
SHARES = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
STEPS, LR, CLIPS, SPIKE, WINDOW = 300, 4e-3, (1e9, 100.0, 10.0, 1.0), 1.5, 20
"""Of the runs: ten times the default lr; a spike is a step whose loss is so many times the median of the steps before it."""


def shrinkage() -> None:
    import torch

    from gradless import QZO, kernels, objectives
    from gradless.formats.gguf_model import load_gguf
    from gradless.formats.quantized import dequantized
    from gradless.training.options import RunOptions

    loaded = load_gguf(model_path(), dtype=torch.float32)
    examples = prepare(str(DATA / "train.tsv"), loaded, RunOptions(**WEAK), limit=ROWS, shuffled=True).examples
    batch = objectives.collate(examples)
    dense = dequantized(loaded).float().requires_grad_(True)
    objectives.losses(dense, batch)[0].mean().backward()
    gradients = {}
    weights = dict(dense.named_parameters())
    for path, module in loaded.model.named_modules():
        tensor = getattr(module, "packed", None)
        if tensor is not None and tensor.name in loaded.file.linear_layers():
            found = weights[path + ".weight"].grad
            if tensor.row_order is not None:
                found = torch.empty_like(found).index_copy_(0, tensor.row_order, found)
            codes = tensor.block.unpack(tensor.packed.flatten(0, 1)).codes.view(tensor.rows, -1, tensor.block.size)
            scale = tensor.block.field(tensor.packed, tensor.block.scale_at)
            gradients[tensor.name] = ((found.view_as(codes) * codes).sum(-1) * scale.abs()).flatten()
    optimizer = QZO(loaded.spaces("blocks", list(gradients)), eps=EPS)
    d, projected = [], []
    with torch.inference_mode():
        for query in range(QUERIES):
            sides = []
            for sign in (+1, -1):
                with optimizer.perturbed(query, sign):
                    sides.append(float(objectives.losses(loaded.model, batch)[0].mean()))
            d.append((sides[0] - sides[1]) / (2 * EPS))
            direction = optimizer.direction(optimizer.t, query, optimizer.param_groups[0])
            ops = kernels.on("cpu")
            projected.append(sum(float(ops.coordinates(direction, n, len(g), g.device) @ g) for n, g in gradients.items()))
    d, g_z = torch.tensor(d), torch.tensor(projected)
    length = float(sum(g.square().sum() for g in gradients.values()).sqrt())
    along = d * g_z / length**2
    correlation = float(torch.corrcoef(torch.stack([d, g_z]))[0, 1])
    print(f"|g| {length:.2f}; std of d {d.std():.2f}; correlation of d and g . z {correlation:.3f}")
    print(f"E[d z] along g, as a multiple of g: {float(along.mean()):.3f} ± {float(along.std()) / QUERIES**0.5:.3f}")
    print("\n| C | P(abs(d) < C) | E[clip(d) z] . g / E[d z] . g |\n|---|---|---|")
    for share in SHARES:
        clip = float(d.abs().quantile(share)) * (1 + 1e-6)
        kept = float((d.abs() < clip).float().mean())
        print(f"| {clip:.1f} | {kept:.3f} | {float((d.clamp(-clip, clip) * g_z).sum() / (d * g_z).sum()):.3f} |")


def spikes() -> None:
    from gradless.journal import Journal
    from gradless.training.options import RunOptions
    from gradless.tuning import tune

    print("| C | clipped | spikes | largest loss / median before | accuracy |\n|---|---|---|---|---|")
    for clip in CLIPS:
        output = ROOT / "runs" / "papers" / "qzo" / f"clip-{clip:g}"
        options = RunOptions(
            **WEAK, eval=str(DATA / "dev.tsv"), train_rows=TRAIN_ROWS, steps=STEPS, lr=LR, clip=clip, schedule="constant",
            eval_every=10**9, output=str(output), resume=(output / "journal.db").exists(), allow_changes=True,
        )  # fmt: skip
        summary = tune(str(model_path()), str(DATA / "train.tsv"), options)
        journal = Journal.open(output / "journal.db")
        steps = list(journal.estimates())
        journal.close()
        losses = [step.loss for step in steps]
        ratios = [loss / statistics.median(losses[i - WINDOW : i]) for i, loss in enumerate(losses) if i >= WINDOW]
        clipped = sum(abs(d) >= clip for step in steps for of_group in step.d for d in of_group) / len(steps)
        accuracy = summary["after"]["accuracy"]
        spiked = f"{sum(each > SPIKE for each in ratios)} of {len(ratios)}"
        print(f"| {clip:g} | {clipped:.3f} | {spiked} | {max(ratios):.2f} | {accuracy:.4f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("shrinkage", "spikes"))
    {"shrinkage": shrinkage, "spikes": spikes}[parser.parse_args().what]()
