"""Timing on a shared machine: interleave the variants, set aside samples that waited for a CPU, compare within a round."""

from __future__ import annotations

import glob
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

MOST_WAITING, MANY, MOST_SPREAD = 0.03, 5, 0.1
"""Of an undisturbed sample's time, waiting for a CPU; such samples, for a ratio; of their median, how far they may spread."""
Times = dict[str, dict[str, Any]]


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
    """Run the variants in rounds, each in a random order, until every one has `samples` undisturbed samples.

    Returns:
        For each variant: `median`, `best` and `spread` (half the distance of the quartiles) in seconds, `accepted`, and
        `taken`, its (share of time spent waiting, seconds) in each round. Where a variant had too few undisturbed samples in
        `rounds` rounds, the least disturbed ones stand in, and `accepted` says so.
    """
    for run in variants.values():
        run()
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name in random.sample(list(variants), len(variants)):
            waited, began = _waited(), time.perf_counter()
            variants[name]()
            seconds = time.perf_counter() - began
            taken[name].append(((_waited() - waited) / seconds, seconds))
        if all(sum(_undisturbed(sample) for sample in taken[name]) >= samples for name in variants):
            break
    result = {}
    for name, all_samples in taken.items():
        best = sorted(all_samples)[: max(samples, sum(map(_undisturbed, all_samples)))]
        seconds = [s for _, s in best]
        accepted = sum(map(_undisturbed, best))
        result[name] = {**_middle(seconds), "best": min(seconds), "accepted": accepted, "taken": all_samples}
    return result


def _undisturbed(sample: tuple[float, float]) -> bool:
    return sample[0] <= MOST_WAITING


def _middle(values: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(values)
    return {"median": statistics.median(values), "spread": (quartiles[2] - quartiles[0]) / 2}


def ratio(times: Times, over: str, under: str) -> float | None:
    """The median over rounds of `over`'s time / `under`'s, which a machine that slows down for a minute moves together.

    None where too few rounds were undisturbed, or their quotients too far apart.
    """
    rounds = [pair for pair in zip(times[over]["taken"], times[under]["taken"], strict=True) if all(map(_undisturbed, pair))]
    if len(rounds) < MANY:
        return None
    quotients = _middle([mine[1] / its[1] for mine, its in rounds])
    return None if quotients["spread"] > MOST_SPREAD * quotients["median"] else quotients["median"]


def shown(value: float | None) -> str:
    """A ratio, or why there is none."""
    return "too noisy" if value is None else f"{value:.3f}"
