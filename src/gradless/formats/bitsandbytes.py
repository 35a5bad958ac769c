"""bitsandbytes' checkpoints: NF4 and FP4, with plain or quantized scales, and INT8.

In a 4-bit layer `weight` holds two codes in a byte, the high nibble first, along its rows, and `absmax` a scale for every block
of codes. With double quantization `absmax` is a code too: scale = nested_quant_map[absmax] * nested_absmax + nested_offset.
Scales that tuning moved are then rounded to the nearest of these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import ClassVar, NotRequired, TypedDict

import torch
from torch import Tensor

from gradless.blocks import assemble, dividing_size, grid_block
from gradless.errors import GradlessError
from gradless.formats.account import understood
from gradless.formats.checkpoint import Layout, finite, rounded
from gradless.grids import GRIDS, integers
from gradless.tensor import BlockWeight, Part, TunedCodes

KINDS = ("nf4", "fp4")
USED = ("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_quant_storage")
NEUTRAL = (
    *("_load_in_4bit", "_load_in_8bit", "bnb_4bit_compute_dtype", "bnb_4bit_use_double_quant", "llm_int8_threshold"),
    *("llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    *("bits", "group_size"),  # each layer's tensors say it
)
STATE = "weight.quant_state.bitsandbytes__"


def from_config(config: Mapping[str, object]) -> Layout[BlockWeight]:
    """From `quantization_config`.

    Raises:
        GradlessError: it says neither 4 nor 8 bits, or both, or has a setting that gradless does not know.
    """
    understood(config, "bitsandbytes", USED, NEUTRAL)
    eight = bool(config.get("load_in_8bit"))
    four = bool(config.get("load_in_4bit") or ("bnb_4bit_quant_type" in config and not eight))
    if four == eight:
        raise GradlessError("bitsandbytes with load_in_4bit and load_in_8bit both or neither; one of them says what it is.")
    storage = str(config.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch.")
    if four and storage != "uint8":
        raise GradlessError(f"bitsandbytes' codes stored as {storage} (bnb_4bit_quant_storage); supported is uint8.")
    return EightBit() if eight else FourBit(str(config.get("bnb_4bit_quant_type", "fp4")))


class FourBit(Layout[BlockWeight]):
    """NF4's and FP4's tensors.

    Args:
        kind: nf4 or fp4.

    Raises:
        GradlessError: it is another one.
    """

    parts: ClassVar[tuple[str, ...]] = (
        *("weight.absmax", "weight", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map"),
        *(STATE + kind for kind in KINDS),
    )

    def __init__(self, kind: str) -> None:
        if kind not in KINDS:
            raise GradlessError(f"bitsandbytes' 4-bit type {kind} is not known; supported are {' and '.join(KINDS)}.")
        self.state = STATE + kind
        self.optional = frozenset(part for part in self.parts if "nested" in part or part.startswith(STATE)) - {self.state}
        self.grid = GRIDS[kind]

    @property
    def title(self) -> str:
        return f"bitsandbytes, {self.grid.name}"

    def read(self, name: str, parts: Mapping[str, Tensor]) -> BlockWeight:
        if sum(part.startswith(STATE) for part in parts) > 1:
            raise GradlessError(f"{name} says that it is both of {' and '.join(KINDS)}; download or quantize it again.")
        state = _state(parts[self.state])
        (rows, columns), length = state["shape"], state["blocksize"]
        size = _size(name, columns, length)
        scale = finite(name, _scales(parts, state)).view(-1)
        if parts["weight"].numel() * 2 != rows * columns or scale.numel() * length != rows * columns:
            raise GradlessError(
                f"{name} is {rows} x {columns}, but has {2 * parts['weight'].numel()} codes "
                f"and {len(scale)} scales for {length} each."
            )
        levels = parts["weight.quant_map"]
        codes = torch.searchsorted(self.grid.table(), levels.clamp(-1, 1))
        if not torch.equal(self.grid.table()[codes], levels):
            raise GradlessError(f"{name} has a quant_map that is not {self.grid.name}'s.")
        block = grid_block(self.grid, size, "fp32")
        packed = assemble(
            block,
            codes[_nibbles(parts["weight"])].view(rows, -1, size),
            scale.repeat_interleave(length // size).view(rows, -1),
        )
        return BlockWeight(name, block, packed, blocks_per_value=length // size)

    def write(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(weight.tuned, TunedCodes):
            return {"weight.absmax": _absmax(weight, parts, _state(parts[self.state]))}
        raw = _nibbles(parts["weight"])
        levels = parts["weight.quant_map"]
        after = self.grid.values(weight.block.unpack(weight.packed.flatten(0, 1).cpu()).codes.flatten())
        moved = levels[raw] != after
        raw[moved] = (levels == after[moved].unsqueeze(1)).int().argmax(1)
        high, low = raw.view(-1, 2).unbind(1)
        return {"weight": (high << 4 | low).to(torch.uint8)}

    def saved(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> Tensor:
        state = _state(parts[self.state])
        written = dict(parts) | {"weight.absmax": _absmax(weight, parts, state)}
        return _scales(written, state).view_as(weight.tuned_values.values)


class EightBit(Layout[BlockWeight]):
    """INT8's tensors: w = weight * SCB / 127. SCB is each row's largest value."""

    parts: ClassVar[tuple[str, ...]] = ("SCB", "weight", "weight_format")
    optional = frozenset({"weight_format"})
    title = "bitsandbytes, int8"

    def read(self, name: str, parts: Mapping[str, Tensor]) -> BlockWeight:
        if "weight_format" in parts and parts["weight_format"].any():
            raise GradlessError(f"{name} is in an order of bitsandbytes' own kernels (weight_format); rows are supported.")
        codes, largest = parts["weight"], finite(name, parts["SCB"])
        rows, columns = codes.shape
        if len(largest) != rows:
            raise GradlessError(f"{name} has {rows} rows, but {len(largest)} scales.")
        size = _size(name, columns, columns)
        block = grid_block(integers(8), size, "fp32")
        packed = assemble(block, codes.view(rows, -1, size), (largest / 127).unsqueeze(1).expand(-1, columns // size))
        return BlockWeight(name, block, packed, blocks_per_value=columns // size)

    def write(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(weight.tuned, TunedCodes):
            tuned = weight.tuned_values.values.cpu()
            return {"SCB": torch.where(tuned == weight.file_values(Part.SCALE).cpu(), parts["SCB"].unsqueeze(1), tuned * 127)}
        codes = weight.block.unpack(weight.packed.flatten(0, 1).cpu()).codes
        return {"weight": codes.to(torch.int8)}

    def saved(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> Tensor:
        return self.write(weight, parts)["SCB"] / 127


class State(TypedDict):
    """What bitsandbytes writes of a matrix beside its numbers; the `nested` entries are there if scales have scales."""

    shape: list[int]
    blocksize: int
    nested_blocksize: NotRequired[int]
    nested_offset: NotRequired[float]


def _state(stored: Tensor) -> State:
    result: State = json.loads(bytes(stored.tolist()))
    return result


def _size(name: str, columns: int, length: int) -> int:
    """The size of our blocks that divides rows and the format's own blocks."""
    size = dividing_size(length)
    if size is None or columns % length:
        raise GradlessError(f"{name} has blocks of {length} in rows of {columns}; blocks that divide a row are supported.")
    return size


def _nibbles(stored: Tensor) -> Tensor:
    """The codes in bytes, the high nibble first: int64, (n,)."""
    flat = stored.flatten()
    return torch.stack([flat >> 4, flat & 15], 1).flatten().long()


def _nested(parts: Mapping[str, Tensor], state: State) -> Tensor:
    """The factor of each scale's code: fp32."""
    n = parts["weight.absmax"].numel()
    return parts["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[:n]


def _scales(parts: Mapping[str, Tensor], state: State) -> Tensor:
    """The scales that `absmax` stands for: fp32, (n,)."""
    absmax = parts["weight.absmax"].flatten()
    if "nested_blocksize" not in state:
        return absmax.float()
    scales: Tensor = parts["weight.nested_quant_map"][absmax.long()] * _nested(parts, state) + state["nested_offset"]
    return scales


def _absmax(weight: BlockWeight, parts: Mapping[str, Tensor], state: State) -> Tensor:
    """`absmax` as the file will hold the tuned scales: the nearest codes, and the file's own for scales that did not move."""
    before, tuned = parts["weight.absmax"], weight.tuned_values.values.cpu().flatten()
    if "nested_blocksize" not in state:
        return rounded(tuned, before.dtype)
    levels = parts["weight.nested_quant_map"]
    unit = (tuned - state["nested_offset"]) / _nested(parts, state)
    middles = (levels[1:] + levels[:-1]) / 2
    nearest = torch.searchsorted(middles, unit.contiguous()).to(before.dtype)
    return torch.where(tuned == weight.file_values(Part.SCALE).cpu().flatten(), before.flatten(), nearest)
