"""`Stepper`: the steps of a run, each on the disk before a weight moves."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import torch

from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.files import Snapshot
from gradless.journal import Journal
from gradless.methods.base import Estimate, Measurement, ZerothOrderOptimizer

NAN_STEPS = 5
"""Number of consecutive steps without a finite loss after which a run stops."""


class Clock:
    """The time that a run has taken, without the pauses between its processes.

    Attributes:
        limit: seconds after which the run ends; None for no limit.
    """

    def __init__(self, before: float = 0.0, limit: float | None = None) -> None:
        self._before, self.limit = before, limit
        self.start()

    def start(self) -> None:
        """Count from now on, in addition to the time before this process."""
        self._began = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self._before + time.perf_counter() - self._began

    @property
    def is_over(self) -> bool:
        """Whether the limit is reached."""
        return self.limit is not None and self.seconds >= self.limit

    @property
    def share(self) -> float:
        """The used part of the limit; 0 without a limit."""
        return self.seconds / self.limit if self.limit else 0.0


class Stepper:
    """The steps of a run.

        measure, for each micro-batch     forwards; nothing is written
        commit                            the estimate, and its place in the journal
        apply                             the weights move

    Args:
        method: the method over the model's spaces.
        journal: the run's journal.
        clock: the run's clock.
        snapshot: the state of the base's files, which must not change.

    Attributes:
        skipped: number of steps whose loss was not finite.
        last_loss: the loss of the last step.
    """

    def __init__(self, method: ZerothOrderOptimizer, journal: Journal, clock: Clock, snapshot: Snapshot | None = None) -> None:
        self.method, self.journal, self.clock, self.snapshot = method, journal, clock, snapshot
        self.skipped, self.last_loss = 0, math.nan
        self._skipped_in_a_row = 0
        self._measurements: list[Measurement] = []
        self._examples = 0
        self._lr = [float(group["lr"]) for group in method.param_groups]

    def schedule(self, factor: float) -> None:
        """Set the next step's lr to this multiple of the run's."""
        for group, lr in zip(self.method.param_groups, self._lr, strict=True):
            group["lr"] = lr * factor

    def measure(self, batch: Batch) -> Measurement:
        """Measure one more micro-batch of this step."""
        batch.first = self._examples
        with torch.inference_mode():
            measurement = self.method.measure(batch)
        self._measurements.append(measurement)
        self._examples += batch.size
        return measurement

    def commit(self) -> Estimate:
        """Turn the step's measurements into its estimate, and write it to the journal.

        Raises:
            GradlessError: the base has changed, the journal cannot be written, or losses are not finite for too many steps.
        """
        estimate = self.method.estimate(self._measurements)
        self._measurements, self._examples = [], 0
        if self.snapshot is not None:
            self.snapshot.check()
        self.journal.append(estimate, self.clock.seconds)
        self.method.pending = estimate
        self.last_loss = float(estimate.loss)
        self._count(estimate)
        if self._skipped_in_a_row >= NAN_STEPS:
            raise GradlessError(
                f"the loss was not finite in {NAN_STEPS} steps in a row (up to step {estimate.step}); the model diverged: "
                "start again with a smaller --lr or --eps."
            )
        return estimate

    def apply(self) -> None:
        """Write the committed step's update to the weights."""
        self.method.step()
        self.note_moves()

    def note_moves(self) -> None:
        """Write to the journal the share of codes that the last update changed, if codes are tuned."""
        if self.method.moved is not None:
            self.journal.moved(self.method.t - 1, self.method.moved)

    def replay(self) -> Iterator[Estimate]:
        """Write the updates of the journal's steps, for a resume."""
        for written in self.method.replay(self.journal.estimates()):
            for estimate in written:
                self._count(estimate)
                yield estimate
        self.clock.start()

    def _count(self, estimate: Estimate) -> None:
        self.skipped += not estimate.finite
        self._skipped_in_a_row = 0 if estimate.finite else self._skipped_in_a_row + 1
