"""Shorter steps if a run's loss rises."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 20
"""Number of steps in a mean loss."""
ERRORS = 6.0
"""How many standard errors the current mean must exceed the lowest one by. Large, because the minimum of many means is low by
chance."""


class Backoff:
    """A factor of a run's step sizes.

    Attributes:
        factor: 1 at first; halved when the mean loss of the last `WINDOW` steps exceeds the lowest such mean by `ERRORS`
            standard errors of their difference. It follows from the losses alone, so a replay halves at the same steps.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._lowest, self._error = math.inf, 0.0

    def observe(self, loss: float) -> None:
        """Take in the next step's loss."""
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return
        mean, error = statistics.fmean(self._losses), statistics.stdev(self._losses) / math.sqrt(WINDOW)
        if mean < self._lowest:
            self._lowest, self._error = mean, error
        elif mean > self._lowest + ERRORS * math.hypot(self._error, error):
            self.factor /= 2
            self._losses.clear()
