"""A short probe before the run that sets eps, the reach of queries."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FACTORS = tuple(2.0**k for k in range(-3, 4))
"""Multiples of the default eps at which d is measured."""


def best_factor(derivatives: Callable[[float], Tensor]) -> float:
    """The factor for eps.

    A central difference d(eps) along one direction has an error of about sigma / eps if the loss scatters by sigma, as rounding
    to a bf16 scratch makes it do, and of c eps^2 if the loss is not a straight line. Both show in

        mean (d(eps) - d(eps / 2))^2 / mean (d(eps)^2 + d(eps / 2)^2)

    which is smallest where they balance, between eps / 2 and eps; their geometric mean is the result. If the loss does not
    change, or is never finite, eps stays as it is.

    Args:
        derivatives: d with every eps multiplied by a factor, along the same directions each time: fp32 (directions,).
    """
    d = torch.stack([derivatives(factor) for factor in FACTORS])
    apart = (d[1:] - d[:-1]).square().mean(1) / (d[1:].square() + d[:-1].square()).mean(1)
    least = int(apart.nan_to_num(torch.inf).argmin())
    return math.sqrt(FACTORS[least] * FACTORS[least + 1]) if apart.isfinite().any() else 1.0
