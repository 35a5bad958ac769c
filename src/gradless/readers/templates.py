"""Limits on the time and memory of a chat template, checked between the lines of its compiled program.

transformers renders templates in a sandbox that bounds `range`, but neither nested loops nor texts that double. A template is
compiled to a Python function. A trace function sees each of its lines, and ends a rendering that exceeds a limit.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from gradless.errors import GradlessError

if TYPE_CHECKING:
    from _typeshed import TraceFunction

SECONDS, KILOBYTES = 2.0, 512 << 10
"""Limits of one rendering: processor time and new memory."""
OF_TEMPLATES = "<template>"
"""File name that jinja gives to the program of a template."""


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """Limit the templates that are rendered inside.

    Raises:
        GradlessError: a template takes too long or too much memory.
    """
    until = time.thread_time() + SECONDS
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + KILOBYTES

    def lines(_frame: FrameType, _event: str, _argument: object) -> TraceFunction | None:
        if time.thread_time() > until or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
            raise GradlessError(
                f"the chat template takes more than {SECONDS:g} s or {KILOBYTES >> 10} MB for one conversation; use another."
            )
        return lines

    def calls(frame: FrameType, _event: str, _argument: object) -> TraceFunction | None:
        return lines if frame.f_code.co_filename == OF_TEMPLATES else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(before)
