"""Models of real shapes with random packed weights: what a step costs depends on nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from gradless.blocks import block_type
from gradless.formats.quantized import packed_layer, restore_buffers
from gradless.fusing import fuse
from gradless.layers import QuantLinear
from gradless.tensor import BlockWeight


def random_model(config: PretrainedConfig, kind: str, device: str = "cpu") -> Any:
    """A causal language model whose linear layers and embedding are random blocks of the type `kind`; all else is 1."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    block = block_type(kind)
    for path, module in list(model.named_modules()):
        for name, parameter in module.named_parameters(recurse=False):
            if type(module) not in (nn.Linear, nn.Embedding) or name == "bias":
                values = torch.ones(parameter.shape, dtype=torch.bfloat16, device=device)
                setattr(module, name, nn.Parameter(values, requires_grad=False))
        if type(module) in (nn.Linear, nn.Embedding):
            rows, columns = module.weight.shape
            packed = torch.randint(256, (rows, columns // block.size, block.nbytes), dtype=torch.uint8, device=device)
            for at in (at for at in (block.scale_at, block.offset_at) if at is not None):
                packed[..., at : at + 2] = torch.tensor([0, 20], dtype=torch.uint8)  # a small fp16
            model.set_submodule(path, packed_layer(module, BlockWeight(path, block, packed), torch.bfloat16))
    restore_buffers(model)
    model.to(device)
    fuse(model)
    return model


def linear_weights(model: Any) -> list[BlockWeight]:
    """The packed weights of linear layers, the head left out."""
    head = model.get_output_embeddings()
    return [module.packed for module in model.modules() if isinstance(module, QuantLinear) and module is not head]
