"""Folders of safetensors, in one file or in shards, whose linear layers are packed: by gradless or by another tool.

A format is a `Layout` in a file of its own and a line in `LAYOUTS`, by the `quant_method` of the folder's config.json.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gradless.blocks import block_type
from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats import aqlm, autoround, awq, bitsandbytes, gptq
from gradless.formats.checkpoint import Blocks, Checkpoint, Layout, patch
from gradless.readers.json import mapping, parse_object, read_object, shown_value
from gradless.readers.safetensors import read_header
from gradless.readers.sentences import damaged, shown
from gradless.readers.tensors import TensorInfo

LAYOUTS: dict[str, Callable[[dict[str, Any]], Layout]] = {
    "gptq": gptq.GPTQ.from_config,
    "aqlm": aqlm.AQLM.from_config,
    "awq": awq.AWQ.from_config,
    "auto-round": autoround.from_config,
    "bitsandbytes": bitsandbytes.from_config,
}
"""Layouts by quant_method; each is made from config.json's `quantization_config`."""
FORMAT = "gradless-packed"
"""Where the metadata of our own packed folders name the block types: JSON, weight name -> block type."""
ROWS = ("group_size", "q_group_size")
SETTINGS = dict.fromkeys(ROWS, (1, 1 << 20)) | {
    "bits": (1, 32),
    "w_bit": (1, 32),
    "num_codebooks": (1, 256),
    "nbits_per_codebook": (1, 16),
    "in_group_size": (1, 1 << 10),
    "out_group_size": (1, 1 << 10),
}
"""What numbers of a `quantization_config` can be; those of `ROWS` also -1, for a group a row."""
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"


@dataclass
class Folder(Checkpoint):
    """A folder with a config.json, a tokenizer and packed weights."""

    output_name = "model"

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Map a folder's weights.

        Raises:
            GradlessError: weights are missing, truncated or in a pickle; the format is not supported, or its tensors contradict
                each other.
        """
        path = Path(path)
        tensors: dict[str, TensorInfo] = {}
        types: dict[str, str] = {}
        for file in weight_files(path):
            more, metadata = read_header(file)
            if twice := tensors.keys() & more.keys():
                raise GradlessError(f"{path} holds the tensor {shown(min(twice))} in two files; download or copy it again.")
            types |= _packed_types(file, metadata)
            tensors |= more
        if types:
            return cls(
                path, {name: _in_blocks(info, types) for name, info in tensors.items()}, Blocks(types, "packed by gradless")
            )
        config = quantization(path)
        if config is None:
            raise GradlessError(f"{path} is not quantized; give a quantized folder.")
        method = str(config.get("quant_method"))
        if method not in LAYOUTS:
            raise GradlessError(f"{path} is quantized by {method}; supported are GGUF files and {', '.join(LAYOUTS)}.")
        return cls(path, tensors, LAYOUTS[method](config))

    @property
    def architecture(self) -> str:
        return str(read_config(self.path).get("model_type", "unknown"))

    @property
    def title(self) -> str:
        return self.path.name

    @property
    def files(self) -> list[Path]:
        """The files of weights."""
        return sorted({info.file for info in self.tensors.values()})

    def fingerprint(self) -> str:
        hashes = [sha256(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def export(self, path: Path, floats: Mapping[str, Tensor] | None = None) -> None:
        with replacing(path) as temporary:
            shutil.copytree(self.path, temporary)
            for info, content in self.changes(floats or {}):
                patch(temporary / info.file.name, info, content)


def is_quantized(path: Path) -> bool:
    """Whether a folder's linear layers are packed, by whatever tool."""
    if quantization(path) is not None:
        return True
    return any(FORMAT in read_header(file)[1] for file in sorted(path.glob("*.safetensors")))


def quantization(path: Path) -> dict[str, Any] | None:
    """config.json's `quantization_config`, or None.

    Raises:
        GradlessError: it is no object, or a setting that layouts read is not what it must be.
    """
    if not (path / "config.json").is_file():
        return None
    settings = mapping(read_config(path), "quantization_config", str(path / "config.json"))
    for name, (least, most) in SETTINGS.items():
        value = settings.get(name, least)
        if type(value) is not int or not (least <= value <= most or (value == -1 and name in ROWS)):
            raise GradlessError(
                f"{path / 'config.json'}: {name} is {shown_value(value)}; it is a whole number from {least} to {most}"
                f"{', or -1 for whole rows' * (name in ROWS)}."
            )
    for name in ("dynamic", "extra_config"):
        mapping(settings, name, str(path / "config.json"), of=lambda own: isinstance(own, dict), what="an object")
    return settings or None


def read_config(path: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        GradlessError: it cannot be read, or is no JSON object.
    """
    return read_object(path / "config.json", infinities=True)


def weight_files(path: Path) -> list[Path]:
    """A folder's safetensors: one file, or the shards that its index names.

    Raises:
        GradlessError: a file is missing, or all there is are pickles.
    """
    if (path / INDEX).is_file():
        index = mapping(read_object(path / INDEX), "weight_map", str(path / INDEX), of=_is_name, what="the name of a file")
        if not index:
            raise GradlessError(f"{path / INDEX} names no weights; download or copy it again.")
        shards = sorted({path / name for name in index.values()})
        for shard in shards:
            if not shard.is_file():
                raise GradlessError(f"{shard} is missing, though {INDEX} names it; download or copy it again.")
        return shards
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise GradlessError(
                f"{path} holds its weights as a pickle ({pickles[0]}), which could run any program and is not opened; "
                "convert it to safetensors."
            )
        raise GradlessError(f"{path} holds no *.safetensors; give the folder of a model.")
    return files


def unbuildable(path: str | Path, error: Exception) -> str:
    """Why transformers cannot build a folder's model, in a sentence."""
    if "trust_remote_code" in str(error):
        return f"{path} brings Python of its own, which is not run unless you trust it (--trust-remote-code)."
    return f"transformers cannot build the model in {path}: {error}"


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value != ""


def _packed_types(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """The block types that a file of ours names: weight name -> block type; none in a file that is not ours."""
    if FORMAT not in metadata:
        return {}
    where = f"{file}: its {FORMAT}"
    types = parse_object(metadata[FORMAT].encode(), where, file.stat().st_size)
    return mapping({FORMAT: types}, FORMAT, str(file), of=lambda kind: isinstance(kind, str), what="a block type")


def _in_blocks(info: TensorInfo, types: dict[str, str]) -> TensorInfo:
    """The place of one of our own packed matrices, or of what is none."""
    if info.name not in types:
        return info
    kind = types[info.name]
    try:
        block = block_type(kind)
    except KeyError as error:
        raise GradlessError(
            f"{info.file}: {shown(info.name)} has type {shown(kind)}, which this gradless does not know."
        ) from error
    if info.type != "U8" or len(info.shape) != 3 or info.shape[2] != block.nbytes or not all(info.shape):
        held = f"{info.type} of {' x '.join(map(str, info.shape))}"
        raise damaged(info.file, f"{shown(info.name)} is {held}, and no rows of blocks of {block.nbytes} bytes ({kind})")
    return TensorInfo(info.name, kind, (info.shape[0], info.shape[1] * block.size), info.file, info.offset, info.nbytes)
