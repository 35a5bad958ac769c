"""How much alike the sensitivities are that NZO learns: over a model's examples, and over its layers.

    python papers/sensitivity.py                           # SmolLM2, SST-2
    python papers/sensitivity.py --model gemma3 --task "AG News"

By backpropagation through a dense fp32 model, J_n = dt / dy_n: how the first contrast t of the words' scores follows outputs
y_n of each layer that writes into the residual stream, at the token where the answer is given. A line a layer: |mean J|, then
|mean J|^2 / mean |J|^2 over the examples, and the cosine of its mean J with the next layer's and with the last one's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from worklist import BATCH, MODELS, TASKS

from gradless import objectives
from gradless.formats.load import load
from gradless.formats.quantized import dequantized
from gradless.methods.nzo.calibration import contrasts
from gradless.methods.nzo.recipe import INTO_STREAM
from gradless.tasks.prepare import prepare
from gradless.training.options import RunOptions


def sensitivities(model: Any, examples: list[objectives.TokenizedExample]) -> dict[str, Tensor]:
    """J of every layer and example: (examples, rows)."""
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(INTO_STREAM)}
    outputs: dict[str, Tensor] = {}

    def shift(name: str, y: Tensor) -> Tensor:
        outputs[name] = torch.zeros_like(y, requires_grad=True)
        return y + outputs[name]

    hooks = [m.register_forward_hook(lambda _m, _x, y, name=name: shift(name, y)) for name, m in layers.items()]
    found: dict[str, list[Tensor]] = {name: [] for name in layers}
    for start in range(0, len(examples), BATCH):
        batch = objectives.collate(examples[start : start + BATCH])
        scores = torch.stack(objectives.scores(model, batch))
        t = scores @ contrasts(scores.shape[1])[0]
        for name, of_layer in zip(layers, torch.autograd.grad(t.sum(), [outputs[name] for name in layers]), strict=True):
            found[name].append(of_layer[batch.rows, batch.columns])
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(each) for name, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="SmolLM2")
    parser.add_argument("--task", choices=TASKS, default="SST-2")
    parser.add_argument("--examples", type=int, default=64)
    arguments = parser.parse_args()
    loaded, (rows, _, how) = load(MODELS[arguments.model]()), TASKS[arguments.task]
    examples = prepare(str(rows), loaded, RunOptions(**how), limit=arguments.examples, shuffled=True).examples
    found = sensitivities(dequantized(loaded).float().requires_grad_(False), examples)
    means = {name: of_layer.mean(0) for name, of_layer in found.items()}
    last = list(means)[-1]
    print("| layer | size | shared by examples | as the next layer's | as the last one's |\n|---|---|---|---|---|")
    for name, after in zip(means, [*list(means)[1:], last], strict=True):
        mean = means[name]
        share = float(mean.square().sum() / found[name].square().sum(1).mean())
        cosines = (float(torch.cosine_similarity(mean, means[other], 0)) for other in (after, last))
        print(f"| {name} | {float(mean.norm()):.3g} | {share:.2f} | {' | '.join(f'{cosine:.2f}' for cosine in cosines)} |")


if __name__ == "__main__":
    main()
