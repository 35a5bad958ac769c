"""The base of all methods: a torch optimizer with three verbs.

    measurement = method.measure(batch)             runs forwards, returns numbers, writes nothing; for each micro-batch
    estimate = method.estimate([measurement, ...])  a pure function of these
    method.apply(estimate)                          the one way that writes

Several micro-batches, or several workers, simply give more measurements. A journal keeps the estimates; it is written between
the last two lines.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor

from gradless.batch import Batch, Closure, Loss
from gradless.errors import GradlessError
from gradless.methods.backoff import Backoff
from gradless.methods.recipe import check_continuous
from gradless.noise import NAMED, Direction, Distribution
from gradless.spaces import Space
from gradless.tensor import Move

STEPS_AT_ONCE = 64
"""Number of steps that a replay writes to one part of a tensor before it goes on to the next part."""
REMEMBERED = 50
"""Number of recent steps whose estimates set, on average, the size of the next step."""
Group = dict[str, Any]
"""A parameter group: its options by name, as in torch."""


@dataclass(frozen=True)
class Measurement:
    """The numbers that a method measured on a micro-batch.

    Attributes:
        losses: (loss at +eps, loss at -eps) of each query; each a float, or (problems,).
        size: number of examples in the mean of each loss.
    """

    losses: tuple[tuple[Loss, Loss], ...]
    size: int

    @property
    def loss(self) -> Loss:
        """The mean of all losses."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))


@dataclass(frozen=True)
class Estimate:
    """The result of a step's measurements. With the seed and the base it is enough to repeat the step.

    Attributes:
        step: the step's number, from 0.
        losses: (loss at +eps, loss at -eps) of each query; each a float, or (problems,).
        d: for each parameter group, the derivative along each query's direction.
        lr: the learning rate of each parameter group.
    """

    step: int
    losses: tuple[tuple[Loss, Loss], ...]
    d: tuple[tuple[Loss, ...], ...]
    lr: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether all losses are finite; otherwise the step is skipped."""
        return all(_is_finite(loss) for pair in self.losses for loss in pair)

    @property
    def loss(self) -> Loss:
        """The mean of all losses: the loss at x, to second order in eps."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))


def number(loss: Loss) -> Loss:
    """A loss as a float; a tensor of several problems' losses as it is."""
    return loss if isinstance(loss, Tensor) and loss.ndim else float(loss)


def _power(d: Sequence[Loss]) -> float:
    """The mean square of an estimate's coordinates."""
    return float(sum(x * x for x in d)) / len(d) ** 2


def _is_finite(loss: Loss) -> bool:
    return bool(loss.isfinite().all()) if isinstance(loss, Tensor) else math.isfinite(loss)


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A method that queries losses along seeded directions.

    Args:
        spaces: the spaces to search, as a list or as parameter groups with a "spaces" key and options of their own.
        defaults: options of every group, among them `lr`, `eps` and `weight_decay`. If they include `auto` and it is set, lr is
            the root mean square of a step in units of eps. The actual lr of a step, which its estimate holds, follows from it,
            the size of recent estimates and the `backoff` (see `step_size`).
        q: number of queries (directions) a step; each costs two forwards.
        seed: the run's seed; directions follow from (seed, step, query, tensor name, offset).
        distribution: the distribution of the directions' coordinates, or its name.

    Attributes:
        moved: the share of all integer codes that the last update changed; None if no codes are searched.
        backoff: halves the steps that choose their own size if the loss rises.
        pending: the estimate that the next `step` without a closure applies.
    """

    copies = 0
    """Copies of its answer token that an example needs."""
    probe_queries = 3
    """Number of directions of a probe for eps; see `probe.best_factor`."""

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        defaults: Group,
        *,
        q: int,
        seed: int,
        distribution: Distribution | str,
    ) -> None:
        listed = list(spaces)
        groups: list[Group] = cast(list[Group], listed) if isinstance(listed[0], dict) else [{"spaces": listed}]
        self.spaces_of: list[list[Space]] = []
        super().__init__(groups, defaults)
        if isinstance(distribution, str):
            check_continuous(distribution)
            distribution = NAMED[distribution]
        self.q, self.seed, self._distribution = q, seed, distribution
        self.t = 0
        self.moved: float | None = None
        self.pending: Estimate | None = None
        self.backoff = Backoff()
        self._powers: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in self.param_groups]

    @property
    def arguments(self) -> dict[str, Any]:
        """The constructor's arguments beside the groups, as plain values."""
        names = [name for name, known in NAMED.items() if known == self._distribution]
        return {"seed": self.seed, "q": self.q, "distribution": names[0] if names else self._distribution}

    def add_param_group(self, param_group: Group) -> None:
        """Add a group: its "spaces" and its options. The spaces stay out of `param_groups`, which torch copies and saves."""
        options = dict(param_group)
        spaces = list(options.pop("spaces"))
        super().add_param_group({**options, "params": [space.values for space in spaces]})
        self.spaces_of.append(spaces)

    @abstractmethod
    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        """The scalar that multiplies u in the update, from one query's two losses."""

    def distribution(self, group: Group) -> Distribution:
        """The distribution of a group's directions."""
        del group
        return self._distribution

    def direction(self, step: int, query: int, group: Group) -> Direction:
        """The direction u of one query, for a group's tensors."""
        return Direction(self.seed, step, query, self.distribution(group))

    def radius(self, group: Group) -> float:
        """The factor of u in a query."""
        eps: float = group["eps"]
        return eps

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """The moves by which a step updates each tensor of a group, in order."""
        decay = 1 - lr * group["weight_decay"]
        for query, derivative in enumerate(d):
            yield Move(self.direction(step, query, group), -lr * derivative / len(d), decay)
            decay = 1.0

    @contextmanager
    def perturbed(self, query: int, *signs: int, many_forwards: bool = False) -> Iterator[None]:
        """Inside the context forwards read x + sign * radius * u, where u is the direction of one of this step's queries.

        Args:
            query: the query's number.
            signs: +1 or -1; if several, each is for an equal share of the batch.
            many_forwards: whether many forwards follow, as those that generate an answer; for one sign. See
                `Space.materialized`.
        """
        with ExitStack() as views:
            for group, spaces in zip(self.param_groups, self.spaces_of, strict=True):
                u, radius = self.direction(self.t, query, group), self.radius(group)
                moves = [Move(u, sign * radius) for sign in signs]
                for space in spaces:
                    views.enter_context(space.materialized(*moves) if many_forwards else space.viewed(*moves))
            yield

    @property
    def spaces(self) -> list[Space]:
        """Every space searched, group by group."""
        return [space for spaces in self.spaces_of for space in spaces]

    @torch.no_grad()
    def measure(self, batch: Batch) -> Measurement:
        """Query a micro-batch along each of this step's directions; nothing is written."""
        return Measurement(tuple(self.query(batch, number) for number in range(self.q)), batch.size)

    def query(self, batch: Batch, query: int) -> tuple[Loss, Loss]:
        """(loss at +eps, loss at -eps) along one direction. Both come from one forward if batch and spaces allow it; then
        weights are unpacked, and noise is drawn, once for both."""
        if batch.paired and all(space.supports_paired_views for space in self.spaces):
            with self.perturbed(query, +1, -1):
                plus, minus = batch.paired_loss()
        else:
            with self.perturbed(query, +1, many_forwards=batch.generates):
                plus = batch.loss()
            with self.perturbed(query, -1, many_forwards=batch.generates):
                minus = batch.loss()
        return number(plus), number(minus)

    def estimate(self, measurements: Sequence[Measurement]) -> Estimate:
        """The estimate that follows from the step's measurements."""
        return self.estimate_of(mean_losses(measurements))

    def estimate_of(self, losses: Sequence[tuple[Loss, Loss]]) -> Estimate:
        """The estimate that follows from a step's losses, one (plus, minus) pair a query."""
        d = tuple(tuple(self.derivative(*pair, group) for pair in losses) for group in self.param_groups)
        lr = tuple(self.step_size(i, of_group) for i, of_group in enumerate(d))
        return Estimate(self.t, tuple(losses), d, lr)

    def step_size(self, group: int, d: Sequence[Loss]) -> float:
        """The lr of a group's next step, whose estimate has the derivatives d: the group's own or, with `auto`, the solution of

            rms(lr ghat) = backoff * lr_group * eps,    rms(ghat)^2 = mean over the last steps of sum_i d_i^2 / q^2

        ghat = 1/q sum_i d_i u_i is the estimate. Its coordinates have this mean square if those of u have a mean square of 1.
        """
        options = self.param_groups[group]
        if not options.get("auto"):
            return float(options["lr"])
        powers = [*self._powers[group], _power(d)][-REMEMBERED:]
        rms = math.sqrt(sum(powers) / len(powers))
        return float(self.backoff.factor * options["lr"] * options["eps"] / rms) if 0 < rms < math.inf else 0.0

    @torch.no_grad()
    def apply(self, *estimates: Estimate) -> None:
        """Write the updates of steps: x <- (1 - lr * weight_decay) * x - lr/q * sum_i d_i * u_i, or as `moves` has it.

        An estimate whose losses are not all finite changes only the step's number.
        """
        moves: list[list[Move]] = [[] for _ in self.param_groups]
        for estimate in (estimate for estimate in estimates if estimate.finite):
            parts = zip(self.param_groups, self._powers, estimate.d, estimate.lr, moves, strict=True)
            for group, powers, d, lr, of_group in parts:
                of_group += self.moves(estimate.step, d, lr, group)
                if group.get("auto"):
                    powers.append(_power(d))
            if any(group.get("auto") for group in self.param_groups):
                self.backoff.observe(float(estimate.loss))
        changed = sum(space.move(of_group) for of_group, spaces in zip(moves, self.spaces_of, strict=True) for space in spaces)
        codes = sum(space.codes for space in self.spaces)
        self.moved = changed / codes if codes else None
        self.t = estimates[-1].step + 1

    def replay(self, estimates: Iterable[Estimate]) -> Iterator[list[Estimate]]:
        """Write the updates of recorded steps, `STEPS_AT_ONCE` in a pass; yields the estimates of each pass after it."""
        remaining = iter(estimates)
        while some := list(islice(remaining, STEPS_AT_ONCE)):
            self.apply(*some)
            self.moved = None
            yield some

    def step(  # type: ignore[override]
        self, closure: Batch | Callable[[], Any] | None = None, pair: Callable[[], Any] | None = None
    ) -> Estimate:
        """One step: measure, estimate, apply. Without a closure it applies the `pending` estimate.

        Args:
            closure: a batch, or a function that runs the model (in eval mode) and returns the loss; it is called twice a query
                and must see the same data each time. See `Closure`.
            pair: makes both calls at once; see `Closure`.

        Raises:
            GradlessError: the method needs more than a closure gives.
            RuntimeError: there is neither a closure nor a pending estimate.
        """
        if closure is not None:
            batch = closure if isinstance(closure, Batch) else Closure(closure, pair)
            estimate = self.estimate([self.measure(batch)])
        elif self.pending is not None:
            estimate = self.pending
        else:
            raise RuntimeError("step() needs a closure that returns the loss, or an estimate in `pending`")
        self.pending = None
        self.apply(estimate)
        return estimate


def mean_losses(measurements: Sequence[Measurement]) -> list[tuple[Loss, Loss]]:
    """The two losses of each query, as means over the examples of all micro-batches."""
    sums: list[tuple[Loss, Loss]] = [(0.0, 0.0)] * len(measurements[0].losses)
    for each in measurements:
        of_each = zip(sums, each.losses, strict=True)
        sums = [(p + each.size * plus, m + each.size * minus) for (p, m), (plus, minus) in of_each]
    examples = sum(each.size for each in measurements)
    return [(plus / examples, minus / examples) for plus, minus in sums]


class GridOptimizer(ZerothOrderOptimizer):
    """A method over integer codes. x, `eps` and `lr` are in grid steps, and directions are drawn in whole steps."""

    @abstractmethod
    def query_noise(self, group: Group) -> Distribution:
        """The noise that a query adds to codes. Raises ValueError if no code would move, or one would move too far."""

    def distribution(self, group: Group) -> Distribution:
        """See `query_noise`."""
        try:
            return self.query_noise(group)
        except ValueError as error:
            raise GradlessError(f"eps {group['eps']} in grid steps: {error}.") from error

    def direction(self, step: int, query: int, group: Group) -> Direction:
        """See `ZerothOrderOptimizer.direction`; `span` neighbouring codes share a coordinate."""
        return replace(super().direction(step, query, group), span=group["span"])

    def radius(self, group: Group) -> float:
        """1: u is in grid steps already."""
        del group
        return 1.0
