"""Counter-based random directions: value = f(seed, step, query, tensor, offset).

A direction is a handful of numbers, never a stored tensor. Any slice of it can be drawn alone, in any order and on any
device, with the same bits: everything is 32-bit integer arithmetic and one committed table, without libm and without a global
generator.

The random words come from Philox4x32-10 (Salmon et al., 2011) with

    key     = blake2b-64 of the tensor's name, keyed by the run's seed
    counter = (block low, block high, step, 256 * query + stream)

Their layout lets sixteen blocks fill sixteen SIMD lanes without a shuffle: word w lies in page w // 64, as word
(w % 64) // 16 of block w % 16. A page of 64 words gives either 128 halves of 16 bits (all low halves, then all high halves) or
2048 bits (bit e % 32 of word e // 32).

This module defines the values. `kernels/cpu` draws the same bits inside its loops.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from enum import IntEnum
from fractions import Fraction
from functools import cache
from importlib.resources import files
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PAGE_BLOCKS = 16
PAGE_WORDS = 64
"""Number of words in a page."""


class Stream(IntEnum):
    """Independent sequences under one (seed, step, query, tensor)."""

    DIRECTION = 0
    ROUNDING = 1  # of an update, to bf16 or to a grid
    ORDER = 2
    FIRST = 3  # the first of QuZO's two roundings of one u
    SECOND = 4  # the second
    DITHER = 5  # the first residuals of codes
    INITIAL = 6  # the first values of an adapter's factor A


@dataclass(frozen=True)
class Words:
    """One infinite sequence of random 32-bit words: a Philox key and the upper half of its counter."""

    key: int
    step: int
    query_and_stream: int

    def __call__(self, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Words [start, start + count): int64 in [0, 2**32), shape (count,)."""
        first, last = start // PAGE_WORDS, -(-(start + count) // PAGE_WORDS)
        block = torch.arange(first * _PAGE_BLOCKS, last * _PAGE_BLOCKS, dtype=torch.int64, device=device)
        lanes = philox(
            (
                block & _MASK,
                block >> 32,
                torch.full_like(block, self.step),
                torch.full_like(block, self.query_and_stream),
            ),
            (self.key & _MASK, self.key >> 32),
        )
        pages = torch.stack([lane.view(-1, _PAGE_BLOCKS) for lane in lanes], dim=1)
        return pages.reshape(-1)[start - first * PAGE_WORDS :][:count]


class Distribution(ABC):
    """The distribution of a direction's coordinates."""

    @property
    def share(self) -> float:
        """P(u_j != 0): the share of coordinates that a direction moves."""
        return 1.0

    @abstractmethod
    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        """Coordinates [start, start + count) of tensor `name`: fp32, shape (count,)."""


@dataclass(frozen=True)
class Gaussian(Distribution):
    """N(0, 1) on 65536 equally likely values (|z| <= 4.33, variance 0.99998, kurtosis 2.999)."""

    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        half = halves(direction.words(name), start, count, device)
        magnitude = _normal_values(device)[half & 0x7FFF]
        return torch.where(half >= 0x8000, -magnitude, magnitude)


@dataclass(frozen=True)
class Rademacher(Distribution):
    """-1 or +1 with equal probability."""

    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        return (2 * bits(direction.words(name), start, count, device) - 1).float()


@dataclass(frozen=True)
class Integers(Distribution):
    """Integers in {-m, ..., m}, P(k) = P(-k): noise in whole grid steps.

    Attributes:
        tail: P(k <= -m), ..., P(k <= -1) in units of 2**-16: m integers that never decrease. A random 16-bit integer is
            compared with them and with their mirror images.

    Raises:
        ValueError: more than 127 steps, or noise too sparse for any coordinate to move.
    """

    tail: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.tail) > 127:
            raise ValueError(f"noise of {len(self.tail)} grid steps: at most 127 fit; take a smaller perturbation")
        if self.tail[0] == 0:
            raise ValueError("noise so small that no code would ever move (fewer than one in 32768); take a larger one")

    @property
    def m(self) -> int:
        return len(self.tail)

    @property
    def share(self) -> float:
        return 2 * self.tail[-1] / 2**16

    @property
    def edges(self) -> tuple[int, ...]:
        """The 2 m thresholds at which the drawn integer grows by one."""
        return (*self.tail, *(2**16 - edge for edge in reversed(self.tail)))

    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        edges = torch.tensor(self.edges, dtype=torch.int64, device=device)
        return (torch.bucketize(halves(direction.words(name), start, count, device), edges, right=True) - self.m).float()


@cache
def uniform_grid(m: int) -> Integers:
    """Uniform on {-m, ..., m} (ZOQO, section 3)."""
    return Integers(tuple(round(2**16 * k / (2 * m + 1)) for k in range(1, m + 1)))


@cache
def discretized_gaussian(m: int, spread: float) -> Integers:
    """P(k) proportional to phi(k / spread), |k| <= m (ZOQO's other noise; spread is mu / s, well below 1 for sparse moves).

    Computed with 40 decimal digits, so that every machine draws the same numbers.
    """
    with localcontext() as context:
        context.prec = 40
        weights = [(-((Decimal(k) / Decimal(spread)) ** 2) / 2).exp() for k in range(-m, m + 1)]
        total = sum(weights)
        return _from_probabilities([weight / total for weight in weights[:m]])


@cache
def rounded_gaussian(eps: float, most: int | None = None) -> Integers:
    """SR(eps * u), u ~ N(0, 1): the distribution of QuZO's u_1 in grid steps, over u and the rounding together.

    Args:
        eps: perturbation, in grid steps.
        most: largest number of steps, to which larger ones are cut; None for no limit.
    """
    with localcontext() as context:
        context.prec = 40
        z = normal_table().astype(object) * Fraction(eps) / 2**13
        whole = z // 1
        m = int(whole[-1]) + 1
        up = [sum(z[whole == k - 1] - (k - 1)) + sum(k + 1 - z[whole == k]) for k in range(m, 0, -1)]
        every = [Decimal(p.numerator) / p.denominator / 65536 for p in map(Fraction, up)]
        cut = 0 if most is None else max(0, m - most)
        return _from_probabilities([sum(every[: cut + 1], Decimal(0)), *every[cut + 1 :]])


def _from_probabilities(lower: Sequence[Decimal]) -> Integers:
    """The distribution with these P(-m), ..., P(-1); steps too rare for 16 bits are left out."""
    tail = [round(edge * 2**16) for edge in accumulate(lower)]
    return Integers(tuple(filter(None, tail)) or (0,))


@dataclass(frozen=True)
class RoundedGaussian(Distribution):
    """SR(eps * u), u ~ N(0, 1), whose rounding has its own stream: QuZO's u_1 and u_2 are one u, rounded twice.

    Attributes:
        eps: perturbation, in grid steps.
        stream: the stream of the rounding.
    """

    eps: float
    stream: Stream = Stream.FIRST

    @property
    def share(self) -> float:
        return float(np.minimum(1, self.eps * normal_table() * 2.0**-13).mean())

    def draw(self, direction: Direction, name: str, start: int, count: int, device: torch.device | str) -> Tensor:
        u = Gaussian().draw(direction, name, start, count, device)
        return stochastic_round(u * float(np.float32(self.eps)), direction.words(name, self.stream), start)


@dataclass(frozen=True)
class Direction:
    """The numbers that identify a random direction u. Its values are drawn when they are needed.

    Attributes:
        seed: the run's seed, 0 <= seed < 2**64.
        step: the step of the run, 0 <= step < 2**32.
        query: the query within the step, 0 <= query < 2**24.
        distribution: the distribution of each coordinate.
        span: number of consecutive elements of a tensor that share one coordinate.
    """

    seed: int
    step: int
    query: int = 0
    distribution: Distribution = Gaussian()
    span: int = 1

    def values(self, name: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """u at elements [start, start + count) of tensor `name`: fp32, shape (count,)."""
        if self.span == 1:
            return self.distribution.draw(self, name, start, count, device)
        first, last = start // self.span, -(-(start + count) // self.span)
        each = self.distribution.draw(self, name, first, last - first, device)
        return each.repeat_interleave(self.span)[start - first * self.span :][:count]

    def words(self, name: str, stream: Stream = Stream.DIRECTION) -> Words:
        """The random words behind this direction for tensor `name`."""
        return Words(key(self.seed, name), self.step, (self.query << 8) | stream)


@dataclass(frozen=True)
class Signs:
    """sign(sum_i weight_i * u_i), coordinate by coordinate: the direction of ZOQO's update.

    Attributes:
        terms: (direction, weight) of each query; all directions have the same span. A weight is a float, or a tensor
            (problems,) if a step has several problems that share no element.
    """

    terms: tuple[tuple[Direction, float | Tensor], ...]

    def values(self, name: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
        """The signs at elements [start, start + count) of tensor `name`: fp32 in {-1, 0, 1}, shape (count,)."""
        return self.of(lambda direction: direction.values(name, start, count, device))

    def of(self, drawn: Callable[[Direction], Tensor]) -> Tensor:
        """The signs, by a function that draws a direction; (problems, n) if weights are (problems,)."""
        total = torch.zeros(())
        for direction, weight in self.terms:
            by = weight.unsqueeze(1) if isinstance(weight, Tensor) else float(np.float32(weight))
            total = total + drawn(direction) * by
        return total.sign()

    def words(self, name: str, stream: Stream) -> Words:
        """The random words of the first term's direction."""
        return self.terms[0][0].words(name, stream)


@cache
def key(seed: int, name: str) -> int:
    """The 64-bit Philox key of one tensor in one run."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=seed.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words, elementwise."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # A product that overflows int64 wraps around, so its low 64 bits are those of the unsigned product.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def halves(words: Words, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random 16-bit integers [start, start + count): int64 in [0, 65536), shape (count,)."""
    first, last = start // 128, -(-(start + count) // 128)
    page = words(first * PAGE_WORDS, (last - first) * PAGE_WORDS, device).view(-1, 1, PAGE_WORDS)
    both = torch.cat([page & 0xFFFF, page >> 16], dim=1)
    return both.reshape(-1)[start - first * 128 :][:count]


def bits(words: Words, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Random bits [start, start + count): int64 in {0, 1}, shape (count,)."""
    first, last = start // 32, -(-(start + count) // 32)
    word = words(first, last - first, device).view(-1, 1)
    each = (word >> torch.arange(32, device=device)) & 1
    return each.reshape(-1)[start - first * 32 :][:count]


@cache
def normal_table() -> np.ndarray[tuple[int], np.dtype[np.uint16]]:
    """32768 upper-half normal quantiles at the midpoints of equal probabilities, in units of 2**-13."""
    with files("gradless").joinpath("normal.npy").open("rb") as file:
        table: np.ndarray[tuple[int], np.dtype[np.uint16]] = np.load(file, allow_pickle=False)
    return table


@cache
def _normal_values(device: torch.device | str) -> Tensor:
    return torch.from_numpy(normal_table().astype(np.float32) * 2.0**-13).to(device)


def uniform(words: Words, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Uniform multiples of 2**-24 in [0, 1): fp32, shape (count,)."""
    return (words(start, count, device) >> 8).float() * 2.0**-24


def stochastic_round(x: Tensor, words: Words, start: int = 0) -> Tensor:
    """SR(x) = floor(x + r), r uniform in [0, 1): an integer with E[SR(x)] = x (QuZO, section 3).

    Args:
        x: fp32, any shape; element i of its flattened order takes draw start + i.
        words: use `Stream.ROUNDING`, so that the draws are independent of the direction's own.
    """
    r = uniform(words, start, x.numel(), x.device).view_as(x)
    whole = torch.floor(x)
    return whole + (r < x - whole).to(x.dtype)


NAMED: dict[str, Distribution] = {"gaussian": Gaussian(), "rademacher": Rademacher()}
"""Distributions of unit variance for continuous values, by name."""


def permutation(seed: int, epoch: int, n: int) -> Tensor:
    """The order of n examples in one epoch: int64, shape (n,), each of 0..n-1 once."""
    words = Direction(seed, epoch).words("", Stream.ORDER)
    high, low = words(0, 2 * n).view(2, n)
    return torch.argsort((high << 31) + (low >> 1), stable=True)
