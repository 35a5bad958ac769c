"""The loop of `gradless tune`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Protocol

from gradless.batch import Batch
from gradless.training.stepper import Stepper


class Observer(Protocol):
    """An observer of a run, which may stop it after a step.

    Attributes:
        stopped: whether the run should end.
    """

    stopped: bool

    def stepped(self, step: int) -> None:
        """Called after each step with the number of steps that are done."""

    def evaluated(self, metrics: dict[str, float]) -> None:
        """Called with the metrics after each measurement of the model."""


def train(
    stepper: Stepper,
    batches: Callable[[int], Iterable[Batch]],
    steps: int,
    schedule: str,
    observer: Observer,
    evaluate: Callable[[], dict[str, float]] | None = None,
    every: int = 1,
) -> None:
    """Run from the end of the journal until the steps are done, the time is over, or the observer stops it.

    Args:
        stepper: the run's stepper.
        batches: a step's number -> its micro-batches.
        steps: number of steps in all.
        schedule: how the learning rate falls; see `falling`.
        observer: told of every step.
        evaluate: measures the model; None for no measurements.
        every: number of steps between measurements; none is made after the last step.
    """
    clock = stepper.clock
    for step in range(stepper.journal.steps, steps):
        if observer.stopped or (step and clock.is_over):
            break
        stepper.schedule(falling(schedule, max(step / steps, clock.share)))
        for batch in batches(step):
            stepper.measure(batch)
        stepper.commit()
        stepper.apply()
        observer.stepped(step + 1)
        last = step + 1 == steps or observer.stopped or clock.is_over
        if evaluate is not None and (step + 1) % every == 0 and not last:
            metrics = evaluate()
            stepper.journal.evaluated(step + 1, metrics, clock.seconds)
            observer.evaluated(metrics)


def falling(schedule: str, done: float) -> float:
    """The factor of the learning rate: linear, constant or cosine.

    Args:
        schedule: the schedule's name.
        done: the share of the run that is done, by steps or by time.
    """
    done = min(done, 1.0)
    return {"linear": 1 - done, "constant": 1.0, "cosine": (1 + math.cos(math.pi * done)) / 2}[schedule]
