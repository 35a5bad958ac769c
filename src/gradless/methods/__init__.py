"""The methods, one file a paper."""

from gradless.methods.base import Estimate, ZerothOrderOptimizer
from gradless.methods.mezo import MeZO
from gradless.methods.qzo import QZO

METHODS: dict[str, type[ZerothOrderOptimizer]] = {"mezo": MeZO, "qzo": QZO}

__all__ = ["METHODS", "QZO", "Estimate", "MeZO", "ZerothOrderOptimizer"]
