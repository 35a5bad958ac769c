"""EZO: example-wise zeroth-order optimization; ours, in the line of flipout (Wen et al., 2018, arXiv 1803.04386)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from gradless.batch import Batch, Loss
from gradless.errors import GradlessError
from gradless.methods.base import Estimate, Group, Measurement, ZerothOrderOptimizer
from gradless.noise import Rademacher
from gradless.spaces import Space
from gradless.tensor import Move

DIGITS = 9
"""Significant digits of a loss in the journal: all that an fp32 number has."""


class EZO(ZerothOrderOptimizer):
    """Example-wise zeroth-order optimization: each example i of a batch of B is queried along its own direction.

        z_i ~ {-1, +1}^n
        d_i = [L_i(x + eps z_i) - L_i(x - eps z_i)] / (2 eps)       all B of them from one pair of forwards
        x  <- x - lr / B sum_i d_i z_i

    With g_i the gradient of example i and g their mean, E[d_i z_i] = g_i to first order in eps, and the estimate is unbiased
    for g. Given the batch its variance is (n - 1) / B mean_i |g_i|^2, where that of one direction for all is (n - 1) |g|^2: B
    times less where the examples agree, as much where their gradients are orthogonal and equally long, more where they cancel.
    Over batches drawn from many examples, whose gradients have the mean square m and of which two have the inner product a m
    on average, the quotient is 1 / (1 + (B - 1) a) for large n: below one, unless they oppose each other on the whole.

    A direction for each example costs a forward of its own where every weight is perturbed by itself. Values that shift a whole
    group of weights (a block's offset) are the cheap case: what a shift changes in a product follows from sums of a token's
    inputs over the group (`kernels.add_shifts`), so that B directions share one product.

    Args:
        spaces: block values, relative; see `ZerothOrderOptimizer`.
        lr: step size; with `auto` the rms of a step, in units of eps.
        eps: perturbation, relative, below 1.
        auto: see `ZerothOrderOptimizer`.
        weight_decay: shrinks the tuned values themselves.
        seed: of the run.

    Raises:
        GradlessError: a space whose values tokens cannot read each under a move of their own; an eps of 1 or more.
    """

    probe_queries = 1

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 0.3,
        eps: float = 1e-2,
        *,
        auto: bool = True,
        weight_decay: float = 0.0,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "auto": auto, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=1, seed=seed, distribution=Rademacher())
        for space in self.spaces:
            if not space.supports_per_token_views:
                raise GradlessError(f"ezo tunes values of blocks; {space.name} is {type(space).__name__}.")
        for group in self.param_groups:
            if group["eps"] >= 1:
                raise GradlessError(f"eps is {group['eps']}; it is relative to what it moves, and must be below 1.")

    @property
    def arguments(self) -> dict[str, Any]:
        return {"seed": self.seed}

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        return _rounded((plus - minus) / (2 * group["eps"]))

    @contextmanager
    def perturbed_by_example(self, example_of_token: Tensor, first: int, *signs: int) -> Iterator[None]:
        """Forwards inside read x + sign * eps * z_i for each token; i is its example.

        Args:
            example_of_token: int64, of any shape: the example of each token of a batch, from 0 on.
            first: the number of the batch's first example within the step.
            signs: +1 or -1; several: each for a copy of the batch behind the one before.
        """
        n = int(example_of_token.max()) + 1
        views = torch.cat([example_of_token.flatten() + n * k for k in range(len(signs))])
        with ExitStack() as viewed:
            for group, spaces in zip(self.param_groups, self.spaces_of, strict=True):
                z = [self.direction(self.t, first + i, group) for i in range(n)]
                moves = [Move(each, sign * self.radius(group)) for sign in signs for each in z]
                for space in spaces:
                    viewed.enter_context(space.viewed_per_example(views, moves))
            yield

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        """(loss at +eps, loss at -eps) of each example, along its own direction."""
        examples = batch.example_of_token
        if batch.paired:
            with self.perturbed_by_example(examples, batch.first, +1, -1):
                plus, minus = batch.paired_losses()
        else:
            with self.perturbed_by_example(examples, batch.first, +1):
                plus = batch.losses()
            with self.perturbed_by_example(examples, batch.first, -1):
                minus = batch.losses()
        pairs = zip(plus.tolist(), minus.tolist(), strict=True)
        return Measurement(tuple((_rounded(p), _rounded(m)) for p, m in pairs), size=1)

    def estimate(self, measurements: Sequence[Measurement]) -> Estimate:
        """The estimate of the examples of all micro-batches, one after the other."""
        return self.estimate_of([pair for each in measurements for pair in each.losses])


def _rounded(x: float) -> float:
    """A number with the digits that fp32 has: a journal of many stays small."""
    return float(f"{x:.{DIGITS}g}")
