"""gradless's packed checkpoints: a transformers folder whose linear layers hold codes of a grid.

    config.json, tokenizer files ...     as transformers writes them
    model.safetensors                    every linear weight as uint8 (rows, blocks, bytes of a block); others unchanged
        __metadata__.gradless-packed     JSON: weight name -> block type ("int4/64", see `blocks.grid_block`)

A block is its fp16 scale, its fp16 offset if the grid is not symmetric, and its codes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from gradless.blocks import assemble, dividing_size, grid_block
from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.formats.folder import FORMAT, WEIGHTS
from gradless.formats.quantized import kept_dtype
from gradless.grids import GRIDS, scale_and_offset
from gradless.layers import is_plain
from gradless.spaces import linear_layers
from gradless.types import LanguageModel, Tokenizer

SMALLEST = 2.0**-24
"""The smallest positive fp16 number."""


def quantize(
    model: LanguageModel, tokenizer: Tokenizer | None, grid: str, group_size: int | None, output: Path, *, search: bool = False
) -> None:
    """Round the linear layers of a dense model to a grid, to nearest, and write a packed folder.

    Args:
        model: any dense transformers model.
        tokenizer: of the model, if it has one.
        grid: a name of `grids.GRIDS`.
        group_size: number of weights of a row that share a range, a multiple of 32; None for one range a row.
        output: the folder to write, whole or not at all.
        search: choose ranges by squared error.

    Raises:
        GradlessError: the grid is unknown, a row cannot be divided into such groups, or there is no linear layer.
    """
    from safetensors.torch import save_file

    chosen = linear_layers(model)
    tensors: dict[str, Tensor] = {}
    types: dict[str, str] = {}
    shared = set()
    for name, parameter in model.state_dict(keep_vars=True).items():
        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        if attribute == "weight" and isinstance(module, nn.Linear) and chosen(name, module) and is_plain(module):
            types[name], tensors[name] = packed_rows(parameter.detach().float(), name, grid, group_size, search=search)
        elif parameter.data_ptr() not in shared:
            shared.add(parameter.data_ptr())
            dtype = kept_dtype(model, name, torch.bfloat16) if parameter.is_floating_point() else parameter.dtype
            tensors[name] = parameter.detach().to(dtype).contiguous()
    if not types:
        raise GradlessError(f"{type(model).__name__} has no linear layer to quantize.")
    with replacing(output) as temporary:
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
    size = dividing_size(group)
    if size is None or columns % group:
        raise GradlessError(
            f"{name} has rows of {columns}: groups of {group} do not fit; give a multiple of 32 that divides it."
        )
    block = grid_block(GRIDS[grid], size, "" if GRIDS[grid].symmetric else "offset")
    levels = GRIDS[grid] if block.levels is None else replace(GRIDS[grid], levels=block.levels)
    scale, offset = scale_and_offset(weight.view(-1, group), levels, search=search)
    # Codes are rounded with the scale and the offset that the file holds.
    scale = scale.clamp(min=SMALLEST).half().repeat_interleave(group // size).unsqueeze(1)
    offset = offset.half().repeat_interleave(group // size).unsqueeze(1)
    codes = levels.nearest((weight.view(-1, size) - offset.float()) / scale.float())
    packed = assemble(block, codes, scale.squeeze(1), offset=None if block.offset_at is None else offset.squeeze(1))
    return block.name, packed.view(rows, columns // size, block.nbytes)
