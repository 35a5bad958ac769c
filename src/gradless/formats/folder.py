"""Folders of safetensors, in one file or in shards, whose linear layers are packed: by gradless or by another tool.

A format is a `Layout` in a file of its own and a line in `LAYOUTS`, by the `quant_method` of the folder's config.json.
"""

from __future__ import annotations

import hashlib
import json
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
from gradless.readers.tensors import TYPES, TensorInfo

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
            types |= json.loads(metadata.get(FORMAT, "{}"))
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
        return str(read_json(self.path / "config.json").get("model_type", "unknown"))

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
    """config.json's `quantization_config`, or None."""
    file = path / "config.json"
    return read_json(file).get("quantization_config") if file.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object.

    Raises:
        GradlessError: it holds none.
    """
    try:
        content = json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GradlessError(f"{path} is not JSON ({error}); copy it again.") from error
    if not isinstance(content, dict):
        raise GradlessError(f"{path} is no JSON object; copy it again.")
    return content


def weight_files(path: Path) -> list[Path]:
    """A folder's safetensors: one file, or the shards that its index names.

    Raises:
        GradlessError: a file is missing, or all there is are pickles.
    """
    if (path / INDEX).is_file():
        shards = sorted({path / name for name in read_json(path / INDEX).get("weight_map", {}).values()})
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


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        GradlessError: it is none, or is truncated, or holds a type that gradless does not know.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= size - 8:
            raise GradlessError(f"{path} is not a safetensors file, or is truncated; copy it again.")
        try:
            content: dict[str, Any] = json.loads(file.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise GradlessError(f"{path} is not a safetensors file ({error}); copy it again.") from error
    metadata: dict[str, str] = content.pop("__metadata__", {})
    tensors, start = {}, 8 + length
    for name, entry in content.items():
        begin, end = entry["data_offsets"]
        if start + end > size:
            raise GradlessError(f"{path} is truncated: it has {size} bytes, but {name} ends at {start + end}; copy it again.")
        if entry["dtype"] not in TYPES:
            raise GradlessError(f"{path}: {name} has type {entry['dtype']}; known are {', '.join(TYPES)}.")
        tensors[name] = TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, start + begin, end - begin)
    return tensors, metadata


def _in_blocks(info: TensorInfo, types: dict[str, str]) -> TensorInfo:
    """The place of one of our own packed matrices, or of what is none."""
    if info.name not in types:
        return info
    kind = types[info.name]
    try:
        shape = (info.shape[0], info.shape[1] * block_type(kind).size)
    except KeyError as error:
        raise GradlessError(f"{info.file}: {info.name} has type {kind}, which this gradless does not know.") from error
    return TensorInfo(info.name, kind, shape, info.file, info.offset, info.nbytes)
