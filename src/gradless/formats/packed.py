"""gradless's own packed checkpoints: a transformers folder whose linear layers hold the codes of a grid.

    config.json, tokenizer files ...     as transformers writes them
    model.safetensors                    every linear weight as uint8 (rows, blocks, bytes of a block); all else as it was
        __metadata__.gradless-packed     JSON: weight name -> block type ("int4/64", see `blocks.grid_block`)

A block is its fp16 scale, its fp16 offset where the grid is not symmetric, and its codes.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradless.blocks import GROUP_SIZES, block_type, grid_block
from gradless.errors import GradlessError
from gradless.files import replacing_folder
from gradless.formats.quantized import QuantizedModel, ShownFloat, packed_layer, place_float, restore_buffers
from gradless.formats.tensor_file import TensorFile, TensorInfo
from gradless.fusing import fuse
from gradless.grids import GRIDS, scale_and_offset
from gradless.spaces import DenseSpace, Space, linear_layers

FORMAT = "gradless-packed"
WEIGHTS = "model.safetensors"
SMALLEST = 2.0**-24
"""The least positive fp16."""


class PackedModel(QuantizedModel):
    """A packed folder as a model; a replay needs the weights' file alone."""

    output_name = "model"

    def save(self, path: Path, spaces: list[Space]) -> None:
        """Write a copy of the folder with what the spaces tuned."""
        with replacing_folder(path) as temporary:
            shutil.copytree(self.path.parent, temporary, ignore=shutil.ignore_patterns(WEIGHTS))
            self.file.export(temporary / WEIGHTS, {s.name: s.values for s in spaces if isinstance(s, DenseSpace)})


class PackedFile(TensorFile):
    """The weights of a packed folder."""

    @property
    def architecture(self) -> str:
        return str(json.loads((self.path.parent / "config.json").read_text()).get("model_type", "unknown"))

    @property
    def title(self) -> str:
        return self.path.parent.name


def header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file, and where its data begin."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= path.stat().st_size - 8:
            raise GradlessError(f"{path} is not a safetensors file, or is truncated; copy it again.")
        try:
            content: dict[str, Any] = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise GradlessError(f"{path} is not a safetensors file ({error}); copy it again.") from error
    return content, 8 + length


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed checkpoint of ours."""
    path = folder / WEIGHTS
    return path.is_file() and FORMAT in header(path)[0].get("__metadata__", {})


def open_packed(folder: Path) -> PackedFile:
    """Map the weights of a packed folder.

    Raises:
        GradlessError: the file is truncated, or holds a type that gradless does not know.
    """
    path = folder / WEIGHTS
    content, start = header(path)
    types: dict[str, str] = json.loads(content.pop("__metadata__")[FORMAT])
    tensors, size = {}, path.stat().st_size
    for name, entry in content.items():
        begin, end = entry["data_offsets"]
        kind, shape = types.get(name, entry["dtype"]), tuple(entry["shape"])
        if start + end > size:
            raise GradlessError(f"{path} is truncated: it has {size} bytes, but {name} ends at {start + end}; copy it again.")
        if name in types:
            try:
                shape = (shape[0], shape[1] * block_type(kind).size)
            except KeyError as error:
                raise GradlessError(f"{path}: {name} has type {kind}, which this gradless does not know.") from error
        tensors[name] = TensorInfo(name, kind, shape, start + begin, end - begin)
    return PackedFile(path, tensors)


def load_packed(folder: Path, *, dtype: torch.dtype = torch.bfloat16) -> PackedModel:
    """Load a packed folder as a transformers model that keeps it packed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = open_packed(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    restore_buffers(model)
    floats = {}
    for name in file.tensors:
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if name in file.quantized:
            model.set_submodule(path, packed_layer(module, file.quantized[name], dtype))
        else:
            floats[name] = ShownFloat(file.floats[name])
            place_float(floats[name], module, attribute, dtype)
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise GradlessError(f"{file.path} has no tensor for {missing[0]}; it does not fit its config.json.")
    fuse(model.requires_grad_(False).eval())
    return PackedModel(file, model, AutoTokenizer.from_pretrained(folder, local_files_only=True), floats)


def quantize(model: Any, tokenizer: Any, grid: str, group_size: int | None, output: Path, *, search: bool = False) -> None:
    """Round the linear layers of a dense model to a grid, to nearest, and write a packed folder.

    Args:
        model: any dense transformers model.
        tokenizer: of the model.
        grid: a name of `grids.GRIDS`.
        group_size: weights of a row that share a range, a multiple of 32; None for a range a row.
        output: the folder to write, whole or not at all.
        search: choose ranges by squared error.

    Raises:
        GradlessError: the grid is unknown, a row cannot be divided so, or there is no linear layer.
    """
    from safetensors.torch import save_file

    chosen = linear_layers(model)
    tensors: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    shared = set()
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        if attribute == "weight" and isinstance(module := model.get_submodule(path), nn.Linear) and chosen(name, module):
            types[name], tensors[name] = packed_rows(parameter.detach().float(), name, grid, group_size, search=search)
        elif parameter.data_ptr() not in shared:
            shared.add(parameter.data_ptr())
            tensors[name] = parameter.detach().to(torch.bfloat16).contiguous()
    if not types:
        raise GradlessError(f"{type(model).__name__} has no linear layer to quantize.")
    with replacing_folder(output) as temporary:
        temporary.mkdir(parents=True)
        model.config.save_pretrained(temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        save_file(tensors, temporary / WEIGHTS, metadata={FORMAT: json.dumps(types)})


def packed_rows(weight: Tensor, name: str, grid: str, group_size: int | None, *, search: bool) -> tuple[str, Tensor]:
    """The block type of a matrix and its packed blocks: fp32 (rows, columns) -> uint8 (rows, blocks, nbytes)."""
    if grid not in GRIDS:
        raise GradlessError(f"there is no grid {grid}; there are {', '.join(GRIDS)}.")
    rows, columns = weight.shape
    group = group_size or columns
    size = next((size for size in GROUP_SIZES if group % size == 0 and columns % group == 0), None)
    if size is None:
        raise GradlessError(
            f"{name} has rows of {columns}: groups of {group} do not fit; give a multiple of 32 that divides it."
        )
    block = grid_block(GRIDS[grid], size, offset=not GRIDS[grid].symmetric)
    levels = GRIDS[grid] if block.levels is None else replace(GRIDS[grid], levels=block.levels)
    scale, offset = scale_and_offset(weight.view(-1, group), levels, search=search)
    # Codes are rounded with the scale and the offset that the file holds.
    scale = scale.clamp(min=SMALLEST).half().repeat_interleave(group // size).unsqueeze(1)
    offset = offset.half().repeat_interleave(group // size).unsqueeze(1)
    codes = levels.nearest((weight.view(-1, size) - offset.float()) / scale.float())
    packed = torch.zeros(len(scale), block.nbytes, dtype=torch.uint8)
    packed[:, block.scale_at : block.scale_at + 2] = scale.view(torch.uint8)
    if block.offset_at is not None:
        packed[:, block.offset_at : block.offset_at + 2] = offset.view(torch.uint8)
    return block.name, block.pack(packed, codes).view(rows, columns // size, block.nbytes)
