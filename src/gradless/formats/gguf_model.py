"""A transformers model around the packed tensors of a GGUF file.

The architecture, its configuration, the names and the row orders are transformers' own; nothing is dequantized. The model
is made on the meta device and its linear layers and embeddings are replaced by `layers`; only the small float tensors get
memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.errors import GradlessError
from gradless.files import sha256
from gradless.formats.gguf import NOT_LINEAR, GGUFFile
from gradless.layers import QuantEmbedding, QuantLinear, file_rows
from gradless.spaces import BlockSpace, CodeSpace, DenseSpace, Space
from gradless.tensor import QuantTensor

NOT_SET = (0, float("nan"))
IGNORED = ("rope_freqs",)
"""Tensors that transformers derives from the configuration instead."""


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
class GGUFModel:
    """A GGUF file and, around its packed weights, a transformers causal language model.

    A replay needs the file alone: it leaves `model`, `tokenizer` and the places in `floats` out.
    """

    file: GGUFFile
    model: Any = None
    tokenizer: Any = None
    floats: dict[str, ShownFloat] = field(default_factory=dict)

    output_name = "model.gguf"
    quantized = True

    @property
    def path(self) -> Path:
        return self.file.path

    def fingerprint(self) -> str:
        """The file's SHA-256."""
        return sha256(self.file.path)

    @property
    def tuned(self) -> list[QuantTensor]:
        """The packed tensors whose block values are being tuned."""
        return [tensor for tensor in self.file.quantized.values() if tensor.master is not None]

    def tunable(self) -> dict[str, list[str]]:
        """Names of what can be searched, by kind: block values or codes of linear layers, float tensors, norms and biases."""
        floats = [name for name in self.floats if not name.startswith(NOT_LINEAR)]
        vectors = [name for name in floats if self.floats[name].values.ndim == 1]
        linear = self.file.linear_layers()
        return {"blocks": linear, "codes": linear, "floats": floats, "vectors": vectors}

    def spaces(
        self, kind: str, names: list[str], *, part: str = "scale", relative: bool = True, clamp: bool = False, **_: Any
    ) -> list[Space]:
        """Spaces over the named tensors of one kind; float tensors are tuned in fp32 masters of their own."""
        if kind == "blocks":
            return [BlockSpace(self.file.quantized[name], part, relative=relative) for name in names]
        if kind == "codes":
            return [CodeSpace(self.file.quantized[name], clamp=clamp) for name in names]
        found: list[Space] = []
        for name in names:
            shown = self.floats.get(name) or ShownFloat(self.file.floats[name])
            found.append(DenseSpace(name, shown.values.float().clone(), shown.sites, shown.show))
        return found

    def save(self, path: Path, spaces: list[Space]) -> None:
        """Write a copy of the file with what the spaces tuned."""
        self.file.export(path, {space.name: space.values for space in spaces if isinstance(space, DenseSpace)})


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that a GGUF file holds."""
    from transformers import AutoTokenizer

    path = Path(path)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, tokenizer: Any = None) -> GGUFModel:
    """Load a GGUF file as a transformers model that keeps it packed.

    Args:
        path: of the file.
        dtype: of activations and of each layer's scratch, bf16 or fp32.
        tokenizer: the file's tokenizer, where it is loaded already.

    Raises:
        GradlessError: the file cannot be read, or transformers does not map its architecture.
    """
    file = GGUFFile.open(path)
    config, processor = _configure(file)
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        names = get_gguf_hf_weights_map(model, processor)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise _unsupported(file, f"transformers cannot build it: {error}") from error
    _restore_buffers(model)
    floats = _place(file, model, names, processor, dtype)
    if config.tie_word_embeddings:
        _tie(model, floats, dtype)
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise _unsupported(file, f"its file has no tensor for {missing[0]}")
    model.requires_grad_(False).eval()
    return GGUFModel(file, model, tokenizer or load_tokenizer(path), floats)


def _unsupported(file: GGUFFile, why: str) -> GradlessError:
    return GradlessError(
        f"{file.path}: the architecture {file.architecture} is not supported: {why}. "
        "Known to work: llama, qwen2, qwen3, gemma3."
    )


def _configure(file: GGUFFile) -> tuple[Any, Any]:
    """transformers' configuration of the file, and its processor of the file's tensors."""
    from transformers import AutoConfig
    from transformers.modeling_gguf_pytorch_utils import (
        GGUF_SUPPORTED_ARCHITECTURES,
        TENSOR_PROCESSORS,
        TensorProcessor,
    )

    if file.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise _unsupported(file, "transformers does not map it")
    try:
        config = AutoConfig.from_pretrained(str(file.path.parent), gguf_file=file.path.name, local_files_only=True)
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unsupported(file, f"transformers cannot read its configuration: {error}") from error
    return config, TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())


def _restore_buffers(model: Any) -> None:
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


def _place(file: GGUFFile, model: Any, names: dict[str, str], processor: Any, dtype: torch.dtype) -> dict[str, ShownFloat]:
    """Put every tensor of the file where it belongs in the model."""
    floats = {}
    for name, info in file.tensors.items():
        if name not in names:
            if not name.startswith(IGNORED):
                raise _unsupported(file, f"transformers has no place for {name}")
            continue
        path, _, attribute = names[name].rpartition(".")
        module = model.get_submodule(path)
        if name in file.quantized:
            tensor = file.quantized[name]
            if len(info.shape) != 2 or attribute != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
                raise _unsupported(file, f"{name} is quantized but belongs to a {type(module).__name__}")
            tensor.row_order = _row_order(file, processor, name, info.shape[0])
            model.set_submodule(path, _packed_layer(module, tensor, dtype))
        else:
            shown = ShownFloat(file.floats[name], show=_shower(processor, name))
            _show(shown, module, attribute, dtype)
            floats[name] = shown
    return floats


def _packed_layer(module: nn.Linear | nn.Embedding, tensor: QuantTensor, dtype: torch.dtype) -> nn.Module:
    if isinstance(module, nn.Linear):
        return QuantLinear(tensor, module.bias, dtype)
    return QuantEmbedding(tensor, getattr(module, "embed_scale", None), dtype)


def _show(shown: ShownFloat, module: nn.Module, attribute: str, dtype: torch.dtype) -> None:
    values = (shown.show(shown.values) if shown.show else shown.values).to(dtype)
    parameter = getattr(module, attribute)
    if parameter.shape != values.shape:
        raise GradlessError(f"tensor shape {tuple(values.shape)} does not fit {attribute} {tuple(parameter.shape)}.")
    setattr(module, attribute, nn.Parameter(values, requires_grad=False))
    shown.sites.append((module, attribute))


def _process(processor: Any, name: str, weights: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    result = processor.process(weights=weights, name=name, tensor_key_mapping={}, parsed_parameters={"tensors": {}})
    return np.asarray(result.weights)


def _row_order(file: GGUFFile, processor: Any, name: str, rows: int) -> Tensor | None:
    """Which file row each model row is, read off transformers' own transform of two columns of row numbers."""
    number = np.arange(rows, dtype=np.float64)
    try:
        shown = _process(processor, name, np.stack([number, number + 0.5], axis=1))
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise _unsupported(file, f"transformers rearranges {name} in a way that packed rows cannot follow") from error
    if shown.shape != (rows, 2) or not np.array_equal(np.sort(shown[:, 0]), number) or (np.diff(shown) != 0.5).any():
        raise _unsupported(file, f"transformers changes the values of {name}, which packed rows cannot follow")
    return None if np.array_equal(shown[:, 0], number) else torch.from_numpy(shown[:, 0].astype(np.int64))


def _shower(processor: Any, name: str) -> Callable[[Tensor], Tensor]:
    def show(values: Tensor) -> Tensor:
        return torch.from_numpy(np.array(_process(processor, name, values.float().cpu().numpy()))).to(values.device)

    return show


def _tie(model: Any, floats: dict[str, ShownFloat], dtype: torch.dtype) -> None:
    """Let the head read the embedding's tensor."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, QuantEmbedding):
        model.set_output_embeddings(QuantLinear(embedding.packed, head.bias, dtype))
    elif isinstance(head.weight, nn.Parameter) and head.weight.is_meta:
        head.weight = embedding.weight
        for shown in floats.values():
            if (embedding, "weight") in shown.sites:
                shown.sites.append((head, "weight"))


def dequantized(loaded: GGUFModel) -> Any:
    """A dense bf16 model with the values of a packed one."""
    from transformers import AutoModelForCausalLM

    dense = AutoModelForCausalLM.from_config(loaded.model.config, dtype=torch.bfloat16)
    for path, module in loaded.model.named_modules():
        target = dense.get_submodule(path)
        if isinstance(module, QuantLinear | QuantEmbedding):
            target.weight.data = kernels.dequantize(module.packed, file_rows(module.packed), torch.bfloat16)
        for name, parameter in module.named_parameters(recurse=False):
            getattr(target, name).data = parameter.data.to(torch.bfloat16, copy=True)
    dense.tie_weights()
    return dense.requires_grad_(False).eval()
