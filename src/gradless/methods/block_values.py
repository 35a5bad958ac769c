"""What the recipes of methods over block values (scales, offsets) share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from gradless.methods.recipe import Defaults, OptionsT, Recipe
from gradless.targets import Kind

if TYPE_CHECKING:
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group


class BlockRecipe(Recipe[OptionsT]):
    """The recipe of a method over block values."""

    moves_scales = True

    def blocks(self, model: TunableModel, options: OptionsT, *, target: str | None = None) -> list[str]:
        """The names of the packed tensors whose block values are tuned; see `Recipe.names`."""
        missing = f"{self.name} tunes the scales of quantized weights, and this model has none; use --method mezo, or a GGUF"
        return self.names(model, options, Kind.BLOCKS, missing, target=target)

    def block_groups(self, model: TunableModel, options: OptionsT, defaults_of: Callable[[str], Defaults]) -> list[Group]:
        """A group for each of the defaults that some tensor has.

        Args:
            model: see `groups`.
            options: see `groups`.
            defaults_of: a tensor's name -> its defaults.
        """
        by_defaults: dict[Defaults, list[str]] = {}
        for name in self.blocks(model, options):
            by_defaults.setdefault(defaults_of(name), []).append(name)
        return [self.group(options, Kind.BLOCKS, names, defaults) for defaults, names in by_defaults.items()]

    def state_bytes(self, linear: Sequence[tuple[int, int]], blocks: int) -> int:
        """An fp32 master for each block."""
        del linear
        return 4 * blocks
