"""The common part of the recipes of methods over integer codes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeVar

from gradless.errors import GradlessError
from gradless.flags import above_zero, option
from gradless.methods.recipe import (
    ROWS,
    AbsoluteOptions,
    DecayOptions,
    Defaults,
    Recipe,
    SearchOptions,
    SharedDirections,
)
from gradless.targets import Kind

if TYPE_CHECKING:
    from gradless.formats.checkpoint import Checkpoint
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group

DEFAULT_GRID = 15.0
"""Number of steps of the grid that the defaults are for. They are scaled to the length of other grids."""
FEW_LEVELS = 16
"""Length below which a grid counts as one of few levels. Neighbouring codes move together on it, which changes a layer's
outputs more finely than single codes do."""
DEFAULT_SPAN = 32
"""Number of neighbouring codes that move together on a grid of few levels."""
DEFAULT_STRIDE = 16
"""Distance between tuned rows: one row in 16 is tuned by default."""


@dataclass
class CodeOptions(SearchOptions, SharedDirections, DecayOptions, AbsoluteOptions):
    """The options of methods over integer codes."""

    share: float | None = option(
        None, "quzo, zoqo: share of the tuned codes that a query moves, instead of --eps.", within=above_zero(0.5)
    )
    span: int | None = option(
        None,
        "quzo, zoqo: neighbouring codes that share one coordinate of a direction (default: 32 on evenly spaced grids of up to "
        "16 levels, else 1).",
        within=ROWS,
    )
    stride: int | None = option(None, "quzo, zoqo: tune every n-th row of a weight only (default: 16).", within=ROWS)
    stateless: bool = option(
        False, "quzo, zoqo: round every update at once, as in the papers, and keep no residual (a byte a code)."
    )
    clamp: bool = option(False, "quzo, zoqo: stop at the grid's ends in queries too.")


CodesT = TypeVar("CodesT", bound=CodeOptions)


class CodeRecipe(Recipe[CodesT]):
    """The recipe of a method over integer codes.

    Attributes:
        plain, few_levels, adapters: the defaults for grids of many levels, for grids of few, and for adapters.
        power: the exponent of a grid's length in lr: 2 if the gradient too is taken per grid step.
    """

    tunes_codes = True
    plain: ClassVar[Defaults]
    few_levels: ClassVar[Defaults]
    adapters: ClassVar[Defaults]
    power: ClassVar[int]

    def eps_of_share(self, share: float) -> float:
        """The eps with which a query moves this share of all codes."""
        raise NotImplementedError

    def scaled_eps(self, eps: float, unit: float) -> float:
        """An eps for the defaults' grid, on a grid whose steps are 1 / unit as long."""
        return eps * unit

    def check(self, options: CodesT) -> None:
        super().check(options)
        if options.share is not None and (options.eps is not None or options.distribution == "uniform"):
            raise GradlessError("share replaces eps, for gaussian noise; leave --share out, or --eps and --distribution.")
        if options.absolute and (options.eps is None or options.lr is None):
            raise GradlessError(f"{self.name} has no defaults in units of the weights; give --eps and --lr with --absolute.")
        if options.stride is not None and getattr(options, "lora", None) is not None:
            raise GradlessError("stride is for a model's own codes; adapters are tuned whole: leave it out with --lora.")

    def groups(self, model: TunableModel, options: CodesT) -> list[Group]:
        """A group for each length of grid. Defaults are scaled to reach equally far along every grid. A user's values are in
        grid steps or, with `absolute`, in units of the weights."""
        adapted = model.lora is not None
        missing = f"{self.name} tunes integer codes, and this model has none; quantize it first (--bits 8), or give --lora 8"
        by_length: dict[float, list[str]] = {}
        for name in self.names(model, options, Kind.CODES, missing):
            by_length.setdefault(model.grid_length(name), []).append(name)
        space: dict[str, int] = {
            "clamp": options.clamp,
            "residual": not (options.stateless or getattr(options, "whole_steps", False)),
        }
        if not adapted:
            space["stride"] = options.stride or DEFAULT_STRIDE
        groups = []
        for length, names in by_length.items():
            few = length < FEW_LEVELS and not adapted
            defaults = self.adapters if adapted else self.few_levels if few else self.plain
            if options.share is not None:
                defaults = defaults._replace(eps=self.eps_of_share(options.share))
            group = self.group(options, Kind.CODES, names, defaults)
            space["span"] = options.span or (DEFAULT_SPAN if few else 1)
            unit = 1 / statistics.mean(map(model.step_size, names)) if options.absolute else length / DEFAULT_GRID
            if options.absolute or not (options.eps or options.share):
                group["eps"] = self.scaled_eps(group["eps"], unit)
            if options.absolute or options.lr is None:
                group["lr"] *= unit**self.power
            groups.append({**group, **space})
        return groups

    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        coded = [tensor for name in file.linear_layers() if (tensor := file.quantized[name]).has_grid]
        values = sum(-(-tensor.rows // DEFAULT_STRIDE) * tensor.columns for tensor in coded)
        return (
            {"tensors": len(coded), "values": values},
            f"{values:,} codes in {len(coded)} linear layers, one row in {DEFAULT_STRIDE}",
        )

    def state_bytes(self, linear: Sequence[tuple[int, int]], blocks: int) -> int:
        """A residual of one byte for each tuned code."""
        del blocks
        return sum(-(-rows // DEFAULT_STRIDE) * columns for rows, columns in linear)
