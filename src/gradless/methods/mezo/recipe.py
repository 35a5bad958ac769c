"""MeZO's recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.flags import option
from gradless.methods.recipe import (
    FLOATS,
    Arguments,
    AutoOptions,
    DecayOptions,
    Defaults,
    Recipe,
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
    from gradless.methods.mezo.method import MeZO


@dataclass
class MeZOOptions(SearchOptions, AutoOptions, SharedDirections, DecayOptions):
    """The options of MeZO."""

    master: bool = option(False, "MeZO: keep fp32 masters of bf16 weights instead of rounding updates stochastically.")


class MeZORecipe(Recipe[MeZOOptions]):
    """See `MeZO`: the weights of a dense model, or the float tensors of a quantized file."""

    name = "mezo"
    title = "MeZO ([arXiv 2305.17333](https://arxiv.org/abs/2305.17333)): its plain weights"
    summary = "plain weights"
    options = MeZOOptions
    pairs = False
    held_packed = False
    ratio = 0.2

    def method(self) -> type[MeZO]:
        from gradless.methods.mezo.method import MeZO

        return MeZO

    def check(self, options: MeZOOptions) -> None:
        check_auto(options.lr, options.ratio)
        check_continuous(options.distribution)

    def suits(self, options: MeZOOptions, *, quantized: bool, one_word: bool) -> bool:
        del options, one_word
        return not quantized

    def arguments(self, options: MeZOOptions) -> Arguments:
        return {"q": options.q or self.queries, "distribution": options.distribution}

    def groups(self, model: TunableModel, options: MeZOOptions) -> list[Group]:
        if model.quantized:
            missing = "mezo tunes a GGUF's float tensors, and this has none"
            return [self.group(options, Kind.FLOATS, self.names(model, options, Kind.FLOATS, missing), FLOATS)]
        defaults = Defaults(self.ratio, 1e-3, auto=True)
        names = self.names(model, options, Kind.PARAMETERS, "this model has no linear layer")
        group = self.group(options, Kind.PARAMETERS, names, defaults)
        return [{**group, "master": options.master}]

    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        floats = [values for values in file.floats.values() if values.ndim == 1]
        values = sum(each.numel() for each in floats)
        return {"tensors": len(floats), "values": values}, f"{values:,} values in {len(floats)} norms and biases"

    def state_bytes(self, linear: Sequence[tuple[int, int]], blocks: int) -> int:
        del linear, blocks
        return 0
