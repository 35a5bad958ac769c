"""How far queries reach: eps, from a short probe before the run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = tuple(2.0**k for k in range(-3, 4))
"""Multiples of the default eps at which d is measured."""


def best_factor(derivatives: Callable[[float], Tensor]) -> float:
    """By what to multiply eps.

    A central difference d(eps) along one direction errs by about sigma / eps where a loss scatters by sigma, which rounding to
    a bf16 scratch brings with it, and by c eps^2 where the loss is no straight line. Both show in

        mean (d(eps) - d(eps / 2))^2 / mean (d(eps)^2 + d(eps / 2)^2)

    which is least where they balance: between eps / 2 and eps, whose geometric mean is the answer. Where no loss follows, or
    none is finite, eps stays as it is.

    Args:
        derivatives: d where every eps is multiplied by a factor, along the same directions each time: fp32 (directions,).
    """
    d = torch.stack([derivatives(factor) for factor in FACTORS])
    apart = (d[1:] - d[:-1]).square().mean(1) / (d[1:].square() + d[:-1].square()).mean(1)
    least = int(apart.nan_to_num(torch.inf).argmin())
    return math.sqrt(FACTORS[least] * FACTORS[least + 1]) if apart.isfinite().any() else 1.0
