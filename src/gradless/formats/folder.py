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
from gradless.formats.checkpoint import TYPES, Blocks, Checkpoint, Layout, TensorInfo, patch

LAYOUTS: dict[str, Callable[[dict[str, Any]], Layout]] = {
    "gptq": gptq.GPTQ.from_config,
    "aqlm": aqlm.AQLM.from_config,
    "awq": awq.AWQ.from_config,
    "auto-round": autoround.from_config,
    "bitsandbytes": bitsandbytes.from_config,
}
"""Layouts by quant_method; each is made from config.json's `quantization_config`."""
SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Files of settings that older tools write beside config.json, or instead of its `quantization_config`, and whose they are."""
FOREIGN = {"hf_quant_config.json": "modelopt", "quanto_qmap.json": "quanto", "quantization_map.json": "quanto"}
"""Files that other tools write, whose formats gradless does not read."""
SAME = ("bits", "group_size", "sym", "desc_act", "w_bit", "q_group_size", "zero_point", "version")
"""Settings that must not differ where they stand in two files."""
MATTERS = (
    *("config.json", *SETTINGS, "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "*.py"),
)
"""Which files beside the weights change what a folder's model computes, or which tokens it reads."""
FORMAT = "gradless-packed"
"""Where the metadata of our own packed folders name the block types: JSON, weight name -> block type."""
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
ADAPTER = "adapter_config.json"
"""What PEFT's folders hold."""
BLOBS = "blobs"
"""Where the Hub's cache holds a repository's files, beside its snapshots of links."""


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
        tensors, metadata = read_headers(path)
        types: dict[str, str] = {}
        for each in metadata:
            types |= json.loads(each.get(FORMAT, "{}"))
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
        try:
            layout = LAYOUTS[method](config)
        except GradlessError as error:
            raise GradlessError(f"{path}: {error}") from error
        found = cls(path, tensors, layout)
        if not found.quantized:
            raise GradlessError(
                f"{path} is quantized by {method}, as its settings say, but no tensor of it is; "
                "take the settings away if it is a dense model, or download it again."
            )
        return found

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

    def identity(self) -> dict[str, str]:
        return identity(self.path)

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
    """A quantizer's settings with their `quant_method`: config.json's `quantization_config`, or another tool's file; or None.

    Raises:
        GradlessError: they are no mapping, or two files contradict each other.
    """
    file = path / "config.json"
    config = read_json(file) if file.is_file() else {}
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    beside = {name: read_json(path / name) for name in SETTINGS if (path / name).is_file()}
    if found is not None and not isinstance(found, dict):
        raise GradlessError(f"{file} has a quantization_config that is no mapping of settings; download it again.")
    if found:
        for name, settings in beside.items():
            for key in SAME:
                if key in found and key in settings and found[key] != settings[key]:
                    raise GradlessError(
                        f"{path}: {key} is {found[key]!r} in config.json, but {settings[key]!r} in {name}; "
                        "take the wrong one away."
                    )
        return found
    for name, settings in beside.items():
        return {"quant_method": SETTINGS[name]} | settings
    if config.get("compression_config"):
        return {"quant_method": "compressed-tensors"}
    if config.get("quantization"):
        return {"quant_method": "mlx"}
    return next(({"quant_method": tool} for name, tool in FOREIGN.items() if (path / name).is_file()), None)


def identity(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder that matters to its model, by its name: weights, configuration, tokenizer.

    Raises:
        GradlessError: weights are missing.
    """
    files = {*weight_files(path), *(file for pattern in MATTERS for file in path.glob(pattern) if file.is_file())}
    return {file.name: sha256(file) for file in sorted(files)}


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
    """A folder's safetensors: the shards that its index names, or model.safetensors, or all that there are.

    Raises:
        GradlessError: a file is missing or lies elsewhere, all there is are pickles, or an adapter is there.
    """
    if (path / ADAPTER).is_file():
        raise GradlessError(
            f"{path} holds an adapter ({ADAPTER}); give the model that it is for, and the adapter's own folder to "
            "gradless eval --adapter, or merge it."
        )
    index = path / INDEX
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
            raise GradlessError(f"{index} has no weight_map of tensors to files; download it again.")
        names = set(shards.values())
        if (path / WEIGHTS).is_file() and WEIGHTS not in names:
            raise GradlessError(f"{path} holds {WEIGHTS} and an index that does not name it; take the wrong one away.")
        files = [_inside(path, name) for name in sorted(names)]
        for file in files:
            if not file.is_file():
                raise GradlessError(f"{file} is missing, though {INDEX} names it; download or copy it again.")
        return files
    if (path / WEIGHTS).is_file():
        return [_inside(path, WEIGHTS)]
    files = [_inside(path, file.name) for file in sorted(path.glob("*.safetensors"))]
    if not files:
        pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern))
        if pickles:
            raise GradlessError(
                f"{path} holds its weights as a pickle ({pickles[0]}), which could run any program and is not opened; "
                "convert it to safetensors."
            )
        raise GradlessError(f"{path} holds no *.safetensors; give the folder of a model.")
    return files


def unread(path: Path) -> list[str]:
    """What a user should know of safetensors in a folder that are no part of its model, in sentences."""
    names = sorted({file.name for file in path.glob("*.safetensors")} - {file.name for file in weight_files(path)})
    return [f"{path / name} holds tensors, but the model's are in other files; it is not read" for name in names]


def _inside(path: Path, name: str) -> Path:
    """A file of a folder, by its plain name.

    Raises:
        GradlessError: the name leads, or the file is a link, out of the folder; the Hub's cache links to its blobs.
    """
    if Path(name).name != name or name in (".", ".."):
        raise GradlessError(f"{path} names weights in {name!r}, which is no file of that folder; copy them into it.")
    place, home = (path / name).resolve(), path.resolve()
    if place.parent not in (home, home.parent.parent / BLOBS):
        raise GradlessError(f"{path / name} is a link out of its folder, to {place}; copy the file into the folder.")
    return path / name


def unbuildable(path: str | Path, error: Exception) -> str:
    """Why transformers cannot build a folder's model, in a sentence."""
    if "trust_remote_code" in str(error):
        return f"{path} brings Python of its own, which is not run unless you trust it (--trust-remote-code)."
    return f"transformers cannot build the model in {path}: {error}"


def read_headers(path: Path) -> tuple[dict[str, TensorInfo], list[dict[str, str]]]:
    """The tensors of a folder, and the metadata of each of its files.

    Raises:
        GradlessError: a file cannot be read, a tensor is in two files, or one that the index names is in none.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata = []
    for file in weight_files(path):
        more, about = read_header(file)
        if twice := tensors.keys() & more.keys():
            name = min(twice)
            raise GradlessError(f"{path} holds {name} twice, in {tensors[name].file.name} and in {file.name}; take one away.")
        tensors |= more
        metadata.append(about)
    if (path / INDEX).is_file() and (lacking := read_json(path / INDEX)["weight_map"].keys() - tensors.keys()):
        raise GradlessError(f"{path} lacks {len(lacking)} tensors that {INDEX} names ({min(lacking)}); download it again.")
    return tensors, metadata


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
