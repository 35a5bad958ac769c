"""What of a model is tuned: a kind of values, and patterns over the paths of modules, as PEFT's `target_modules` and
`exclude_modules`."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum

from gradless.errors import GradlessError

ALL_LINEAR = "all-linear"
_NAMES = re.compile(r"[\w.\-]+(,[\w.\-]+)*")


class Kind(StrEnum):
    """What a group of spaces is over. The values stand in journals."""

    BLOCKS = "blocks"  # scales, offsets or codebooks of packed weights
    CODES = "codes"  # integer codes of packed weights, or of adapters
    FLOATS = "floats"  # the unquantized tensors of a quantized file
    VECTORS = "vectors"  # those of them that have one dimension: norms and biases
    PARAMETERS = "parameters"  # weights of a dense model


@dataclass(frozen=True)
class Targets:
    """A choice of modules.

    Attributes:
        target: names, separated by commas, that a module's path is or ends with (`q_proj,v_proj`); or, where there are other
            characters in it, a regular expression for the whole path; None, or "all-linear", for what is tuned by default.
        exclude: the same, of what is left out.
    """

    target: str | None = None
    exclude: str | None = None

    def choose(self, places: Sequence[tuple[str, str]], default: Collection[str]) -> list[str]:
        """The names of the chosen tensors.

        Args:
            places: of every tensor that could be tuned, the paths of its modules and, each time, its name.
            default: the names of those that are, unless something else is asked for.

        Raises:
            GradlessError: a pattern is no regular expression, or nothing is chosen though something was asked for.
        """
        asked = self.target not in (None, ALL_LINEAR)
        left_out = {name for path, name in places if self.exclude is not None and _fits(self.exclude, path)}
        kept = {
            name: None
            for path, name in places
            if name not in left_out and (_fits(str(self.target), path) if asked else name in default)
        }
        if not kept and places and (asked or left_out):
            last = sorted({path.rpartition(".")[2] for path, _ in places})
            raise GradlessError(
                f"no module is left by target_modules {self.target!r} and exclude_modules {self.exclude!r}; "
                f"there are {', '.join(last)}."
            )
        return list(kept)


EVERYTHING = Targets()
"""All that is tuned by default."""


def _fits(pattern: str, path: str) -> bool:
    if _NAMES.fullmatch(pattern):
        return any(path == name or path.endswith("." + name) for name in pattern.split(","))
    try:
        return re.fullmatch(pattern, path) is not None
    except re.error as error:
        raise GradlessError(f"{pattern!r} is neither names nor a regular expression: {error}.") from error
