"""ZOQO's black-box attacks: the paper's two tables, with SignHunter, ZO-signSGD and ART's Square beside it.

    pip install ".[papers]"
    python papers/zoqo/attacks.py             # do what is still to do; stop and start again at will
    python papers/zoqo/attacks.py --table     # print the tables from what is committed
    python papers/zoqo/attacks.py --dataset mnist --images 200 --bits 8 --json    # one quick look, nothing kept

l-inf, eps 0.3 on MNIST and 12/255 on CIFAR-10, a budget of 10,000 queries, the first 1000 images that the classifier gets right
(shuffled once, see victims.py), and its twin that torch quantized to int8, of which ZO-signSGD and Square see 200 on CIFAR-10.
Queries are those of successes, every call counted. Square is ART's: it asks for its best image again in every step, which
counts. SignHunter's chunks have no randomness: one row.
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from victims import victim
from worklist import Row, WorkList, figure

from gradless import AttackResult, SignHunter, ZOQOAttack, ZOSignSGDAttack
from gradless.attacks.base import Attack

EPS = {"mnist": 0.3, "cifar10": 12 / 255}
BUDGET, IMAGES, BITS, SEEDS = 10_000, 1000, (8, 6, 4, 2), 3
FEW = 200
"""Images of CIFAR-10's int8 twin for the methods that fail on many of them, and then spend the whole budget."""
MODELS = ("float", "int8")
CALL = 64
"""Images in a call of the model: what it keeps between two layers of so many fits a cache."""


def rows() -> dict[str, Row]:
    """Every row: on the float models first, seed 0 first."""
    made: dict[str, Row] = {}
    for model in MODELS:
        for seed in range(SEEDS):
            for dataset in EPS:
                row = {"kind": "attack", "dataset": dataset, "model": model, "seed": seed}
                start = f"{dataset}, {model}"
                if seed == 0:
                    made[f"{start}, SignHunter"] = {**row, "method": "signhunter"}
                    for bits in BITS:
                        made[f"{start}, ZOQO, chunks, {bits} bits"] = {**row, "method": "zoqo", "bits": bits}
                for bits in BITS:
                    name = f"{start}, ZOQO, random, {bits} bits, seed {seed}"
                    made[name] = {**row, "method": "zoqo", "bits": bits, "directions": "random"}
                long = (dataset, model) == ("cifar10", "int8")
                few, images = (f", {FEW} images", {"images": FEW}) if long else ("", {})
                made[f"{start}, ZO-signSGD{few}, seed {seed}"] = {**row, "method": "zo_signsgd", **images}
                made[f"{start}, Square{few}, seed {seed}"] = {**row, "method": "square", **images}
    return made


def attack(row: Row, images: int = IMAGES) -> Row:
    images = row.get("images", images)
    pixels, labels, model = victim(row["dataset"])
    pixels, labels = pixels[:images], labels[:images]
    if row["model"] == "int8":
        model = quantized(model, pixels[:200])
        with torch.inference_mode():
            right = model(pixels).argmax(1) == labels
        pixels, labels = pixels[right], labels[right]

    device = "cuda" if row["model"] == "float" and torch.cuda.is_available() else "cpu"
    model.to(device)

    def predict(batch: Tensor) -> Tensor:
        return torch.cat([model(part).cpu() for part in batch.to(device).split(CALL)])

    eps, shared = EPS[row["dataset"]], {"max_queries": BUDGET, "seed": row["seed"], "batch_size": images}
    match row["method"]:
        case "square":
            return square(predict, pixels, labels, eps, row["seed"]).summary()
        case "signhunter":
            method: Attack = SignHunter(eps, **shared)
        case "zo_signsgd":
            method = ZOSignSGDAttack(eps, **shared)
        case _:
            method = ZOQOAttack(eps, bits=row["bits"], directions=row.get("directions", "chunks"), **shared)
    return method.attack(predict, pixels, labels).summary()


def quantized(model: nn.Module, images: Tensor) -> nn.Module:
    """An int8 twin, weights and activations, calibrated on images."""
    normalize, *layers = model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way out
        wrapped = torch.ao.quantization.QuantWrapper(nn.Sequential(*layers)).eval()
        wrapped.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
        torch.ao.quantization.prepare(wrapped, inplace=True)
        with torch.inference_mode():
            wrapped(normalize(images))
        return nn.Sequential(normalize, torch.ao.quantization.convert(wrapped)).eval()


def square(model: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, eps: float, seed: int) -> AttackResult:
    """ART's Square, in batches, with a count of the model's inputs image by image."""
    from art.attacks.evasion import SquareAttack
    from art.estimators.classification import BlackBoxClassifierNeuralNetwork

    np.random.seed(seed)  # noqa: NPY002  (ART draws from it)
    queries, after = torch.zeros(len(images), dtype=torch.int64), []
    for start in range(0, len(images), 100):
        batch, flat = images[start : start + 100], images[start : start + 100].flatten(1)

        def predict(x: np.ndarray[Any, Any], flat: Tensor = flat, start: int = start) -> np.ndarray[Any, Any]:
            inputs = torch.from_numpy(np.asarray(x, dtype=np.float32))
            whose = start + torch.cdist(inputs.flatten(1), flat, p=float("inf")).argmin(1)
            queries.index_add_(0, whose, torch.ones_like(whose))
            with torch.inference_mode():
                return model(inputs).numpy()

        shape = tuple(images.shape[1:])
        classifier = BlackBoxClassifierNeuralNetwork(predict, shape, 10, channels_first=True, clip_values=(0.0, 1.0))
        attacker = SquareAttack(classifier, eps=eps, max_iter=BUDGET // 2, batch_size=100, verbose=False)
        after.append(torch.from_numpy(attacker.generate(batch.numpy(), np.eye(10)[labels[start : start + 100].numpy()])))
    adversarial = torch.cat(after)
    with torch.inference_mode():
        classes = model(adversarial).argmax(1)
    return AttackResult(adversarial, adversarial - images, classes != labels, queries, classes.int())


def once(arguments: argparse.Namespace) -> dict[str, Row]:
    """Every method on the float model, seed 0; the bits are ZOQO's."""
    row = {"dataset": arguments.dataset, "model": "float", "seed": 0, "bits": arguments.bits}
    methods = ("zoqo", "signhunter", "zo_signsgd", "square")
    return {method: attack({**row, "method": method}, arguments.images) for method in methods}


def table(done: dict[str, Row]) -> str:
    columns = {"images": figure("images", ""), "failure rate": figure("failure_rate", ".3f")}
    columns |= {"mean queries": figure("mean_queries", ".1f"), "median": figure("median_queries", ".0f")}
    return "\n".join(WORK.table(done, {**columns, "to 90 %": figure("queries_to_90", "")}, over="mean queries", form=".1f"))


WORK = WorkList(Path(__file__).resolve(), rows(), {"attack": attack})

if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--dataset", choices=EPS)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    found, _ = parser.parse_known_args()
    if found.dataset:
        results = once(found)
        print(json.dumps(results) if found.json else json.dumps(results, indent=2))
    else:
        WORK.main(__doc__, table)
