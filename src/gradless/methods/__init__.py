"""The methods, one file each: the papers' and our own."""

from gradless.methods.base import Estimate, ZerothOrderOptimizer
from gradless.methods.ezo import EZO
from gradless.methods.mezo import MeZO
from gradless.methods.nzo import NZO
from gradless.methods.quzo import QuZO
from gradless.methods.qzo import QZO
from gradless.methods.zoqo import ZOQO

METHODS: dict[str, type[ZerothOrderOptimizer]] = {
    "nzo": NZO,
    "ezo": EZO,
    "qzo": QZO,
    "quzo": QuZO,
    "zoqo": ZOQO,
    "mezo": MeZO,
}

__all__ = ["EZO", "METHODS", "NZO", "QZO", "ZOQO", "Estimate", "MeZO", "QuZO", "ZerothOrderOptimizer"]
