"""Published accelerations of zeroth-order steps, each as a change of QZO, at equal forwards: SST-2 on SmolLM2-135M Q4_1.

    python papers/accelerations.py            # do what is still to do; stop and start again at will
    python papers/accelerations.py --table    # print the table from what is committed

A work list: a finished row is one line of papers/accelerations.jsonl. 1000 training rows, batch 16, all 872 dev rows, a
linear schedule, some 600 forwards of a batch. A step's root mean square is a ratio R of eps (`--lr auto --ratio R`; momentum
spreads it over later steps, FZOO takes the deviation of its losses for their size), so that what is compared is where steps
go. What learned no better has no place in the package: it is here.

Second moments need no row. Of one direction of random signs, z^2 = 1 in every coordinate, and so the second moment that Adam
keeps a coordinate is one number for all: the mean square of d, by whose root `--lr auto` divides.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))

from worklist import Row, WorkList, figure, model_path

from gradless import QZO
from gradless.batch import Batch, Loss
from gradless.methods.base import Group, Measurement
from gradless.methods.qzo.recipe import QZORecipe
from gradless.methods.registry import RECIPES
from gradless.noise import Direction
from gradless.tensor import Move

FORWARDS = 600
BETA, REACH = 0.9, 24
"""Of momentum; and the steps that it reaches back, beyond which its weights sum to less than .08."""
DIMENSIONS, REFRESHED = 8, 48
"""Of a subspace; and the steps after which it is drawn anew."""


class Momentum(QZO):
    """The update is an exponential mean of the last estimates; their directions are drawn again, so that no state is kept."""

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        past = group.setdefault("past", deque(maxlen=REACH))
        past.appendleft((step, d, lr))
        for age, (before, derivatives, rate) in enumerate(past):
            yield from super().moves(before, derivatives, (1 - BETA) * BETA**age * rate, group)


class Subspace(QZO):
    """Directions come from few, asked in turn and again, until others are drawn."""

    def direction(self, step: int, query: int, group: Group) -> Direction:
        epoch, within = divmod(step, REFRESHED)
        return super().direction(epoch * REFRESHED + within % DIMENSIONS, query, group)


class FZOO(QZO):
    """q one-sided queries and the loss at x itself, q + 1 forwards; steps are measured by the losses' standard deviation
    (Dang et al., 2025, arXiv 2506.09034)."""

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        here, losses = float(batch.loss()), []
        for query in range(self.q):
            with self.perturbed(query, +1, many_forwards=batch.generates):
                losses.append((float(batch.loss()), here))
        return Measurement(tuple(losses), batch.size)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        return (plus - minus) / group["eps"]

    def step_size(self, group: int, d: Sequence[Loss]) -> float:
        options, deviation = self.param_groups[group], float(torch.tensor(d).std())
        usable = 0 < deviation < math.inf
        return float(self.backoff.factor * options["lr"] * options["eps"] * math.sqrt(len(d)) / deviation) if usable else 0.0


class Changed(QZORecipe):
    """QZO's recipe around a changed method."""

    def __init__(self, name: str, changed: type[QZO]) -> None:
        self.name, self.title, self.changed = name.lower(), f"{name}, a change of QZO", changed  # type: ignore[misc]

    def method(self) -> type[QZO]:
        return self.changed


CHANGES = [Changed(name, changed) for name, changed in (("momentum", Momentum), ("subspace", Subspace), ("FZOO", FZOO))]
RECIPES.update({each.name: each for each in CHANGES})


def rows() -> dict[str, Row]:
    """Every row, three seeds of the two best: more directions a step bear a longer one, about as the root of their number."""
    made: dict[str, Row] = {}
    for name, ratio, q, seeds in (
        ("QZO", 0.15, 1, 1),
        ("QZO", 0.3, 1, 3),
        ("QZO", 0.6, 1, 1),
        ("QZO", 0.3, 4, 1),
        ("QZO", 0.6, 4, 3),
        ("QZO", 1.2, 4, 1),
        ("FZOO", 0.6, 8, 1),
        ("FZOO", 1.2, 8, 1),
        ("momentum", 0.3, 1, 1),
        ("momentum", 0.6, 1, 1),
        ("subspace", 0.3, 1, 1),
    ):
        steps = FORWARDS // (q + 1 if name == "FZOO" else 2 * q)
        for seed in range(seeds):
            row = {"kind": "tune", "change": name, "ratio": ratio, "q": q, "steps": steps, "seed": seed}
            made[f"{name}, R {ratio}, {q} a step, {steps} steps, seed {seed}"] = row
    return made


def tune(row: Row) -> Row:
    shared: dict[str, Any] = {"lr": "auto", "eps": 2e-2, "distribution": "rademacher"}
    return WORK.tune({**row, **shared, "method": row["change"].lower()}, model_path(), 10**6)


def table(done: dict[str, Row]) -> str:
    return "\n".join(WORK.table(done, {"accuracy": figure("accuracy"), "loss": figure("loss")}))


WORK = WorkList(Path(__file__).resolve(), rows(), {"tune": tune})

if __name__ == "__main__":
    WORK.main(__doc__, table)
