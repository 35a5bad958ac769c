"""A transformers model with the packed tensors of a GGUF file.

`gguf_config` reads the configuration. Here the model is made on the meta device, and every tensor of the file is put in the
place that its name says. Nothing is dequantized: `layers` replaces linear layers and embeddings, and only the small float
tensors are copied.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from gradless.formats.account import Account
from gradless.formats.bounded import bounded
from gradless.formats.gguf import GGUFFile
from gradless.formats.gguf_config import Architecture, Statement, architecture
from gradless.formats.gguf_tokenizer import build_tokenizer
from gradless.formats.quantized import QuantizedModel, ShownFloat, packed_layer, place_float, restore_buffers, tie
from gradless.fusing import fuse
from gradless.types import Config, LanguageModel, Tokenizer

MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
"""Name of a tensor outside the layers -> module."""


@bounded(values_a_byte=4)
def load_gguf(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, tokenizer: Tokenizer | None = None) -> QuantizedModel:
    """Load a GGUF file as a transformers model that keeps it packed.

    Args:
        path: of the file.
        dtype: of activations and of each layer's scratch, bf16 or fp32.
        tokenizer: the file's tokenizer, if it is loaded already.

    Raises:
        GradlessError: the file cannot be read, or its metadata or tensors do not fit its architecture here.
    """
    from transformers import AutoModelForCausalLM

    file = GGUFFile.open(path)
    known, stated = architecture(file), Statement(file)
    config = known.configuration(stated)
    places = {name: _place(known, name) for name in file.tensors if name not in stated.tensors}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    _leave_biases_out(model, set(places.values()))
    account = Account(file.path, model)
    restore_buffers(model)
    floats = _fill(file, model, known, places, dtype, account)
    if config.tie_word_embeddings:
        tie(model, floats, dtype)
    notes = account.settle(model)
    fuse(model.requires_grad_(False).eval())
    return QuantizedModel(file, model, tokenizer or build_tokenizer(file.metadata, str(file.path)), floats, notes)


def _place(known: Architecture, name: str) -> str:
    """The parameter that a tensor fills: "blk.0.ffn_up.weight" -> "model.layers.0.mlp.up_proj.weight"."""
    stem, _, attribute = name.rpartition(".")
    if stem.startswith("blk."):
        _, layer, *rest = stem.split(".")
        return f"model.layers.{layer}.{known.modules.get('.'.join(rest), stem)}.{attribute}"
    return f"{MODEL.get(stem, stem)}.{attribute}"


def _leave_biases_out(model: LanguageModel, filled: set[str]) -> None:
    """Remove the biases of linear layers that have none in the file; transformers' setting holds for all layers alike."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and module.bias is not None and f"{path}.bias" not in filled:
            module.register_parameter("bias", None)


def _fill(
    file: GGUFFile, model: LanguageModel, known: Architecture, places: dict[str, str], dtype: torch.dtype, account: Account
) -> dict[str, ShownFloat]:
    """Put every tensor of the file in its place in the model."""
    floats = {}
    modules = dict(model.named_modules())
    for name, place in places.items():
        path, _, attribute = place.rpartition(".")
        module = modules.get(path)
        if module is None or not isinstance(getattr(module, attribute, None), nn.Parameter):
            account.leave(name, file.contents[name], place)
            continue
        account.place(name, place)
        shape = file.tensors[name].shape
        order = _row_order(known, model.config, name, shape[0])
        if name in file.quantized:
            if len(shape) != 2 or attribute != "weight" or not isinstance(module, nn.Linear | nn.Embedding):
                account.unfit(name, f"{name} is quantized but belongs to a {type(module).__name__}")
                continue
            tensor = file.quantized[name]
            tensor.row_order = order
            modules[path] = packed_layer(module, tensor, dtype)
            model.set_submodule(path, modules[path])
        else:
            shown = ShownFloat(file.floats[name], show=_shower(order, known.shifted and name.endswith("norm.weight")))
            place_float(shown, module, attribute, dtype)
            floats[name] = shown
    return floats


def _row_order(known: Architecture, config: Config, name: str, rows: int) -> Tensor | None:
    """The file's row for each row of the model, or None if the order is the same."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(name.split(".")[-2])
    if not known.interleaved or heads is None or rows % (2 * heads):
        return None
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def _shower(order: Tensor | None, shift: bool) -> Callable[[Tensor], Tensor] | None:
    """How the model reads a float tensor: rows reordered, or minus one; None if unchanged."""
    if order is not None:
        return lambda values: values[order.to(values.device)]
    return (lambda values: values.float() - 1) if shift else None
