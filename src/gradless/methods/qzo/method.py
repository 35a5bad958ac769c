"""QZO: fine-tuning quantized neural networks with zeroth-order optimization (Shang et al., 2025, arXiv 2505.13430)."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from gradless.batch import Loss
from gradless.methods.base import Group, ZerothOrderOptimizer
from gradless.noise import Distribution
from gradless.spaces import Space


class QZO(ZerothOrderOptimizer):
    """Quantized zeroth-order optimization: perturb the scales Delta of W = Delta (.) Wbar, leave the codes Wbar alone.

        z  ~ N(0, I)
        d  = [L((Delta + eps z) (.) Wbar) - L((Delta - eps z) (.) Wbar)] / (2 eps)        Q-SPSA
        d' = clip(d, -C, C)                                                               DDC
        Delta <- Delta - lr d' z,  stopped at zero

    The search space decides what Delta is (`spaces.BlockSpace`): a block's scale, its offset, or both by one factor. It moves
    relative to each block's size (the default, with which one eps and lr serve every layer) or absolutely, as in the paper.
    A scale keeps the sign that it has in the file, in queries and in updates. Unquantized parameters can be searched in the
    same step: give their spaces in another group, with its own `lr` and `eps`.

    The paper calls the clipped estimate unbiased. It is in fact shrunk: for a linear loss E[clip(d) z] = P(|d| < C) g.

    Args:
        spaces: see `ZerothOrderOptimizer`.
        lr: step size; the paper's 1e-7 is absolute, a relative one is of the order of 1e-4.
        eps: perturbation; the paper's 1e-3 is absolute, a relative one is of the order of 1e-2.
        clip: C, the largest |d| that an update follows; the paper's 100 belongs to its absolute eps.
        auto: see `ZerothOrderOptimizer`.
        weight_decay: decay of the tuned values themselves.
        q: number of directions a step.
        seed: the run's seed.
        distribution: "gaussian" as in the paper, or "rademacher".
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 4e-4,
        eps: float = 2e-2,
        *,
        clip: float = 100.0,
        auto: bool = False,
        weight_decay: float = 0.0,
        q: int = 1,
        seed: int = 0,
        distribution: Distribution | str = "gaussian",
    ) -> None:
        defaults = {"lr": lr, "eps": eps, "clip": clip, "auto": auto, "weight_decay": weight_decay}
        super().__init__(spaces, defaults, q=q, seed=seed, distribution=distribution)

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        d, clip = (plus - minus) / (2 * group["eps"]), group["clip"]
        return d.clamp(-clip, clip) if isinstance(d, Tensor) else max(-clip, min(d, clip))
