"""ZOQO: zero-order quantized optimization (Shamash et al., 2025, arXiv 2501.06736)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from gradless import noise
from gradless.batch import Batch, Loss
from gradless.errors import GradlessError
from gradless.methods.base import Estimate, GridOptimizer, Group, Measurement
from gradless.methods.zoqo.recipe import HOLD_IN_PARTS, check_noise
from gradless.noise import Distribution, Signs
from gradless.spaces import Space
from gradless.tensor import Move


class ZOQO(GridOptimizer):
    """Sign steps that never leave the grid.

        m   = max(floor(mu / s), 1)
        u_j in {-m s, ..., 0, ..., m s}                   uniform, or P(k s) proportional to phi(k s / mu)
        c   = sign(L(x + u) - L(x - u))
        x  <- clamp(x - eta_q c sign(u))                  with q directions sign(sum_i (L+_i - L-_i) u_i)

    x counts grid steps here: s = 1, `eps` is mu and `lr` is eta. The paper's eta_q = max(floor(eta / s), 1) s is
    `whole_steps`. Without it an eta below one step moves each code by a whole step with probability eta: the same update on
    average in sparser moves, which a schedule can reduce to zero. A space with a residual adds up the etas to a whole step. If
    the losses tie (c = 0), nothing moves.

    Args:
        spaces: spaces of integer codes; see `ZerothOrderOptimizer`.
        lr: eta, in grid steps.
        eps: mu, in grid steps. If it is well below 1, the discretized Gaussian leaves most codes alone.
        whole_steps: move by at least one step, as in the paper.
        hold: also query x itself, in a third forward, and move only if one side of it is lower. Near the optimum a forced step
            of one level would drift away.
        compare: orders two outcomes of a batch: above zero if the first is worse, 0 for a tie, below zero if it is better. With
            it an outcome can be anything that can be compared.
        span: number of neighbouring codes of a row that share one coordinate of u; 1 in the paper.
        weight_decay: must be 0.
        q: number of directions a step.
        seed: the run's seed.
        distribution: "gaussian" (discretized), "uniform", or a distribution in whole grid steps, which ignores eps.

    Raises:
        GradlessError: another distribution, a weight decay, or an eps that moves no code or moves one too far.
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 0.06,
        eps: float = 0.53,
        *,
        whole_steps: bool = False,
        hold: bool = False,
        compare: Callable[[Any, Any], float] | None = None,
        span: int = 1,
        weight_decay: float = 0.0,
        q: int = 1,
        seed: int = 0,
        distribution: Distribution | str = "gaussian",
    ) -> None:
        check_noise("gaussian" if isinstance(distribution, Distribution) else distribution, weight_decay)
        if hold and compare:
            raise GradlessError("hold needs losses, which a comparison does not give; leave one of the two out.")
        self.whole_steps, self.hold, self.compare, self.shape = whole_steps, hold, compare, distribution
        defaults = {"lr": lr, "eps": eps, "span": span, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=q, seed=seed, distribution="gaussian")

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "distribution": self.shape, "whole_steps": self.whole_steps, "hold": self.hold}

    def query_noise(self, group: Group) -> Distribution:
        """u."""
        if isinstance(self.shape, Distribution):
            return self.shape
        mu = group["eps"]
        m = max(math.floor(mu), 1)
        return noise.uniform_grid(m) if self.shape == "uniform" else noise.discretized_gaussian(m, mu)

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        """See `ZerothOrderOptimizer.measure`; with `hold`, a query without a side below x counts as a tie."""
        measurement = super().measure(batch)
        if not self.hold:
            return measurement
        here = float(batch.loss())
        # A NaN is not above x, so its pair stays, and the step is skipped and counted.
        held = ((here, here) if all(loss >= here for loss in pair) else pair for pair in measurement.losses)
        return replace(measurement, losses=tuple(held))

    def query(self, batch: Batch, query: int) -> tuple[Loss, Loss]:
        """The two losses or, if there is only a comparison, plus and minus half its sign in their place."""
        if self.compare is None:
            return super().query(batch, query)
        with self.perturbed(query, +1, many_forwards=batch.generates):
            plus = batch.outcome()
        with self.perturbed(query, -1, many_forwards=batch.generates):
            minus = batch.outcome()
        order = self.compare(plus, minus)
        half = ((order > 0) - (order < 0)) / 2
        return half, -half

    def estimate(self, measurements: Sequence[Measurement]) -> Estimate:
        """See `ZerothOrderOptimizer.estimate`.

        Raises:
            GradlessError: `hold` with several micro-batches.
        """
        if self.hold and len(measurements) > 1:
            raise GradlessError(HOLD_IN_PARTS)
        return super().estimate(measurements)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        """The loss difference, the weight of u under the sign."""
        del group
        return plus - minus

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """-eta sign(sum_i d_i u_i)."""
        terms = tuple((self.direction(step, query, group), difference) for query, difference in enumerate(d))
        yield Move(Signs(terms), -float(max(math.floor(lr), 1)) if self.whole_steps else -lr)


def mu_of_share(share: float) -> float:
    """The mu <= 1 with which the discretized Gaussian moves this share of all codes (at most 0.55)."""
    return 1 / math.sqrt(-2 * math.log(share / 2 / (1 - share)))
