"""Queries and images a second of our attacks against ART's Square and torchattacks' Square, on one model in one run.

    pip install ".[papers]" && pip install --no-deps torchattacks
    python benchmarks/attack.py [--dataset mnist] [--images 200] [--queries 100] [--json]

The ball is so small that nothing is found, so every image asks all of its queries: what is compared is the time around them.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from timing import medians, ratio, shown

sys.path.insert(0, str(Path(__file__).parents[1] / "papers" / "zoqo"))

from victims import victim

from gradless import ZOQOAttack, ZOSignSGDAttack

EPS = 1e-5


def measure(dataset: str, images: int, queries: int) -> dict[str, object]:
    import torchattacks
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    x, labels, model = victim(dataset)
    x, labels, asked = x[:images], labels[:images], dict[str, int]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)

    def counted(name):
        def predict(batch):
            asked[name] = asked.get(name, 0) + len(batch)
            return model(batch)

        return predict

    def art(batch):
        return counted("ART's Square")(torch.from_numpy(np.asarray(batch, dtype=np.float32))).numpy()

    class Counting(torch.nn.Module):
        def forward(self, batch):
            return counted("torchattacks' Square")(batch)

    shape, shared = tuple(x.shape[1:]), {"max_queries": queries, "batch_size": images}
    classifier = BlackBoxClassifierNeuralNetwork(art, shape, 10, channels_first=True, clip_values=(0.0, 1.0))
    peer = SquareAttack(classifier, eps=EPS, max_iter=queries // 2, batch_size=images, verbose=False)
    other = torchattacks.Square(Counting().eval(), eps=EPS, n_queries=queries)
    one_hot = np.eye(10)[labels.numpy()]
    runs = {
        "ZOQO, chunks": lambda: ZOQOAttack(EPS, **shared).attack(counted("ZOQO, chunks"), x, labels),
        "ZOQO, random": lambda: ZOQOAttack(EPS, directions="random", **shared).attack(counted("ZOQO, random"), x, labels),
        "ZO-signSGD": lambda: ZOSignSGDAttack(EPS, **shared).attack(counted("ZO-signSGD"), x, labels),
        "ART's Square": lambda: peer.generate(x.numpy(), one_hot),
        "torchattacks' Square": lambda: other(x, labels),
    }
    times = medians(runs, samples=5, rounds=12)
    queried = {name: asked[name] / (1 + len(times[name]["taken"])) for name in runs}
    ratios = {}
    for ours in list(runs)[:3]:
        for theirs in list(runs)[3:]:
            taken = ratio(times, theirs, ours)
            by_query = None if taken is None else taken * queried[ours] / queried[theirs]
            ratios[f"{ours}: queries a second / those of {theirs}"] = by_query
    rates = {name: queried[name] / times[name]["median"] for name in runs}
    images_a_second = {name: images / times[name]["median"] for name in runs}
    return {"ratios": ratios, "queries_a_second": rates, "queries": queried, "images_a_second": images_a_second}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=("mnist", "cifar10"), default="mnist")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = measure(given.dataset, given.images, given.queries)
    if given.json:
        print(json.dumps(found))
    else:
        print("| attack | queries a second | queries asked | images a second |\n|---|---|---|---|")
        for name, rate in found["queries_a_second"].items():
            print(f"| {name} | {rate:.0f} | {found['queries'][name]:.0f} | {found['images_a_second'][name]:.2f} |")
        print("\n| ratio | measured |\n|---|---|")
        for name, value in found["ratios"].items():
            print(f"| {name} | {shown(value)} |")
