"""EZO's recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.methods.block_values import BlockRecipe
from gradless.methods.recipe import RATIO, AutoOptions, DecayOptions, Defaults, SearchOptions, check_auto

if TYPE_CHECKING:
    from gradless.formats.checkpoint import Checkpoint
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group
    from gradless.methods.ezo.method import EZO

OFFSETS = Defaults(RATIO, 1e-2, auto=True)
"""Defaults for blocks with offsets."""
SCALES = Defaults(RATIO, 6e-2, auto=True)
"""Defaults for blocks without offsets, whose scales are tuned."""


@dataclass
class EZOOptions(SearchOptions, AutoOptions, DecayOptions):
    """The options of EZO."""


class EZORecipe(BlockRecipe[EZOOptions]):
    """See `EZO`."""

    name = "ezo"
    title = "EZO (gradless's own; a direction for each example): offsets, or scales, of its quantized weights"
    summary = "offsets, with a direction for each example"
    options = EZOOptions

    def method(self) -> type[EZO]:
        from gradless.methods.ezo.method import EZO

        return EZO

    def check(self, options: EZOOptions) -> None:
        check_auto(options.lr, options.ratio)

    def groups(self, model: TunableModel, options: EZOOptions) -> list[Group]:
        """A group for the blocks with offsets, and one for those without."""
        groups = self.block_groups(model, options, lambda name: OFFSETS if model.has_offset(name) else SCALES)
        return [{"auto": False, **group, "part": "offset", "relative": True} for group in groups]

    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        linear = [file.quantized[name] for name in file.linear_layers()]
        offsets = sum(tensor.has_offset for tensor in linear)
        return (
            {"tensors": len(linear), "with offsets": offsets},
            f"the offsets of {offsets} of {len(linear)} linear layers, and the scales of the others",
        )
