"""The progress line of a run, and how the run is stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from gradless.memory import resident_bytes
from gradless.training.stepper import Stepper

NO_LIMIT = 10**9
"""Steps of a run that ends by the clock."""
SMOOTHING = 0.95
"""Weight of the losses before in the smoothed loss that is shown."""
EVERY_SECONDS = 10.0
"""Seconds between lines if standard error is no terminal."""


@contextmanager
def stopping_on_interrupt(line: ProgressLine) -> Iterator[None]:
    """The first Ctrl-C inside stops the run after its current step, a second one at once."""

    def stop(_number: int, _frame: object) -> None:
        line.stopped = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressLine:
    """A live line: step, loss, accuracy, step time, resident memory, time left. It is a run's `loop.Observer`.

    Args:
        stepper: of the run.
        steps: of the run; `NO_LIMIT` if it ends by the clock.
        quiet: show nothing.

    Attributes:
        stopped: whether an interrupt asked the run to end.
    """

    def __init__(self, stepper: Stepper, steps: int, *, quiet: bool) -> None:
        self.stepper, self.quiet, self.stopped = stepper, quiet, False
        self.by_clock = steps >= NO_LIMIT
        self.total = (stepper.clock.limit or 0) if self.by_clock else steps
        self.console = Console(stderr=True)
        self.progress = Progress(
            TextColumn("{task.fields[text]}"),
            BarColumn(),
            MofNCompleteColumn() if not self.by_clock else TextColumn("{task.percentage:3.0f} %"),
            TimeRemainingColumn(),
            console=self.console,
            disable=self.quiet or not self.console.is_terminal,
        )
        self.loss: float | None = None
        self.accuracy: float | None = None
        self.steps_here = 0

    def begin(self) -> None:
        """The first step comes now."""
        self.began = self.printed = time.perf_counter()
        self.done_before = self._done(self.stepper.journal.steps)
        self.progress.update(self.bar, total=self.total, completed=int(self.done_before), text="")

    def stepped(self, step: int) -> None:
        """See `Observer`."""
        loss = self.stepper.last_loss
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else SMOOTHING * self.loss + (1 - SMOOTHING) * loss
        self.steps_here += 1
        now = time.perf_counter()
        text = self._text(step, (now - self.began) / self.steps_here)
        done = self._done(step)
        self.progress.update(self.bar, completed=done, text=text)
        if not self.quiet and not self.console.is_terminal and now - self.printed > EVERY_SECONDS:
            self.printed = now
            left = (self.total - done) * (now - self.began) / max(done - self.done_before, 1e-9)
            self.console.print(f"{text}  {timedelta(seconds=round(left))} left", highlight=False)

    def evaluated(self, metrics: dict[str, float]) -> None:
        """See `Observer`."""
        self.accuracy = metrics.get("accuracy")

    def __enter__(self) -> None:
        self.progress.start()
        self.bar = self.progress.add_task("", total=None, text="reading the journal")

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _done(self, step: int) -> float:
        """How far the run is: seconds if it ends by the clock, else steps."""
        return self.stepper.clock.seconds if self.by_clock else step

    def _text(self, step: int, seconds: float) -> str:
        parts = [f"step {step}", "loss -" if self.loss is None else f"loss {self.loss:.3f}"]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.3f}")
        if self.stepper.method.moved is not None:
            parts.append(f"{self.stepper.method.moved:.3%} of codes moved")
        parts += [f"{seconds:.2f} s/step", f"{resident_bytes() / 2**20:.0f} MiB"]
        if self.stepper.skipped:
            parts.append(f"{self.stepper.skipped} skipped")
        return "  ".join(parts)
