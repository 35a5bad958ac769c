"""How much memory this process holds."""

from __future__ import annotations

import psutil


def resident_bytes() -> int:
    """Resident memory of this process, memory-mapped file pages included."""
    return int(psutil.Process().memory_info().rss)
