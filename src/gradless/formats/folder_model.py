"""A transformers model around the packed tensors of a folder."""

from __future__ import annotations

from pathlib import Path

import torch

from gradless.errors import GradlessError
from gradless.formats.folder import Folder, unbuildable
from gradless.formats.quantized import QuantizedModel, ShownFloat, packed_layer, place_float, restore_buffers
from gradless.fusing import fuse


def load_folder(path: str | Path, *, dtype: torch.dtype = torch.bfloat16, trust_remote_code: bool = False) -> QuantizedModel:
    """Load a folder of packed weights as a transformers model that keeps them packed.

    Args:
        path: of the folder; see `Folder.open`.
        dtype: of activations and of what weights are unpacked to, bf16 or fp32.
        trust_remote_code: let the folder run its own Python.

    Raises:
        GradlessError: the folder cannot be read, or its tensors do not fit its config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    file = Folder.open(path)
    trusted = {"trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, **trusted)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, **trusted)
    except (ValueError, OSError, KeyError) as error:
        raise GradlessError(unbuildable(path, error)) from error
    restore_buffers(model)
    floats = {name: ShownFloat(values) for name, values in file.floats.items()}
    try:
        for name, tensor in file.quantized.items():
            module = name.removesuffix(".weight")
            model.set_submodule(module, packed_layer(model.get_submodule(module), tensor, dtype))
        for name, shown in floats.items():
            module, _, attribute = name.rpartition(".")
            place_float(shown, model.get_submodule(module), attribute, dtype)
    except AttributeError as error:
        raise GradlessError(f"{path} has a tensor {name}, for which its config.json has no place: {error}.") from error
    model.tie_weights()
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing:
        raise GradlessError(f"{path} has no tensor for {missing[0]}; it does not fit its config.json.")
    fuse(model.requires_grad_(False).eval())
    return QuantizedModel(file, model, AutoTokenizer.from_pretrained(path, local_files_only=True, **trusted), floats)
