"""How much there is to learn at the answer's token: what bounds NZO.

    python papers/ceiling.py                           # SmolLM2, SST-2
    python papers/ceiling.py --task RTE --train-rows 2490

To first order, changing the layers that NZO tunes adds to the words' scores a linear function of what they take in at the token
where the answer is given. Here such a function is fitted outright: logistic regression over those inputs, from the untuned
scores on, with the ridge penalty that is best on the dev rows. So no steps and no noise of queries are left in it, and the dev
rows chose the penalty: it flatters. Inputs enter as NZO's features do, in so many of their principal directions. A line a
choice of layers and directions: accuracy and loss on the rows of training, then on the dev rows.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from worklist import MODELS, TASKS

from gradless import objectives, run
from gradless.layers import QuantLinear
from gradless.methods.nzo import damped
from gradless.nodes import Nodes
from gradless.training.options import INTO_STREAM, RunOptions

DIRECTIONS = (12, 48, None)
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Of the mean square of an example's features."""


def seen(model: Any, layers: dict[str, Any], examples: list[objectives.TokenizedExample]) -> dict[str, Tensor]:
    """Of all examples each layer's inputs at the answer's token, (n, columns), and their "scores" and "labels"."""
    found: dict[str, list[Tensor]] = {name: [] for name in (*layers, "scores", "labels")}
    nodes = Nodes(layers)
    with torch.inference_mode():
        for batch in map(objectives.collate, objectives.batches(examples, 32)):
            with nodes.read(objectives.asked_tokens(batch)[:, 0]) as inside:
                scores = objectives.asked(model, batch)[:, 0]
            inside = {name: x for name, (x, _) in inside.items()}
            for name, value in {**inside, "scores": scores, "labels": batch["labels"]}.items():
                found[name].append(value)
    return {name: torch.cat(each) for name, each in found.items()}


def fitted(products: Tensor, scores: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """By what each example's features, whose inner products are (n, n), enter the words' scores: (n, words)."""
    shares = torch.zeros_like(scores, requires_grad=True)
    optimizer = torch.optim.LBFGS([shares], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = products @ shares
        loss = F.cross_entropy(scores + moved, labels) + ridge / 2 * (shares * moved).sum() / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return shares.detach()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="SmolLM2")
    parser.add_argument("--task", choices=[task for task in TASKS if task not in ("COPA", "SQuAD")], default="SST-2")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="chooses the rows of training")
    arguments = parser.parse_args()
    loaded, (rows, dev_rows, how) = run.load_model(MODELS[arguments.model]()), TASKS[arguments.task]
    options = RunOptions(**how, seed=arguments.seed)
    layers = {
        m.packed.name: m for p, m in loaded.model.named_modules() if isinstance(m, QuantLinear) and p.endswith(INTO_STREAM)
    }
    examples = run.prepare(str(rows), loaded, options, limit=arguments.train_rows, shuffled=True).examples
    train = seen(loaded.model, layers, examples)
    dev = seen(loaded.model, layers, run.prepare(str(dev_rows), loaded, options, limit=options.eval_rows).examples)
    majority = float(dev["labels"].bincount().max() / len(dev["labels"]))
    print(f"{arguments.task}, {len(train['labels'])} rows, {len(dev['labels'])} dev rows; majority {majority:.4f}\n")
    print("| layers | directions | train | loss | dev | loss | ridge |\n|---|---|---|---|---|---|---|")
    directions = {name: damped(train[name]).float().T for name in layers}
    features = [(train[name] @ by, dev[name] @ by) for name, by in directions.items()]
    for part, first in (("last half", len(layers) // 2), ("all", 0)):
        for count in DIRECTIONS:
            here, there = (torch.cat([x[:, :count] for x in side], 1) for side in zip(*features[first:], strict=True))
            products, across = here @ here.T, there @ here.T
            unit, tried = float(products.diagonal().mean()), []
            for ridge in RIDGES:
                shares = fitted(products / unit, train["scores"], train["labels"], ridge)
                sides = (train, products), (dev, across)
                after = [(side["scores"] + inner / unit @ shares, side["labels"]) for side, inner in sides]
                figures = [(float((s.argmax(1) == y).float().mean()), float(F.cross_entropy(s, y))) for s, y in after]
                tried.append((figures, ridge))
            ((accuracy, loss), (dev_accuracy, dev_loss)), ridge = min(tried, key=lambda of: of[0][1][1])
            shown = f"{accuracy:.4f} | {loss:.4f} | {dev_accuracy:.4f} | {dev_loss:.4f} | {ridge:g}"
            print(f"| {part} | {count or 'every'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
