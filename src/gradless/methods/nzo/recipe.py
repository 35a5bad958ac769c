"""NZO's recipe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gradless.errors import GradlessError
from gradless.methods.block_values import BlockRecipe
from gradless.methods.recipe import Defaults, PartOptions, QueryOptions, SearchOptions, Setting, Setup
from gradless.targets import Kind

if TYPE_CHECKING:
    from gradless.formats.checkpoint import Checkpoint
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group
    from gradless.methods.nzo.calibration import Stored
    from gradless.methods.nzo.method import NZO

BLOCKS = Defaults(0.6, 0.25)
"""Defaults for block values, in units of the words' scores."""
QUERIES = 8
"""Default number of queries an example; each costs two tokens."""
LAST = 1 / 2
"""Share of a model's layers, from the last one back, that are tuned. There one sensitivity serves all examples."""
INTO_STREAM = ("o_proj", "down_proj")
"""Tuned modules of a layer: those that write into the residual stream."""
CALIBRATION_ROWS = 128
"""Number of examples that give the principal directions of a layer's inputs."""


@dataclass
class NZOOptions(SearchOptions, QueryOptions, PartOptions):
    """The options of NZO."""


class NZORecipe(BlockRecipe[NZOOptions]):
    """See `NZO`."""

    name = "nzo"
    title = "NZO (gradless's own; the last layers' outputs perturbed where answers are given): scales and offsets"
    summary = "scales and offsets, for answers of one word, from perturbed outputs"
    options = NZOOptions
    queries = QUERIES
    pairs = False
    tokens_added = 2 * QUERIES

    def method(self) -> type[NZO]:
        from gradless.methods.nzo.method import NZO

        return NZO

    def check(self, options: NZOOptions) -> None:
        super().check(options)
        if options.part == "codebook":
            raise GradlessError("nzo tunes values that belong to one row, and a codebook's entries do not; tune them with qzo.")

    def suits(self, options: NZOOptions, *, quantized: bool, one_word: bool) -> bool:
        """Only if no option asks for something else."""
        return quantized and one_word and options.lr is None and options.eps is None and options.target_modules is None

    def copies(self, options: NZOOptions) -> int:
        return 2 * (options.q or self.queries)

    def groups(self, model: TunableModel, options: NZOOptions) -> list[Group]:
        target = _last_layers(model.model.config.get_text_config().num_hidden_layers) if model.quantized else None
        group = self.group(options, Kind.BLOCKS, self.blocks(model, options, target=target), BLOCKS)
        return [{**group, "part": options.part or "both", "relative": True}]

    def setup(self, setting: Setting[NZOOptions], earlier: Setup | None = None) -> Setup:
        """See `Recipe.setup`. The arguments include each layer's calibration under "looks", its name in the journal."""
        arguments = {"name": self.name, "seed": setting.seed, "q": setting.options.q or self.queries}
        if earlier is not None and earlier.method["name"] == self.name:
            seen = {name: earlier.method[name] for name in ("words", "looks")}
            return Setup({**arguments, **seen}, earlier.groups[:1])
        if not setting.answer_words:
            raise GradlessError(
                "nzo needs rows that choose among the same few words of one token each, and a model that keeps copies of a "
                "token apart; use --method ezo or qzo."
            )
        groups = self.groups(setting.model, setting.options)
        return Setup({**arguments, "words": setting.answer_words, "looks": self._calibrated(setting, groups)}, groups)

    def _calibrated(self, setting: Setting[NZOOptions], groups: list[Group]) -> dict[str, Stored]:
        """The `Calibration` of each tensor, as plain values."""
        import torch

        from gradless.methods.nzo.calibration import calibrate
        from gradless.spaces import BlockSpace

        (group,) = groups
        spaces = setting.model.spaces(**{name: group[name] for name in ("kind", "names", "part", "relative")})
        slopes = {space.name: space.mean_square_slope() for space in spaces if isinstance(space, BlockSpace)}
        batches = setting.first_batches(CALIBRATION_ROWS)
        with torch.inference_mode():
            found = calibrate(batches, slopes, setting.options.q or self.queries, setting.seed)
        return {name: each.to_json() for name, each in found.items()}

    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        del file
        return {}, f"{' and '.join(INTO_STREAM)} alone, in the last {LAST:.0%} of the layers, for answers of one word"

    def state_bytes(self, linear: Sequence[tuple[int, int]], blocks: int) -> int:
        """At most an fp32 master for each block of the tuned layers."""
        return round(LAST * super().state_bytes(linear, blocks))


def _last_layers(layers: int) -> str:
    """The paths of the modules that are tuned, as a regular expression."""
    last = range(math.floor(layers * (1 - LAST)), layers)
    return rf".*\.({'|'.join(map(str, last))})\..*\.({'|'.join(INTO_STREAM)})"
