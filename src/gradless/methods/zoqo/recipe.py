"""ZOQO's recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.errors import GradlessError
from gradless.flags import option
from gradless.methods.codes import CodeOptions, CodeRecipe
from gradless.methods.recipe import Arguments, Defaults

if TYPE_CHECKING:
    from gradless.methods.zoqo.method import ZOQO

HOLD_IN_PARTS = "hold compares a query with the loss at x batch by batch; leave accumulation out with it."


def check_noise(distribution: str, weight_decay: float) -> None:
    """Refuse a named distribution that has no whole steps, and a weight decay."""
    if distribution not in ("gaussian", "uniform") or weight_decay:
        raise GradlessError("ZOQO's noise is gaussian (discretized) or uniform on the grid, and its weight_decay is 0.")


@dataclass
class ZOQOOptions(CodeOptions):
    """The options of ZOQO."""

    whole_steps: bool = option(False, "ZOQO: move by at least a whole grid step, as in the paper; without a residual.")
    hold: bool = option(False, "ZOQO: a third forward a step, at x itself; move only if one side of it is lower.")


class ZOQORecipe(CodeRecipe[ZOQOOptions]):
    """See `ZOQO`. Its update is in grid steps, and only the signs of loss differences count."""

    name = "zoqo"
    title = "ZOQO ([arXiv 2501.06736](https://arxiv.org/abs/2501.06736)): its integer codes"
    summary = "integer codes, by signs"
    options = ZOQOOptions
    plain, few_levels, adapters = Defaults(0.04, 0.53), Defaults(0.04, 0.53), Defaults(0.05, 2.4)
    power = 1

    def method(self) -> type[ZOQO]:
        from gradless.methods.zoqo.method import ZOQO

        return ZOQO

    def check(self, options: ZOQOOptions) -> None:
        super().check(options)
        check_noise(options.distribution, options.weight_decay)
        if options.hold and getattr(options, "accumulate", 1) > 1:
            raise GradlessError(HOLD_IN_PARTS)

    def arguments(self, options: ZOQOOptions) -> Arguments:
        return {
            "q": options.q or self.queries,
            "distribution": options.distribution,
            "whole_steps": options.whole_steps,
            "hold": options.hold,
        }

    def eps_of_share(self, share: float) -> float:
        from gradless.methods.zoqo.method import mu_of_share

        return mu_of_share(share)

    def scaled_eps(self, eps: float, unit: float) -> float:
        """Below one step mu is no standard deviation. There the square root of the share of moved codes is scaled instead."""
        from gradless.methods.zoqo.method import mu_of_share
        from gradless.noise import discretized_gaussian

        if eps * unit < eps < 1:
            return mu_of_share(discretized_gaussian(1, eps).share * unit**2)
        return eps * unit
