"""QuZO's recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.errors import GradlessError
from gradless.flags import option, whole
from gradless.methods.codes import CodeOptions, CodeRecipe
from gradless.methods.recipe import BITS, Arguments, Defaults

if TYPE_CHECKING:
    from gradless.methods.quzo.method import QuZO


def check_noise(distribution: str, weight_decay: float) -> None:
    """Refuse directions that are not Gaussian, and a weight decay."""
    if distribution != "gaussian" or weight_decay:
        raise GradlessError("QuZO rounds Gaussian directions onto whole codes: distribution gaussian, weight_decay 0.")


@dataclass
class QuZOOptions(CodeOptions):
    """The options of QuZO."""

    roundings: int = option(1, "QuZO: round a direction once (Q-RGE1) or twice (Q-RGE2).", choices=(1, 2), within=whole(1, 2))
    perturbation_bits: int | None = option(
        None, "QuZO: cut a query's steps to the integers of this many bits (with one rounding).", within=BITS
    )


class QuZORecipe(CodeRecipe[QuZOOptions]):
    """See `QuZO`. Its update is in grid steps, and its gradient is taken per grid step."""

    name = "quzo"
    title = "QuZO ([arXiv 2502.12346](https://arxiv.org/abs/2502.12346)): its integer codes"
    summary = "integer codes, by stochastic rounding"
    options = QuZOOptions
    plain, few_levels, adapters = Defaults(0.6, 0.35), Defaults(0.15, 0.5), Defaults(1.6, 1.6)
    power = 2

    def method(self) -> type[QuZO]:
        from gradless.methods.quzo.method import QuZO

        return QuZO

    def check(self, options: QuZOOptions) -> None:
        super().check(options)
        check_noise(options.distribution, options.weight_decay)
        if options.perturbation_bits is not None and options.roundings != 1:
            raise GradlessError("perturbation_bits goes with one rounding; leave --roundings out, or --perturbation-bits.")

    def arguments(self, options: QuZOOptions) -> Arguments:
        return {
            "q": options.q or self.queries,
            "distribution": options.distribution,
            "roundings": options.roundings,
            "perturbation_bits": options.perturbation_bits,
        }

    def eps_of_share(self, share: float) -> float:
        from gradless.methods.quzo.method import eps_of_share

        return eps_of_share(share)
