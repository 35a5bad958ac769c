"""The progress line of a run, and how the run is stopped."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from gradless.memory import resident_bytes
from gradless.training.options import RunOptions
from gradless.training.trainer import ZOTrainer

NO_LIMIT = 10**9
"""Number of steps of a run that a time limit ends."""


@contextmanager
def stopping_on_interrupt(line: ProgressLine) -> Iterator[None]:
    """The first Ctrl-C inside stops the run after its current step, a second one at once."""

    def stop(_number: int, _frame: Any) -> None:
        line.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class ProgressLine(TrainerCallback):  # type: ignore[misc]
    """A live line: step, loss, accuracy, step time, resident memory, time left. It also ends a run whose time is up."""

    SMOOTHING = 0.95
    EVERY_SECONDS = 10.0

    def __init__(self, trainer: ZOTrainer, options: RunOptions, before: dict[str, float] | None, *, quiet: bool) -> None:
        self.trainer, self.options, self.before, self.quiet = trainer, options, before, quiet
        self.interrupted = False
        self.by_clock = trainer.args.max_steps >= NO_LIMIT
        self.total = 60 * (options.max_minutes or 0) if self.by_clock else trainer.args.max_steps
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
        self.began = self.printed = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args, control
        self.began = self.printed = time.perf_counter()
        if self.before is not None and self.trainer.journal is not None:
            self.trainer.journal.evaluated(0, self.before, 0.0)
        self.done_before = self.trainer.seconds if self.by_clock else state.global_step
        self.progress.update(self.bar, total=self.total, completed=int(self.done_before), text="")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        del args
        loss = self.trainer.last_loss
        if math.isfinite(loss):
            self.loss = loss if self.loss is None else self.SMOOTHING * self.loss + (1 - self.SMOOTHING) * loss
        self.steps_here += 1
        now = time.perf_counter()
        text = self._text(state.global_step, (now - self.began) / self.steps_here)
        done = self.trainer.seconds if self.by_clock else state.global_step
        self.progress.update(self.bar, completed=done, text=text)
        if not self.quiet and not self.console.is_terminal and now - self.printed > self.EVERY_SECONDS:
            self.printed = now
            left = (self.total - done) * (now - self.began) / max(done - self.done_before, 1e-9)
            self.console.print(f"{text}  {timedelta(seconds=round(left))} left", highlight=False)
        if self.interrupted or self.trainer.out_of_time:
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_evaluate = False  # the saved values are measured at the end

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        del args, state, control
        self.accuracy = metrics.get("eval_accuracy")

    def __enter__(self) -> None:
        self.progress.start()
        self.bar = self.progress.add_task("", total=None, text="a first look at model and data")

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def _text(self, step: int, seconds: float) -> str:
        parts = [f"step {step}", "loss -" if self.loss is None else f"loss {self.loss:.3f}"]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.3f}")
        if self.trainer.zeroth_order.moved is not None:
            parts.append(f"{self.trainer.zeroth_order.moved:.3%} of codes moved")
        parts += [f"{seconds:.2f} s/step", f"{resident_bytes() / 2**20:.0f} MiB"]
        if self.trainer.skipped:
            parts.append(f"{self.trainer.skipped} skipped")
        return "  ".join(parts)
