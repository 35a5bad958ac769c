"""QuZO: quantized zeroth-order fine-tuning for large language models (Zhou et al., 2025, arXiv 2502.12346)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from gradless import noise
from gradless.batch import Loss
from gradless.errors import GradlessError
from gradless.methods.base import GridOptimizer, Group
from gradless.methods.quzo.recipe import check_noise
from gradless.noise import Distribution, RoundedGaussian, Stream
from gradless.spaces import Space
from gradless.tensor import Move


class QuZO(GridOptimizer):
    """Quantized zeroth-order optimization on integer codes: x, its queries and its updates are whole grid steps.

        u   ~ N(0, I)
        u_1 = SR(eps u),  u_2 = SR(eps u)        one u, rounded stochastically: E[u_1 | u] = eps u
        mu  = [L(x + u_1) - L(x - u_1)] / (2 eps)
        x  <- x - SR((lr mu / q) u_2 / eps),  stopped at the grid's ends

    summed over q directions. A space with a residual keeps the remainder that SR would round at random. x counts grid steps,
    and so do eps and lr. Two independent roundings (Q-RGE2, `roundings` 2, section 3) give E[u_1 u_2^T] = eps^2 I and an
    unbiased estimate. One rounding (Q-RGE1, `roundings` 1: u_2 = u_1) gives E[u_1 u_1^T] = (eps^2 + v) I with the rounding's
    variance v: the same direction, longer. If eps is far below a step, v is about 0.8 eps, and the two roundings of Q-RGE2
    hardly ever move the same code. Q-RGE1 is the default.

    Args:
        spaces: spaces of integer codes; see `ZerothOrderOptimizer`.
        lr: step size, for a gradient per grid step.
        eps: perturbation in grid steps. If it is well below 1, a query moves a share of about 0.8 eps of all codes.
        roundings: 1 or 2, as above.
        perturbation_bits: cut u_1 to the symmetric integers of this many bits, 2 to 8 (4 in the authors' scripts); with one
            rounding only. None to leave u_1 as it is.
        span: number of neighbouring codes of a row that share one coordinate of u; 1 in the paper.
        weight_decay: must be 0, because a code cannot decay by a fraction.
        q: number of directions a step (the paper's n).
        seed: the run's seed.
        distribution: "gaussian".

    Raises:
        GradlessError: another distribution, a weight decay, impossible bits, or an eps that moves no code or moves one too far.
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 0.2,
        eps: float = 0.35,
        *,
        roundings: int = 1,
        perturbation_bits: int | None = None,
        span: int = 1,
        weight_decay: float = 0.0,
        q: int = 1,
        seed: int = 0,
        distribution: str = "gaussian",
    ) -> None:
        check_noise(distribution, weight_decay)
        if perturbation_bits is not None and not (2 <= perturbation_bits <= 8 and roundings == 1):
            raise GradlessError("QuZO's perturbation_bits are 2 to 8, and go with one rounding.")
        self.roundings, self.perturbation_bits = roundings, perturbation_bits
        defaults = {"lr": lr, "eps": eps, "span": span, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=q, seed=seed, distribution=distribution)

    @property
    def arguments(self) -> dict[str, Any]:
        return {**super().arguments, "roundings": self.roundings, "perturbation_bits": self.perturbation_bits}

    def query_noise(self, group: Group) -> Distribution:
        """u_1. If u is rounded once, it is drawn rounded: the same distribution at a sixth of the cost."""
        if self.roundings == 2:
            return RoundedGaussian(group["eps"])
        bits = self.perturbation_bits
        return noise.rounded_gaussian(group["eps"], None if bits is None else 2 ** (bits - 1) - 1)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        """mu / eps, the factor of u_2."""
        eps: float = group["eps"]
        return (plus - minus) / (2 * eps**2)

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """-(lr mu / q) u_2 / eps for each direction, which the space rounds to its grid."""
        for query, derivative in enumerate(d):
            u = self.direction(step, query, group)
            if self.roundings == 2:
                u = replace(u, distribution=RoundedGaussian(group["eps"], Stream.SECOND))
            yield Move(u, -lr * derivative / self.q)


def eps_of_share(share: float) -> float:
    """The eps with which a query moves this share of all codes: P(SR(eps u) != 0) = E[min(1, eps |u|)]."""
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if RoundedGaussian(middle).share < share else (low, middle)
    return high
