"""AutoRound's checkpoints: their `packing_format` says whether they have GPTQ's layout or AWQ's."""

from __future__ import annotations

from collections.abc import Mapping

from gradless.errors import GradlessError
from gradless.formats.awq import AWQ
from gradless.formats.checkpoint import Layout
from gradless.formats.gptq import GPTQ
from gradless.formats.words import is_narrow
from gradless.readers.json import is_object, mapping
from gradless.tensor import BlockWeight

PACKINGS = {
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
    "auto_round:auto_gptq": "gptq",
    "auto_round:auto_awq": "awq",
}
"""`packing_format` -> the layout."""


def from_config(config: Mapping[str, object]) -> Layout[BlockWeight]:
    """The layout that a `quantization_config` describes.

    Raises:
        GradlessError: the packing is not supported, or a layer has its own settings.
    """
    packing = str(config.get("packing_format"))
    if packing not in PACKINGS:
        raise GradlessError(f"AutoRound packed as {packing}; supported are {', '.join(PACKINGS)}.")
    layers = mapping(config, "extra_config", "AutoRound", of=is_object, what="an object")
    unlike = [name for name, own in layers.items() if is_narrow(own.get("bits"))]
    if unlike:
        raise GradlessError(f"AutoRound with settings of its own for {unlike[0]} is not supported.")
    rest = {name: value for name, value in config.items() if name not in ("packing_format", "extra_config")}
    if PACKINGS[packing] == "awq":
        return AWQ.from_config(rest)
    return GPTQ.from_config(rest | {"checkpoint_format": PACKINGS[packing]})
