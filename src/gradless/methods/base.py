"""What every zeroth-order method here is: a torch optimizer with three verbs.

    measurement = method.measure(batch)             runs forwards, returns numbers, writes nothing; once a micro-batch
    estimate = method.estimate([measurement, ...])  a pure function of these
    method.apply(estimate)                          the one way that writes

Measurements of several micro-batches, or of several workers, are simply more of them. A journal keeps estimates: it stands
between the last two lines.
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
from gradless.noise import NAMED, Direction, Distribution
from gradless.spaces import Space
from gradless.tensor import Move

STEPS_AT_ONCE = 64
"""In a replay: a tensor's part that is at hand goes through so many steps before the next."""
REMEMBERED = 50
"""Steps whose estimates tell, on average, how long the next one is."""
Group = dict[str, Any]
"""A parameter group: its options by name, as torch has them."""


@dataclass(frozen=True)
class Measurement:
    """What a micro-batch showed.

    Attributes:
        losses: (loss at +eps, loss at -eps) of each query; each a float, or (problems,).
        size: the examples that each loss is the mean of.
    """

    losses: tuple[tuple[Loss, Loss], ...]
    size: int

    @property
    def loss(self) -> Loss:
        """The mean of all the losses seen."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))


@dataclass(frozen=True)
class Estimate:
    """Everything that a step learned: with the seed and the base point, all that is needed to repeat it.

    Attributes:
        step: the step's number, from 0.
        losses: (loss at +eps, loss at -eps) of each query; each a float, or (problems,).
        d: for each parameter group, the derivative that multiplies each query's direction.
        lr: the learning rate of each parameter group.
    """

    step: int
    losses: tuple[tuple[Loss, Loss], ...]
    d: tuple[tuple[Loss, ...], ...]
    lr: tuple[float, ...]

    @property
    def finite(self) -> bool:
        """Whether the step can be applied; a NaN or infinite loss makes it a skipped one."""
        return all(_is_finite(loss) for pair in self.losses for loss in pair)

    @property
    def loss(self) -> Loss:
        """The mean of all the losses seen: the loss at x, to second order in eps."""
        return sum(map(sum, self.losses)) / (2 * len(self.losses))


def number(loss: Loss) -> Loss:
    """A loss as a float, or as it is if it is that of several problems."""
    return loss if isinstance(loss, Tensor) and loss.ndim else float(loss)


def _power(d: Sequence[Loss]) -> float:
    """The mean square of an estimate's coordinates."""
    return float(sum(x * x for x in d)) / len(d) ** 2


def _is_finite(loss: Loss) -> bool:
    return bool(loss.isfinite().all()) if isinstance(loss, Tensor) else math.isfinite(loss)


class ZerothOrderOptimizer(torch.optim.Optimizer):
    """A method that queries losses along seeded directions.

    Args:
        spaces: what to search, as a list of spaces or as parameter groups with a "spaces" key and their own options.
        defaults: options of every group; they include `lr`, `eps` and `weight_decay`. Where they include `auto` and it is set,
            lr is the root mean square of a step in units of eps; the step's own lr, which its estimate holds, follows from it,
            the size of the last estimates and the `backoff` (see `step_size`).
        q: queries (directions) a step; each costs two forwards.
        seed: of the run; directions follow from (seed, step, query, tensor name, offset).
        distribution: of the directions' coordinates, or its name.

    Attributes:
        moved: the share of all integer codes that the last update changed; None if none are searched.
        backoff: halves the steps that choose their own size when the loss rises.
        pending: an estimate that the next `step` without a closure applies.
    """

    probe_queries = 3
    """Directions of a probe for eps, see `probe.best_factor`."""

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
            if distribution not in NAMED:
                raise GradlessError(f"directions over continuous values are {' or '.join(NAMED)}, not {distribution}.")
            distribution = NAMED[distribution]
        self.q, self.seed, self._distribution = q, seed, distribution
        self.t = 0
        self.moved: float | None = None
        self.pending: Estimate | None = None
        self.backoff = Backoff()
        self._powers: list[deque[float]] = [deque(maxlen=REMEMBERED) for _ in self.param_groups]

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
        """What the directions of a group are drawn from."""
        del group
        return self._distribution

    def direction(self, step: int, query: int, group: Group) -> Direction:
        """The direction u of one query, for a group's tensors."""
        return Direction(self.seed, step, query, self.distribution(group))

    def radius(self, group: Group) -> float:
        """What multiplies u in a query."""
        eps: float = group["eps"]
        return eps

    def moves(self, step: int, d: Sequence[Loss], lr: float, group: Group) -> Iterator[Move]:
        """The moves that a step's update makes of each tensor of a group, one after the other."""
        decay = 1 - lr * group["weight_decay"]
        for query, derivative in enumerate(d):
            yield Move(self.direction(step, query, group), -lr * derivative / len(d), decay)
            decay = 1.0

    @contextmanager
    def perturbed(self, query: int, *signs: int, many_forwards: bool = False) -> Iterator[None]:
        """Forwards inside read x + sign * radius * u; u is the direction of a query of this step.

        Args:
            query: its number.
            signs: +1 or -1; several: each for its equal share of the batch.
            many_forwards: whether many follow, such as those that generate an answer; for one sign. See `Space.materialized`.
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
        """(loss at +eps, loss at -eps) along one direction: from one forward if batch and spaces allow it, so that weights are
        unpacked, and noise is drawn, once for both."""
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
        """The lr of a group's next step, whose estimate has these derivatives: the group's own or, with `auto`, that with which

            rms(lr ghat) = backoff * lr_group * eps,    rms(ghat)^2 = mean over the last steps of sum_i d_i^2 / q^2

        ghat = 1/q sum_i d_i u_i being the estimate, whose coordinates have that mean square where u's have one of 1.
        """
        options = self.param_groups[group]
        if not options.get("auto"):
            return float(options["lr"])
        powers = [*self._powers[group], _power(d)][-REMEMBERED:]
        rms = math.sqrt(sum(powers) / len(powers))
        return float(self.backoff.factor * options["lr"] * options["eps"] / rms) if 0 < rms < math.inf else 0.0

    @torch.no_grad()
    def apply(self, *estimates: Estimate) -> None:
        """Write the updates of steps: x <- (1 - lr * weight_decay) * x - lr/q * sum_i d_i * u_i, or what `moves` says.

        An estimate with a loss that is not finite changes nothing but the step's number.
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
        """Write the updates of recorded steps, some of them in one pass; yields those that have just been written."""
        remaining = iter(estimates)
        while some := list(islice(remaining, STEPS_AT_ONCE)):
            self.apply(*some)
            self.moved = None
            yield some

    def step(  # type: ignore[override]
        self, closure: Batch | Callable[[], Any] | None = None, pair: Callable[[], Any] | None = None
    ) -> Estimate:
        """One step: measure, estimate, apply; without a closure, `apply` of the `pending` estimate.

        Args:
            closure: a batch, or a function that runs the model (in eval mode) and returns the loss; it is called twice a query
                and must see the same data each time. See `Closure`.
            pair: does both calls at once; see `Closure`.

        Raises:
            GradlessError: the method asks for more than a closure can tell.
            RuntimeError: neither a closure nor a pending estimate is there.
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
    """Both losses of each query, as means over the examples of all micro-batches."""
    sums: list[tuple[Loss, Loss]] = [(0.0, 0.0)] * len(measurements[0].losses)
    for each in measurements:
        of_each = zip(sums, each.losses, strict=True)
        sums = [(p + each.size * plus, m + each.size * minus) for (p, m), (plus, minus) in of_each]
    examples = sum(each.size for each in measurements)
    return [(plus / examples, minus / examples) for plus, minus in sums]


class GridOptimizer(ZerothOrderOptimizer):
    """A method over integer codes: x counts grid steps, `eps` and `lr` do too, and a direction is drawn in whole ones."""

    @abstractmethod
    def query_noise(self, group: Group) -> Distribution:
        """What a query moves codes by; raises ValueError where no code would move, or too far."""

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
        """u is in grid steps already."""
        del group
        return 1.0
