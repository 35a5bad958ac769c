"""A transformers model around packed tensors, whatever file they lie in.

Nothing is dequantized: linear layers and embeddings of a model on the meta device are replaced by `layers`, and only the small
float tensors get memory of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.errors import GradlessError
from gradless.formats.checkpoint import Checkpoint
from gradless.layers import QuantEmbedding, QuantLinear
from gradless.spaces import BlockSpace, CodeSpace, DenseSpace, Space
from gradless.targets import EVERYTHING, Targets
from gradless.tensor import CodebookTensor, QuantTensor

NOT_SET = (0, float("nan"))


@dataclass
class ShownFloat:
    """A float tensor of the file and where the model shows it.

    Attributes:
        values: in the file's own type and order (a view of the file).
        sites: (module, attribute) of every parameter that shows it.
        show: file values -> the parameter's values (transformers' transform: Gemma adds an offset to its norms).
    """

    values: Tensor
    sites: list[tuple[nn.Module, str]] = field(default_factory=list)
    show: Callable[[Tensor], Tensor] | None = None


@dataclass
class QuantizedModel:
    """A file of packed weights and, around them, a transformers causal language model.

    A replay needs the file alone: it leaves `model`, `tokenizer` and the places in `floats` out.

    Attributes:
        notes: what a user should know of tensors that change nothing and are not used (`Account.settle`).
    """

    file: Checkpoint
    model: Any = None
    tokenizer: Any = None
    floats: dict[str, ShownFloat] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    quantized = True

    @property
    def output_name(self) -> str:
        """What a run calls the tuned checkpoint."""
        return self.file.output_name

    @property
    def path(self) -> Path:
        return self.file.path

    def fingerprint(self) -> str:
        """One hash of all weights."""
        return self.file.fingerprint()

    @property
    def tuned(self) -> list[QuantTensor]:
        """The packed tensors whose block values are being tuned."""
        return [tensor for tensor in self.file.quantized.values() if tensor.master is not None]

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """Names of what is searched: "blocks" or "codes" of linear layers, "floats" or "vectors" (norms and biases).

        Raises:
            GradlessError: the targets leave nothing.
        """
        modules = dict(self.model.named_modules())
        if kind in ("blocks", "codes"):
            packed = {path: m.packed for path, m in modules.items() if isinstance(m, QuantLinear | QuantEmbedding)}
            if kind == "codes":
                packed = {path: tensor for path, tensor in packed.items() if not isinstance(tensor, CodebookTensor)}
            return targets.choose([(path, tensor.name) for path, tensor in packed.items()], self.file.linear_layers())
        places, head = {module: path for path, module in modules.items()}, self.model.get_output_embeddings()
        shown = {name: [module for module, _ in shown.sites] for name, shown in self.floats.items()}
        default = [name for name, sites in shown.items() if not any(isinstance(m, nn.Embedding) or m is head for m in sites)]
        chosen = targets.choose([(places[m], name) for name, sites in shown.items() for m in sites], default)
        return [name for name in chosen if kind == "floats" or self.floats[name].values.ndim == 1]

    def is_centred(self, name: str) -> bool:
        """Whether a tensor's scales multiply numbers of both signs."""
        return self.file.quantized[name].is_centred

    def has_offset(self, name: str) -> bool:
        """See `QuantTensor.has_offset`."""
        return self.file.quantized[name].has_offset

    def grid_length(self, name: str) -> float:
        """How many steps the grid of a tensor's codes has from end to end."""
        return self.file.quantized[name].block.grid.length

    def step_size(self, name: str) -> float:
        """The mean size of such a step, in units of the weights (of the first rows)."""
        tensor = self.file.quantized[name]
        return tensor.block.step(tensor.packed[:16].flatten(0, 1))

    def spaces(
        self,
        kind: str,
        names: list[str],
        *,
        part: str = "scale",
        relative: bool = True,
        stride: int = 1,
        clamp: bool = False,
        residual: bool = False,
    ) -> list[Space]:
        """Spaces over the named tensors of one kind; float tensors are tuned in fp32 masters of their own."""
        if kind == "blocks":
            return [BlockSpace(self.file.quantized[name], part, relative=relative) for name in names]
        if kind == "codes":
            return [CodeSpace(self.file.quantized[n], stride=stride, clamp=clamp, residual=residual) for n in names]
        found: list[Space] = []
        for name in names:
            shown = self.floats.get(name) or ShownFloat(self.file.floats[name])
            device = getattr(*shown.sites[0]).device if shown.sites else "cpu"
            found.append(DenseSpace(name, shown.values.float().clone().to(device), shown.sites, shown.show))
        return found

    def save(self, path: Path, spaces: list[Space]) -> None:
        """Write a copy of the checkpoint with what the spaces tuned."""
        self.file.export(path, {space.name: space.values for space in spaces if isinstance(space, DenseSpace)})


def restore_buffers(model: Any) -> None:
    """Give the buffers memory and their computed values (rotary frequencies, embedding factors)."""
    for module in model.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            for name, buffer in module.named_buffers(recurse=False):
                module.register_buffer(
                    name, torch.full_like(buffer, NOT_SET[buffer.is_floating_point()], device="cpu"), persistent=False
                )
            model._init_weights(module)
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.is_floating_point() and buffer.isnan().any():
                    raise GradlessError(f"transformers does not initialize the buffer {name} of {type(module).__name__}.")


def packed_layer(module: nn.Linear | nn.Embedding, tensor: QuantTensor, dtype: torch.dtype) -> nn.Module:
    """The module that stands for a linear layer or an embedding.

    Raises:
        GradlessError: the tensor has another shape.
    """
    if (tensor.rows, tensor.columns) != module.weight.shape:
        expected = " x ".join(map(str, module.weight.shape))
        raise GradlessError(f"{tensor.name} is {tensor.rows} x {tensor.columns}; the model's configuration says {expected}.")
    if isinstance(module, nn.Linear):
        return QuantLinear(tensor, module.bias, dtype)
    return QuantEmbedding(tensor, getattr(module, "embed_scale", None), dtype)


def place_float(shown: ShownFloat, module: nn.Module, attribute: str, dtype: torch.dtype) -> None:
    """Make a module's parameter show a float tensor."""
    values = (shown.show(shown.values) if shown.show else shown.values).to(dtype)
    parameter = getattr(module, attribute)
    if parameter.shape != values.shape:
        raise GradlessError(f"tensor shape {tuple(values.shape)} does not fit {attribute} {tuple(parameter.shape)}.")
    setattr(module, attribute, nn.Parameter(values, requires_grad=False))
    shown.sites.append((module, attribute))


def tie(model: Any, floats: dict[str, ShownFloat], dtype: torch.dtype) -> None:
    """Let the head read the embedding's tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(QuantLinear(embedding.packed, head.bias, dtype))
    elif isinstance(head.weight, nn.Parameter) and head.weight.is_meta:
        head.weight = embedding.weight
        for shown in floats.values():
            if (embedding, "weight") in shown.sites:
                shown.sites.append((head, "weight"))


def dequantized(loaded: QuantizedModel) -> Any:
    """A dense bf16 model with the values of a packed one."""
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(loaded.model.config)  # from_config writes into it
    dense = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    for path, module in loaded.model.named_modules():
        target = dense.get_submodule(path)
        if isinstance(module, QuantLinear | QuantEmbedding):
            weight = kernels.dequantize(module.packed, module.packed.file_rows, torch.bfloat16)[0]
            order = module.packed.column_order
            target.weight.data = weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)
        for name, parameter in module.named_parameters(recurse=False):
            getattr(target, name).data = parameter.data.to(torch.bfloat16, copy=True)
    dense.tie_weights()
    return dense.requires_grad_(False).eval()
