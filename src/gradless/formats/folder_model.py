"""A transformers model with the packed tensors of a folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from gradless.formats.account import Account
from gradless.formats.bounded import bounded
from gradless.formats.folder import Folder, unread
from gradless.formats.quantized import (
    QuantizedModel,
    ShownFloat,
    kept_dtype,
    packed_layer,
    place_float,
    restore_buffers,
    tie,
)
from gradless.fusing import fuse
from gradless.layers import QuantLinear
from gradless.types import LanguageModel


@bounded(values_a_byte=16)
def load_folder(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False) -> QuantizedModel:
    """Load a folder of packed weights as a transformers model that keeps them packed.

    Args:
        path: of the folder; see `Folder.open`.
        dtype: of activations and of unpacked weights, bf16 or fp32.
        trust_remote_code: allow the folder to run its own Python code.

    Raises:
        GradlessError: the folder cannot be read, or its tensors do not fit its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = Folder.open(path)
    trusted = {"trust_remote_code": trust_remote_code}
    config = AutoConfig.from_pretrained(path, local_files_only=True, **trusted)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trusted)
    account = Account(file.path, model)
    restore_buffers(model)
    floats = _place(file, model, account, dtype)
    if account.own_head():
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    if account.tied:
        tie(model, floats, dtype)
    notes = [*unread(file.path), *account.settle(model)]
    fuse(model.requires_grad_(False).eval())
    return QuantizedModel(file, model, AutoTokenizer.from_pretrained(path, local_files_only=True, **trusted), floats, notes)


def _place(file: Folder, model: LanguageModel, account: Account, dtype: torch.dtype) -> dict[str, ShownFloat]:
    """Put every tensor of the folder in its place in the model."""
    modules = dict(model.named_modules())
    packed = set()
    for name, tensor in file.quantized.items():
        path = name.removesuffix(".weight")
        packed |= {info.name for info in file.parts(name).values()}
        if isinstance(module := modules.get(path), nn.Linear | nn.Embedding):
            account.place(name, name)
            modules[path] = packed_layer(module, tensor, dtype)
            model.set_submodule(path, modules[path])
        else:
            account.leave(name)
    floats = {}
    for name, values in file.contents.items():
        if name in packed:
            continue
        path, _, attribute = name.rpartition(".")
        module = modules.get(path)
        own = getattr(module, attribute, None)
        expected = isinstance(own, Tensor) and name in account.expected
        if module is None or not (expected or _is_a_bias(module, attribute, values)):
            account.leave(name, values)
        elif own is not None and (own.shape != values.shape or own.is_floating_point() != values.is_floating_point()):
            what = f"{values.dtype} {tuple(values.shape)}, where the model has {own.dtype} {tuple(own.shape)}"
            account.unfit(name, f"{name} in {what}")
        elif own is not None and attribute in module._buffers:
            module._buffers[attribute] = values.to(own.dtype, copy=True)
            account.place(name, name)
        else:
            floats[name] = ShownFloat(values)
            place_float(floats[name], module, attribute, kept_dtype(model, name, dtype))
            account.place(name, name)
    return floats


def _is_a_bias(module: nn.Module, attribute: str, values: Tensor) -> bool:
    """Whether the values are a bias, not all zero, for a packed layer that has none in the architecture."""
    fits = attribute == "bias" and isinstance(module, QuantLinear) and values.shape == (module.out_features,)
    return fits and values.is_floating_point() and bool(values.any())
