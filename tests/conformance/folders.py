"""A tiny model's folder in every format, and beside it the dense folder of the weights that it stands for."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from gradless import kernels, run
from gradless.formats.folder import Folder
from gradless.formats.load import load
from gradless.layers import is_plain
from gradless.training.options import RunOptions
from tests.checkpoint_folders import quantized_folder
from tests.conformance.architectures import tiny_model
from tests.tiny import MERGES, VOCABULARY

OURS = {
    "gradless int8": {"bits": 8},
    "gradless int4": {"bits": 4},
    "gradless fp8": {"grid": "fp8", "group_size": "channel"},
    "gradless nf4": {"grid": "nf4"},
}
"""What `gradless quantize` is told."""
OTHERS = {
    "GPTQ": "gptq-4 in act-order",
    "AWQ": "awq",
    "AutoRound": "autoround",
    "bitsandbytes NF4": "nf4, nested",
    "bitsandbytes INT8": "int8",
    "AQLM": "aqlm 2x8",
}
"""Other tools' formats, by their names in `checkpoint_folders`."""
ALL = ("dense", *OURS, *OTHERS)


class Absent(Exception):
    """A format that no tool could write this model in."""


WEIGHTS = "model.safetensors"


def write(kind: str, name: str, folder: Path) -> tuple[Path, Any]:
    """A tiny model in a format, and transformers' own model of the weights that it stands for, in fp32.

    Raises:
        GradlessError: the format cannot hold it.
    """
    dense = _dense(kind, folder / "dense")
    base = folder / "base"
    if name == "dense":
        return dense, judge(dense)
    if name in OURS:
        run.quantize(load(dense), base, RunOptions(**OURS[name]))
        model = judge(dense)
        for key, weight in _own_weights(base).items():
            model.get_parameter(key).data = weight
        return base, model
    linear = _matrices(dense)
    weights = quantized_folder(dense, base, OTHERS[name], chosen=lambda key, _: key in linear)
    meant = folder / "meant"
    shutil.copytree(dense, meant)
    tensors = load_file(dense / WEIGHTS) | {key: weight.float().contiguous() for key, weight in weights.items()}
    save_file(tensors, meant / WEIGHTS, metadata={"format": "pt"})
    return base, judge(meant)


def judge(dense: Path) -> Any:
    """transformers' own model of a dense folder, in fp32, by its plainest attention."""
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32, attn_implementation="eager").eval()


def _dense(kind: str, folder: Path) -> Path:
    model = copy.deepcopy(tiny_model(kind)).to(torch.bfloat16)
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return folder


def _tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    merges = [tuple(merge.split(" ")) for merge in MERGES]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(VOCABULARY)}, merges))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made)  # a Trainer writes special tokens into the configuration


def _matrices(dense: Path) -> set[str]:
    """The matrices that other tools quantize: of linear layers and of experts, where their sizes allow it.

    Raises:
        Absent: there is none.
    """
    model = judge(dense)
    head = model.get_output_embeddings()
    layers = [
        f"{path}.weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and is_plain(module)
    ]
    linear = {_last(name) for name in layers}  # the first part of a name may be another in the file
    found = {
        key
        for key, tensor in load_file(dense / WEIGHTS).items()
        if key.endswith(".weight") and (_last(key) in linear or ".experts." in key) and _fits(tensor)
    }
    if not found:
        raise Absent("there is no linear layer in it that the format could hold")
    return found


def _last(name: str) -> str:
    """The end of a tensor's name: "layers.0.mlp.up_proj.weight"."""
    return ".".join(name.split(".")[-5:])


def _fits(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[1] % 64 == 0 and tensor.shape[0] % 32 == 0


def _own_weights(base: Path) -> dict[str, Tensor]:
    """What the packed matrices of our own folder stand for, by the reference's plain arithmetic."""
    found = {}
    for name, tensor in Folder.open(base).quantized.items():
        found[name] = kernels.reference.dequantize(tensor, torch.arange(tensor.rows), torch.float32)[0]
    return found
