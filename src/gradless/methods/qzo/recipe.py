"""QZO's recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.errors import GradlessError
from gradless.flags import above_zero, option
from gradless.methods.block_values import BlockRecipe
from gradless.methods.recipe import (
    FLOATS,
    SIZE,
    AbsoluteOptions,
    Arguments,
    AutoOptions,
    DecayOptions,
    Defaults,
    PartOptions,
    SearchOptions,
    SharedDirections,
    check_auto,
    check_continuous,
)
from gradless.targets import Kind

if TYPE_CHECKING:
    from gradless.formats.checkpoint import Checkpoint
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group
    from gradless.methods.qzo.method import QZO

CENTRED = Defaults(8e-3, 6e-2)
"""Defaults for scales of codes with both signs."""
FROM_ZERO = Defaults(4e-4, 2e-2)
"""Defaults for scales of codes that begin at zero, which also shift a block's mean."""
ABSOLUTE = Defaults(1e-7, 1e-3)
"""The paper's values, for absolute moves."""


@dataclass
class QZOOptions(SearchOptions, AutoOptions, SharedDirections, DecayOptions, PartOptions, AbsoluteOptions):
    """The options of QZO."""

    clip: float = option(100.0, "QZO: the largest directional derivative that an update follows.", within=above_zero(10**12))
    train_unquantized: bool = option(False, "QZO: search the unquantized tensors (norms, biases) in the same step.")
    unquantized_lr: float | None = option(None, "Step size of the unquantized tensors.", needs="train_unquantized", within=SIZE)
    unquantized_eps: float | None = option(
        None, "Size of the unquantized tensors' perturbation.", needs="train_unquantized", within=SIZE
    )


class QZORecipe(BlockRecipe[QZOOptions]):
    """See `QZO`."""

    name = "qzo"
    title = "QZO ([arXiv 2505.13430](https://arxiv.org/abs/2505.13430)): the scales of its quantized weights"
    summary = "scales of a quantized model"
    options = QZOOptions

    def method(self) -> type[QZO]:
        from gradless.methods.qzo.method import QZO

        return QZO

    def check(self, options: QZOOptions) -> None:
        check_auto(options.lr, options.ratio)
        check_continuous(options.distribution)
        if options.ratio is not None and options.lr is None:
            raise GradlessError(f"ratio is for a step size that follows the estimates; give --lr auto to {self.name}.")

    def suits(self, options: QZOOptions, *, quantized: bool, one_word: bool) -> bool:
        del options, one_word
        return quantized

    def arguments(self, options: QZOOptions) -> Arguments:
        return {"q": options.q or self.queries, "distribution": options.distribution}

    def groups(self, model: TunableModel, options: QZOOptions) -> list[Group]:
        """A group for each default of lr and eps, and one for the unquantized tensors if they are searched."""

        def defaults_of(name: str) -> Defaults:
            return ABSOLUTE if options.absolute else CENTRED if model.is_centred(name) else FROM_ZERO

        space = {"part": options.part or "scale", "clip": options.clip, "relative": not options.absolute}
        groups = [{**group, **space} for group in self.block_groups(model, options, defaults_of)]
        return [*groups, self._unquantized(model, options)] if options.train_unquantized else groups

    def _unquantized(self, model: TunableModel, options: QZOOptions) -> Group:
        names = self.names(model, options, Kind.VECTORS, "this model has no unquantized vector")
        group = self.group(options, Kind.FLOATS, names, CENTRED)
        if options.unquantized_lr or "auto" not in group:
            group.pop("auto", None)
            group["lr"] = options.unquantized_lr or FLOATS.lr
        return {
            **group,
            "eps": options.unquantized_eps or FLOATS.eps,
            "weight_decay": 0.0,
            "clip": options.clip,
        }

    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        linear = [file.quantized[name] for name in file.linear_layers()]
        values = sum(tensor.rows * tensor.values_per_row for tensor in linear)
        return {"tensors": len(linear), "values": values}, f"{values:,} block values in {len(linear)} linear layers"

    def scale_eps(self, *, centred: bool) -> float:
        return CENTRED.eps if centred else FROM_ZERO.eps
