"""QuZO: quantized zeroth-order fine-tuning for large language models (Zhou et al., 2025, arXiv 2502.12346)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from gradless import noise
from gradless.batch import Loss
from gradless.errors import GradlessError
from gradless.methods.base import GridOptimizer, Group
from gradless.noise import Distribution, RoundedGaussian, Stream
from gradless.spaces import Space
from gradless.tensor import Move


class QuZO(GridOptimizer):
    """Quantized zeroth-order optimization on integer codes: x, its queries and its updates are whole grid steps.

        u   ~ N(0, I)
        u_1 = SR(eps u),  u_2 = SR(eps u)        one u, rounded stochastically: E[u_1 | u] = eps u
        mu  = [L(x + u_1) - L(x - u_1)] / (2 eps)
        x  <- x - SR((lr mu / q) u_2 / eps),  stopped at the grid's ends

    summed over q directions; a space with a residual saves up what SR would decide at random. x counts grid steps, so that
    eps and lr do too. With two independent roundings (Q-RGE2, `roundings` 2, section 3) E[u_1 u_2^T] = eps^2 I and the
    estimate is unbiased. With one (Q-RGE1, `roundings` 1: u_2 = u_1) E[u_1 u_1^T] = (eps^2 + v) I, v being the rounding's
    variance: the same direction, longer. Where eps is far below a step, v is about 0.8 eps, and Q-RGE2's two roundings
    hardly ever move the same code; Q-RGE1 is the default.

    Args:
        spaces: of integer codes; see `ZerothOrderOptimizer`.
        lr: step size, for a gradient per grid step.
        eps: perturbation in grid steps; well below 1, a share of about 0.8 eps of all codes moves in a query.
        roundings: 1 or 2, as above.
        perturbation_bits: cut u_1 to the symmetric integers of so many bits, 2 to 8 (the authors' scripts: 4), where given;
            one rounding only.
        span: this many neighbouring codes of a row share one coordinate of u; 1 in the paper.
        weight_decay: must be 0: a code decays by no fraction.
        q: directions a step (the paper's n).
        seed: of the run.
        distribution: "gaussian".

    Raises:
        GradlessError: another distribution, a weight decay, impossible bits, or an eps that moves no code, or too far.
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
        if distribution != "gaussian" or weight_decay:
            raise GradlessError("QuZO rounds Gaussian directions onto whole codes: distribution gaussian, weight_decay 0.")
        if perturbation_bits is not None and not (2 <= perturbation_bits <= 8 and roundings == 1):
            raise GradlessError("QuZO's perturbation_bits are 2 to 8, and go with one rounding.")
        self.roundings, self.perturbation_bits = roundings, perturbation_bits
        defaults = {"lr": lr, "eps": eps, "span": span, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=q, seed=seed, distribution=distribution)

    def query_noise(self, group: Group) -> Distribution:
        """u_1. A u that is rounded once is drawn rounded: the same distribution, at a sixth of the cost."""
        if self.roundings == 2:
            return RoundedGaussian(group["eps"])
        bits = self.perturbation_bits
        return noise.rounded_gaussian(group["eps"], None if bits is None else 2 ** (bits - 1) - 1)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        """mu / eps, the factor of u_2."""
        eps: float = group["eps"]
        return (plus - minus) / (2 * eps**2)

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """-(lr mu / q) u_2 / eps of each direction, which the space rounds onto its grid."""
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
