"""ZO-signSGD: signSGD via zeroth-order oracle (Liu et al., 2019, ICLR)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from gradless.batch import Batch, Loss
from gradless.methods.base import Group, Measurement, ZerothOrderOptimizer, number
from gradless.noise import Distribution, Signs
from gradless.spaces import Space
from gradless.tensor import Move


class ZOSignSGD(ZerothOrderOptimizer):
    """Steps along the sign of an estimated gradient.

        g   = (1 / q) sum_i [ L(x + eps u_i) - L(x) ] / eps * u_i
        x  <- x - lr sign(g)

    One-sided: q + 1 losses a step.

    Args:
        spaces: see `ZerothOrderOptimizer`; spaces that can move by `Signs`.
        lr: step size.
        eps: the paper's mu.
        q: directions a step.
        seed: of the run.
        distribution: "gaussian" or "rademacher".
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float,
        eps: float,
        *,
        q: int = 10,
        seed: int = 0,
        distribution: Distribution | str = "gaussian",
    ) -> None:
        super().__init__(spaces, {"lr": lr, "eps": eps, "weight_decay": 0.0}, q=q, seed=seed, distribution=distribution)

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        """(loss at x + eps u, loss at x) along each of this step's directions."""
        here, losses = batch.loss(), []
        for query in range(self.q):
            with self.perturbed(query, +1, many_forwards=batch.generates):
                losses.append((number(batch.loss()), number(here)))
        return Measurement(tuple(losses), batch.size)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        return (plus - minus) / group["eps"]

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """-lr sign(sum_i d_i u_i)."""
        yield Move(Signs(tuple((self.direction(step, query, group), each) for query, each in enumerate(d))), -lr)
