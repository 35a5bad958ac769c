"""A transformers model around packed weights, from any file.

Nothing is dequantized: linear layers and embeddings of a model on the meta device are replaced by `layers`, and only the small
float tensors get memory of their own.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.errors import GradlessError
from gradless.formats.account import Account
from gradless.formats.checkpoint import Checkpoint
from gradless.formats.model import Plain
from gradless.layers import QuantEmbedding, QuantLinear, is_plain
from gradless.spaces import BlockSpace, CodeSpace, DenseSpace, Space, check_finite, reads_text
from gradless.targets import EVERYTHING, Kind, Targets
from gradless.tensor import PackedWeight
from gradless.types import LanguageModel, Modules, Tokenizer

BIAS_SWITCHES = ("attention_bias", "mlp_bias")
"""Settings of transformers' configurations that give linear layers biases."""


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
class QuantizedModel(Plain):
    """A file of packed weights and, around them, a transformers causal language model.

    A replay needs the file alone: it leaves the model, `tokenizer` and the places in `floats` out.

    Attributes:
        notes: sentences for the user about tensors that are not used (`Account.settle`).
        searched: the spaces that were made, by name.
    """

    file: Checkpoint
    _model: LanguageModel | None = None
    tokenizer: Tokenizer | None = None
    floats: dict[str, ShownFloat] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    searched: dict[str, Space] = field(default_factory=dict)

    quantized = True

    @property
    def model(self) -> LanguageModel:
        """The transformers model; there is none if only the file was opened."""
        assert self._model is not None, "only the file was opened"
        return self._model

    @property
    def output_name(self) -> str:
        """The name that a run gives the tuned checkpoint."""
        return self.file.output_name

    @property
    def path(self) -> Path:
        return self.file.path

    def fingerprint(self) -> str:
        """One hash of all weights."""
        return self.file.fingerprint()

    def identity(self) -> dict[str, str]:
        """The SHA-256 of each file that matters, by its name."""
        return self.file.identity()

    @property
    def tuned(self) -> list[PackedWeight]:
        """The packed weights whose values are being tuned."""
        return [weight for weight in self.file.quantized.values() if weight.part is not None]

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """Names of what is searched: "blocks" or "codes" of linear layers, "floats" or "vectors" (norms and biases).

        Raises:
            GradlessError: the targets leave nothing.
        """
        modules, reads = dict(self.model.named_modules()), reads_text(self.model)
        if kind in (Kind.BLOCKS, Kind.CODES):
            packed = {path: m.packed for path, m in modules.items() if isinstance(m, QuantLinear | QuantEmbedding)}
            if kind == Kind.CODES:
                packed = {path: weight for path, weight in packed.items() if weight.has_grid}
            named = {path: weight.name for path, weight in packed.items()}
            return targets.choose(list(named.items()), [name for name in self.linear_layers() if name in named.values()])
        places, head = {module: path for path, module in modules.items()}, self.model.get_output_embeddings()
        shown = {name: [module for module, _ in shown.sites] for name, shown in self.floats.items()}
        default = [
            name
            for name, sites in shown.items()
            if all(m in reads and m is not head and not isinstance(m, nn.Embedding) for m in sites)
        ]
        chosen = targets.choose([(places[m], name) for name, sites in shown.items() for m in sites], default)
        return [name for name in chosen if kind == Kind.FLOATS or self.floats[name].values.ndim == 1]

    def linear_layers(self) -> list[str]:
        """The packed matrices that are tuned by default: of the part that reads text, neither embeddings nor the head."""
        head, reads = self.model.get_output_embeddings(), reads_text(self.model)
        layers = [module for module in self.model.modules() if isinstance(module, QuantLinear)]
        shown = {layer.packed.name for layer in layers if layer in reads and layer is not head}
        return [name for name in self.file.linear_layers() if name in shown]

    def is_centred(self, name: str) -> bool:
        """Whether a tensor's scales multiply numbers of both signs."""
        return self.file.quantized[name].is_centred

    def has_offset(self, name: str) -> bool:
        """See `PackedWeight.has_offset`."""
        return self.file.quantized[name].has_offset

    def grid_length(self, name: str) -> float:
        """How many steps the grid of a tensor's codes has from end to end."""
        return self.file.quantized[name].in_blocks().block.grid.length

    def step_size(self, name: str) -> float:
        """The mean size of such a step in the first rows, in units of the weights."""
        weight = self.file.quantized[name].in_blocks()
        return weight.block.step(weight.packed[:16].flatten(0, 1))

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
        found: list[Space]
        if kind == Kind.BLOCKS:
            found = [BlockSpace(self.file.quantized[name], part, relative=relative) for name in names]
        elif kind == Kind.CODES:
            found = [CodeSpace(self.file.quantized[n], stride=stride, clamp=clamp, residual=residual) for n in names]
        else:
            found = [self._float_space(name) for name in names]
        self.searched |= {space.name: space for space in found}
        return found

    def _float_space(self, name: str) -> DenseSpace:
        shown = self.floats.get(name) or ShownFloat(self.file.floats[name])
        device = getattr(*shown.sites[0]).device if shown.sites else "cpu"
        return DenseSpace(name, shown.values.float().clone().to(device), shown.sites, shown.show)

    def save(self, path: str | Path) -> None:
        """Write a copy of the checkpoint with what its spaces tuned.

        Raises:
            GradlessError: that is not finite, or the disk is full; nothing is left behind.
        """
        check_finite(list(self.searched.values()))
        floats = {name: space.values for name, space in self.searched.items() if isinstance(space, DenseSpace)}
        self.file.export(Path(path), floats)


def restore_buffers(model: LanguageModel) -> None:
    """Give the buffers memory and their computed values (rotary frequencies, embedding factors).

    Raises:
        GradlessError: transformers does not compute one of them, and no file holds it either, since it is not persistent.
    """
    for module, owner in _owners(model, model):
        before = {name: buffer for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta}
        if not before:
            continue
        computed = []
        for filling in (0, 1):  # what differs by what was there before was not computed
            for name, buffer in before.items():
                module._buffers[name] = torch.full_like(buffer, filling, device="cpu")
            owner._init_weights(module)
            computed.append([module._buffers[name] for name in before])
        for name, one, other in zip(before, *computed, strict=True):
            if not torch.equal(one, other) and name in module._non_persistent_buffers_set:
                raise GradlessError(f"transformers does not initialize the buffer {name} of {type(module).__name__}.")


class _Initializing(Protocol):
    """A model, whose class knows how the buffers of its modules are computed."""

    def _init_weights(self, module: Modules) -> None: ...


def _initializes(module: Modules) -> TypeGuard[_Initializing]:
    return hasattr(module, "_init_weights")


def _owners(module: Modules, owner: _Initializing) -> Iterator[tuple[Modules, _Initializing]]:
    """Each module, and the nearest model around it, whose class knows how its buffers are computed."""
    owner = module if _initializes(module) else owner
    yield module, owner
    for child in module.children():
        yield from _owners(child, owner)


def kept_dtype(model: LanguageModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The type in which a model computes with a parameter: `dtype`, but for those that its class always keeps in fp32."""
    kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    return next((own for pattern, own in kept.items() if re.search(pattern.replace("*", ".*"), name)), dtype)


def packed_layer(module: nn.Linear | nn.Embedding, weight: PackedWeight, dtype: torch.dtype) -> nn.Module:
    """The module that stands for a linear layer or an embedding.

    Raises:
        GradlessError: the weight has another shape.
    """
    if (weight.rows, weight.columns) != module.weight.shape:
        expected = " x ".join(map(str, module.weight.shape))
        raise GradlessError(f"{weight.name} is {weight.rows} x {weight.columns}; the model's configuration says {expected}.")
    if isinstance(module, nn.Linear):
        if not is_plain(module):
            raise GradlessError(f"{weight.name} is packed, and {type(module).__name__} does more than multiply it.")
        return QuantLinear(weight, module.bias, dtype)
    return QuantEmbedding(weight, getattr(module, "embed_scale", None), dtype)


def place_float(shown: ShownFloat, module: nn.Module, attribute: str, dtype: torch.dtype) -> None:
    """Make a module's parameter show a float tensor."""
    values = (shown.show(shown.values) if shown.show else shown.values).to(dtype)
    parameter = getattr(module, attribute)
    if parameter is not None and parameter.shape != values.shape:
        raise GradlessError(f"tensor shape {tuple(values.shape)} does not fit {attribute} {tuple(parameter.shape)}.")
    setattr(module, attribute, nn.Parameter(values, requires_grad=False))
    shown.sites.append((module, attribute))


def tie(model: LanguageModel, floats: dict[str, ShownFloat], dtype: torch.dtype) -> None:
    """Let parameters that the class ties show one tensor: the head the embedding's, and what else there is."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, nn.Linear) and head.weight.is_meta and isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(QuantLinear(embedding.packed, head.bias, dtype))
    for names in model.get_expanded_tied_weights_keys(all_submodels=True).items():
        sites = [(model.get_submodule(path), attribute) for path, _, attribute in (name.rpartition(".") for name in names)]
        held = {site: site[0]._parameters.get(site[1]) for site in sites}
        empty = [site for site, parameter in held.items() if parameter is not None and parameter.is_meta]
        filled = [site for site, parameter in held.items() if parameter is not None and not parameter.is_meta]
        for (module, attribute), source in zip(empty, filled, strict=False):
            module._parameters[attribute] = held[source]
            for shown in floats.values():
                if source in shown.sites:
                    shown.sites.append((module, attribute))


def dequantized(loaded: QuantizedModel) -> LanguageModel:
    """A dense bf16 model with the values of a packed one.

    Raises:
        GradlessError: a layer has a bias, and the architecture has none there.
    """
    dense = _dense_twin(loaded)
    account = Account(loaded.path, dense)
    for path, module in loaded.model.named_modules():
        target = dense.get_submodule(path)
        if isinstance(module, QuantLinear | QuantEmbedding):
            weight = kernels.dequantize(module.packed, module.packed.file_rows, torch.bfloat16)[0]
            order = module.packed.column_order
            target.weight.data = weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)
            account.place(f"{path}.weight", f"{path}.weight")
        persistent = {name: x for name, x in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for attribute, values in {**module._parameters, **persistent}.items():
            name = f"{path}.{attribute}" if path else attribute
            if values is not None and name in account.expected:
                dtype = kept_dtype(dense, name, torch.bfloat16) if values.is_floating_point() else values.dtype
                getattr(target, attribute).data = values.data.to(dtype, copy=True)
                account.place(name, name)
    for name in account.expected:
        if name.endswith(".bias") and name not in account.placed:  # the file's are zeros, or there are none
            dense.get_parameter(name).data.zero_()
            account.place(name, name)
    dense.tie_weights()
    account.settle(dense)
    return dense.requires_grad_(False).eval()


def _dense_twin(loaded: QuantizedModel) -> LanguageModel:
    """A model of the same class, dense and in bf16, with a place for every bias of the packed one."""
    biased = {f"{path}.bias" for path, m in loaded.model.named_modules() if isinstance(m, QuantLinear) and m.bias is not None}
    config = copy.deepcopy(loaded.model.config)  # the class writes into it
    config._attn_implementation = None  # what the class supports
    vars(config).pop("quantization_config", None)
    for switch in (None, *BIAS_SWITCHES):
        if switch is not None and getattr(config, switch, None) is not False:
            continue
        if switch is not None:
            setattr(config, switch, True)
        dense = type(loaded.model)._from_config(config, dtype=torch.bfloat16)
        lacking = biased - dense.state_dict().keys()
        if not lacking:
            return dense
    raise GradlessError(f"{loaded.path} has a bias {min(lacking)}, for which a dense {type(dense).__name__} has no place.")
