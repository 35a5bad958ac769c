"""A transformers model around the packed tensors of a GGUF file.

The architecture, its configuration, the names and the row orders are transformers' own; nothing is dequantized. The model
is made on the meta device and its linear layers and embeddings are replaced by `layers`; only the small float tensors get
memory of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradless.errors import GradlessError
from gradless.formats.account import Account
from gradless.formats.gguf import GGUFFile
from gradless.formats.quantized import QuantizedModel, ShownFloat, packed_layer, place_float, restore_buffers, tie
from gradless.fusing import fuse

IGNORED = ("rope_freqs",)
"""Tensors that transformers derives from the configuration instead."""


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer that a GGUF file holds."""
    from transformers import AutoTokenizer

    path = Path(path)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True, trust_remote_code=False)


def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, tokenizer: Any = None) -> QuantizedModel:
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
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        names = get_gguf_hf_weights_map(model, processor)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise _unsupported(file, f"transformers cannot build it: {error}") from error
    account = Account(file.path, model)
    restore_buffers(model)
    floats = _place(file, model, names, processor, dtype, account)
    if config.tie_word_embeddings:
        tie(model, floats, dtype)
    notes = account.settle(model)
    fuse(model.requires_grad_(False).eval())
    return QuantizedModel(file, model, tokenizer or load_tokenizer(path), floats, notes)


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
        config = AutoConfig.from_pretrained(
            str(file.path.parent), gguf_file=file.path.name, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, NotImplementedError) as error:
        raise _unsupported(file, f"transformers cannot read its configuration: {error}") from error
    return config, TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(config=config.to_dict())


def _place(
    file: GGUFFile, model: Any, names: dict[str, str], processor: Any, dtype: torch.dtype, account: Account
) -> dict[str, ShownFloat]:
    """Put every tensor of the file where it belongs in the model."""
    floats = {}
    for name, info in file.tensors.items():
        if name not in names:
            if not name.startswith(IGNORED):
                account.leave(name, file.contents[name])
            continue
        account.place(name, names[name])
        path, _, attribute = names[name].rpartition(".")
        module = model.get_submodule(path)
        if name in file.quantized:
            tensor = file.quantized[name]
            if len(info.shape) != 2 or attribute != "weight" or not isinstance(module, (nn.Linear, nn.Embedding)):
                raise _unsupported(file, f"{name} is quantized but belongs to a {type(module).__name__}")
            tensor.row_order = _row_order(file, processor, name, info.shape[0])
            model.set_submodule(path, packed_layer(module, tensor, dtype))
        else:
            shown = ShownFloat(file.floats[name], show=_shower(processor, name))
            place_float(shown, module, attribute, dtype)
            floats[name] = shown
    return floats


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
