"""A limit on what a chat template may do: time and memory, looked at between the lines of its compiled program.

transformers renders templates in a sandbox that bounds `range`, but not loops within loops, nor texts that double. A template
becomes a Python function, whose lines a trace function sees; it ends the rendering where it has gone on for too long.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from gradless.errors import GradlessError

SECONDS, KILOBYTES = 2.0, 512 << 10
"""Of processor time, and of new memory, for one rendering."""
OF_TEMPLATES = "<template>"
"""What jinja calls the file of a template's program."""


@contextmanager
def bounded_rendering() -> Iterator[None]:
    """Bound the templates that are rendered inside.

    Raises:
        GradlessError: one takes too long or too much memory.
    """
    until = time.thread_time() + SECONDS
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss + KILOBYTES

    def lines(_frame: FrameType, _event: str, _argument: Any) -> Any:
        if time.thread_time() > until or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > most:
            raise GradlessError(
                f"the chat template takes more than {SECONDS:g} s or {KILOBYTES >> 10} MB for one conversation; use another."
            )
        return lines

    def calls(frame: FrameType, _event: str, _argument: Any) -> Any:
        return lines if frame.f_code.co_filename == OF_TEMPLATES else None

    before = sys.gettrace()
    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(before)
