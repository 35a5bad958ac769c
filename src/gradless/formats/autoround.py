"""AutoRound's checkpoints: GPTQ's layout or AWQ's, by their `packing_format`."""

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
"""The layout of each packing."""


def from_config(config: dict[str, Any]) -> Layout[BlockWeight]:
    """From `quantization_config`.

    Raises:
        GradlessError: it has another packing than is supported, or layers with settings of their own.
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
