"""AutoRound's checkpoints: their `packing_format` says whether they have GPTQ's layout or AWQ's."""

from __future__ import annotations

from typing import Any

from gradless.errors import GradlessError
from gradless.formats.awq import AWQ
from gradless.formats.checkpoint import Layout
from gradless.formats.gptq import GPTQ
from gradless.formats.words import FLOAT_BITS
from gradless.tensor import BlockWeight

PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
}
"""`packing_format` -> the layout."""


def from_config(config: dict[str, Any]) -> Layout[BlockWeight]:
    """The layout that a `quantization_config` describes.

    Raises:
        GradlessError: the packing is not supported, or a layer has its own settings.
    """
    packing = str(config.get("packing_format"))
    if packing not in PACKINGS:
        raise GradlessError(f"AutoRound packed as {packing}; supported are {', '.join(PACKINGS)}.")
    unlike = [name for name, own in (config.get("extra_config") or {}).items() if (own.get("bits") or FLOAT_BITS) < FLOAT_BITS]
    if unlike:
        raise GradlessError(f"AutoRound with settings of its own for {unlike[0]} is not supported.")
    rest = {name: value for name, value in config.items() if name not in ("packing_format", "extra_config")}
    if PACKINGS[packing] == "awq":
        return AWQ.from_config(rest)
    return GPTQ.from_config(rest | {"checkpoint_format": PACKINGS[packing]})
