"""Timing on a shared machine: interleave the variants, set aside samples that waited for a CPU, take medians."""

from __future__ import annotations

import glob
import random
import statistics
import time
from collections.abc import Callable

MOST_WAITING, MANY, MOST_SPREAD = 0.03, 5, 0.1
"""Of an undisturbed sample's time, waiting for a CPU; such samples, for a ratio; of their median, how far they may spread."""
Times = dict[str, dict[str, float]]


def _waited() -> float:
    """Seconds that this process's threads have spent runnable but not running."""
    total = 0
    for path in glob.glob("/proc/self/task/*/schedstat"):
        try:
            with open(path) as file:
                total += int(file.read().split()[1])
        except (OSError, IndexError):
            continue
    return total / 1e9


def medians(variants: dict[str, Callable[[], object]], *, samples: int = 7, rounds: int = 30) -> Times:
    """Time each variant in turn, in random order, until it has `samples` undisturbed samples.

    Returns:
        For each variant: `median`, `best` and `spread` (half the distance of the quartiles) in seconds, `accepted` and `taken`.
        Where a variant had too few undisturbed samples in `rounds` rounds, the least disturbed ones stand in, and `accepted`
        says so.
    """
    for run in variants.values():
        run()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        pending = [name for name in variants if sum(w <= MOST_WAITING for w, _ in taken[name]) < samples]
        if not pending:
            break
        for name in random.sample(pending, len(pending)):
            waited, began = _waited(), time.perf_counter()
            variants[name]()
            seconds = time.perf_counter() - began
            taken[name].append(((_waited() - waited) / seconds, seconds))
    result = {}
    for name, all_samples in taken.items():
        best = sorted(all_samples)[:samples]
        seconds = [s for _, s in best]
        result[name] = {
            "median": statistics.median(seconds),
            "best": min(seconds),
            "spread": (statistics.quantiles(seconds)[2] - statistics.quantiles(seconds)[0]) / 2,
            "accepted": sum(w <= MOST_WAITING for w, _ in best),
            "taken": len(all_samples),
        }
    return result


def ratio(times: Times, over: str, under: str) -> float | None:
    """median of `over` / median of `under`; None where the machine was too noisy for one of them."""
    for name in (over, under):
        row = times[name]
        if row["accepted"] < min(MANY, row["taken"]) or row["spread"] > MOST_SPREAD * row["median"]:
            return None
    return times[over]["median"] / times[under]["median"]


def shown(value: float | None) -> str:
    """A ratio, or why there is none."""
    return "too noisy" if value is None else f"{value:.3f}"
