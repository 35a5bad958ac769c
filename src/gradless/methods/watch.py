"""A watch over a run's losses: where they rise, steps become shorter."""

from __future__ import annotations

import math
import statistics
from collections import deque

WINDOW = 20
"""Steps whose mean loss is held against the lowest such mean so far."""
ERRORS = 6.0
"""Standard errors of their difference by which it is above it, where it has risen by more than the lowest of many means may
lie below others by chance."""


class Watch:
    """By what a run's step sizes are multiplied.

    Attributes:
        factor: 1 at first; halved when the mean loss of the last `WINDOW` steps exceeds the lowest mean of so many by `ERRORS`
            standard errors. It follows from the losses alone, so that a replay halves where the run did.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self._lowest, self._error = math.inf, 0.0

    def see(self, loss: float) -> None:
        """The next step's loss."""
        self._losses.append(loss)
        if len(self._losses) < WINDOW:
            return
        mean, error = statistics.fmean(self._losses), statistics.stdev(self._losses) / math.sqrt(WINDOW)
        if mean < self._lowest:
            self._lowest, self._error = mean, error
        elif mean > self._lowest + ERRORS * math.hypot(self._error, error):
            self.factor /= 2
            self._losses.clear()
