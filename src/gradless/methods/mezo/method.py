"""MeZO: fine-tuning language models with just forward passes (Malladi et al., 2023, arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Iterable

from gradless.batch import Loss
from gradless.methods.base import Group, ZerothOrderOptimizer
from gradless.noise import Distribution
from gradless.spaces import Space


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (Algorithm 1), the full-precision baseline.

        u ~ N(0, I)
        d = [L(x + eps u) - L(x - eps u)] / (2 eps)
        x <- x - lr (d u + weight_decay x)

    with d u averaged over q directions. The paper perturbs weights in place and restores them, which leaves 45 % of fp16
    weights different after one cycle. Here a query reads x and writes nothing, so x stays exact in any type. Updates of bf16
    values are rounded stochastically, E[bf16(x)] = x; with rounding to nearest most of them would vanish.

    Args:
        spaces: see `ZerothOrderOptimizer`; leave biases and norms in a group with `weight_decay` 0, as the paper does.
        lr: step size; the paper's are 1e-7 to 1e-6 for full tuning of OPT.
        eps: perturbation; the paper's is 1e-3.
        auto: see `ZerothOrderOptimizer`.
        weight_decay: decay of x itself.
        q: number of directions a step (the paper's n).
        seed: the run's seed.
        distribution: "gaussian" as in the paper, or "rademacher".
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 1e-6,
        eps: float = 1e-3,
        *,
        auto: bool = False,
        weight_decay: float = 0.0,
        q: int = 1,
        seed: int = 0,
        distribution: Distribution | str = "gaussian",
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "auto": auto, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=q, seed=seed, distribution=distribution)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        eps: float = group["eps"]
        return (plus - minus) / (2 * eps)
