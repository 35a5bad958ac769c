"""How far the gradients of examples agree, by what is tuned and where: what bounds every zeroth-order method.

    python papers/agreement.py MODEL.gguf --task SST-2 --examples 200      # a base, or a tuned model

An estimate from forwards scatters in every direction that is searched, so a step gains about a^2 B over the loss's curvature,
where B is the batch and

    a = mean over pairs i != j of g_i . g_j / mean_i |g_i|^2

is how far the gradients g_i of two examples agree (docs/learning.md). Printed with a's standard error and the share of |g_i|^2
that is left once an example is paired with one of another label. By backpropagation, in fp32; where possible, products are
summed token by token, so that no gradient is held.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))

from worklist import TASKS

from gradless import objectives
from gradless.formats.load import load
from gradless.formats.quantized import dequantized
from gradless.tasks.prepare import prepare
from gradless.training.options import RunOptions

GROUP = 32
"""Columns that one shift, or one scale, is for."""
PLACES = ["all", *(f"layers {first}-{first + 4}" for first in range(0, 100, 5)), "q_proj", "k_proj", "v_proj", "o_proj"]
PLACES += ["gate_proj", "up_proj", "down_proj"]


def backward(model: nn.Module, examples: list[objectives.TokenizedExample]) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor]:
    """Of each linear layer the inputs and the gradients of the outputs, (tokens, ..) each; and each token's example."""
    found: dict[str, tuple[list[Tensor], list[Tensor]]] = {}

    def remember(name: str) -> None:
        inputs, gradients = found[name] = [], []

        def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            inputs.append(given[0].detach()[0])
            output.register_hook(lambda gradient: gradients.append(gradient[0]))

        model.get_submodule(name).register_forward_hook(hook)

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "layers." in name:
            remember(name)
    model.requires_grad_(False)
    model.get_input_embeddings().weight.requires_grad_(True)
    owners = []
    for i, example in enumerate(examples):
        batch = objectives.collate([example], rows=objectives.Rows.PADDED)
        owners += [i] * batch.input_ids.numel()
        objectives.losses(model, batch)[0].sum().backward()
        model.get_input_embeddings().weight.grad = None
    return {name: (torch.cat(x), torch.cat(d)) for name, (x, d) in found.items()}, torch.tensor(owners)


def products(weight: Tensor, x: Tensor, d: Tensor, sums: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Inner products (examples, examples) of gradients with respect to parts of a layer; sums: (examples, tokens)."""
    by_token, pooled = d @ d.T, x.view(len(x), -1, GROUP).sum(-1)
    yield "weights", sums @ (by_token * (x @ x.T)) @ sums.T
    yield f"shifts of {GROUP} weights", sums @ (by_token * (pooled @ pooled.T)) @ sums.T
    moved = ((d[mine].T @ x[mine]) * weight for mine in sums.bool())
    scales = torch.stack([each.view(len(weight), -1, GROUP).sum(-1) for each in moved])
    yield f"scales of {GROUP} weights, relative", scales.flatten(1) @ scales.flatten(1).T
    gains = scales.sum(-1)
    yield "rows' gains", gains @ gains.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--task", choices=TASKS, default="SST-2")
    parser.add_argument("--examples", type=int, default=200)
    arguments = parser.parse_args()
    train, _, how = TASKS[arguments.task]
    loaded = load(arguments.model)
    examples = prepare(str(train), loaded, RunOptions(**how), limit=arguments.examples, shuffled=True).examples
    model = dequantized(loaded).float().eval()
    layers, owners = backward(model, examples)
    n, labels = len(examples), torch.tensor([example.label for example in examples])
    sums = torch.zeros(n, len(owners))
    sums[owners, torch.arange(len(owners))] = 1
    totals: dict[tuple[str, str], Tensor] = {}
    for name, (x, d) in layers.items():
        number, part = int(re.findall(r"layers\.(\d+)\.", name)[0]), name.rpartition(".")[2]
        for kind, product in products(model.get_submodule(name).weight, x, d, sums):
            for place in ("all", f"layers {number // 5 * 5}-{number // 5 * 5 + 4}", part):
                totals[kind, place] = totals.get((kind, place), torch.zeros(n, n)) + product
    apart, others = ~torch.eye(n, dtype=torch.bool), labels.unsqueeze(1) != labels
    print("| tuned | where | share of the square | a | left in pairs |\n|---|---|---|---|---|")
    for (kind, place), product in sorted(totals.items(), key=lambda item: (item[0][0], PLACES.index(item[0][1]))):
        square, error = product.diag().mean(), product[apart].std() / (n * (n - 1) / 2) ** 0.5
        share = square / totals[kind, "all"].diag().mean()
        agree, left = product[apart].mean() / square, 1 + product[others].mean() / square
        print(f"| {kind} | {place} | {share:.3f} | {agree:.4f} ± {error / square:.4f} | {left:.2f} |")


if __name__ == "__main__":
    main()
