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
"""Number of significant digits of a loss in the journal: all that fp32 has."""


class EZO(ZerothOrderOptimizer):
    """Example-wise zeroth-order optimization: each example i of a batch of B is queried along its own direction.

        z_i ~ {-1, +1}^n
        d_i = [L_i(x + eps z_i) - L_i(x - eps z_i)] / (2 eps)       all B of them from one pair of forwards
        x  <- x - lr / B sum_i d_i z_i

    g_i is the gradient of example i, and g their mean. E[d_i z_i] = g_i to first order in eps, so the estimate is unbiased for
    g. For a given batch its variance is (n - 1) / B mean_i |g_i|^2; one direction for all examples has (n - 1) |g|^2. EZO's is
    B times smaller if the examples agree, the same if their gradients are orthogonal and equally long, and larger if they
    cancel. Over batches from many examples, whose gradients have the mean square m and pairwise the mean inner product a m, the
    quotient of the two variances is 1 / (1 + (B - 1) a) for large n: below one unless the gradients oppose each other on the
    whole.

    If every weight is perturbed by itself, each direction costs a forward. Values that shift a whole group of weights (a
    block's offset) are cheap: the change of a product follows from sums of a token's inputs over the group
    (`kernels.protocol.Ops.add_shifts`), so B directions share one product.

    Args:
        spaces: block values, relative; see `ZerothOrderOptimizer`.
        lr: step size; with `auto` the rms of a step, in units of eps.
        eps: perturbation, relative, below 1.
        auto: see `ZerothOrderOptimizer`.
        weight_decay: decay of the tuned values themselves.
        seed: the run's seed.

    Raises:
        GradlessError: a space that cannot move its values for each token by itself; an eps of 1 or more.
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
        """Inside the context each token of a forward reads x + sign * eps * z_i, where i is the token's example.

        Args:
            example_of_token: int64, of any shape: the number of each token's example in the batch, from 0 on.
            first: the number of the batch's first example within the step.
            signs: +1 or -1; if several, each is for one of as many copies of the batch, in order.
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
        """The estimate from the examples of all micro-batches, in order."""
        return self.estimate_of([pair for each in measurements for pair in each.losses])


def _rounded(x: float) -> float:
    """A number rounded to the digits of fp32, which keeps the journal small."""
    return float(f"{x:.{DIGITS}g}")
