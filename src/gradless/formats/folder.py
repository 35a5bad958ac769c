"""Folders of safetensors, whole or in shards, with packed linear layers, from gradless or from another tool.

A format is a `Layout` in its own file and a line in `LAYOUTS`, under the `quant_method` of the folder's config.json.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from gradless.blocks import block_type
from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats import aqlm, autoround, awq, bitsandbytes, gptq
from gradless.formats.checkpoint import Blocks, Checkpoint, Layout, patch
from gradless.readers.json import is_object, is_text, mapping, parse_object, read_object, shown_value
from gradless.readers.safetensors import read_header
from gradless.readers.sentences import damaged, shown
from gradless.readers.tensors import TensorInfo

LAYOUTS: dict[str, Callable[[Mapping[str, object]], Layout[Any]]] = {
    "gptq": gptq.GPTQ.from_config,
    "aqlm": aqlm.AQLM.from_config,
    "awq": awq.AWQ.from_config,
    "auto-round": autoround.from_config,
    "bitsandbytes": bitsandbytes.from_config,
}
"""quant_method -> a function that makes the layout from config.json's `quantization_config`."""
SETTINGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
"""Settings file of an older tool, beside config.json or in place of its `quantization_config` -> that tool's quant_method."""
FOREIGN = {"hf_quant_config.json": "modelopt", "quanto_qmap.json": "quanto", "quantization_map.json": "quanto"}
"""File of a tool whose format gradless does not read -> the tool."""
SAME = ("bits", "group_size", "sym", "desc_act", "w_bit", "q_group_size", "zero_point", "version")
"""Settings that must be equal if two files have them."""
MATTERS = (
    *("config.json", *SETTINGS, "*.safetensors.index.json", "tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "*.jinja", "*.py"),
)
"""Files beside the weights that change what a folder's model computes, or which tokens it reads."""
FORMAT = "gradless-packed"
"""Key in the metadata of our packed folders. The value is JSON: weight name -> block type."""
ROWS = ("group_size", "q_group_size")
"""Settings that may be -1, for one group a row."""
LIMITS = dict.fromkeys(ROWS, (1, 1 << 20)) | {
    "bits": (1, 32),
    "w_bit": (1, 32),
    "num_codebooks": (1, 256),
    "nbits_per_codebook": (1, 16),
    "in_group_size": (1, 1 << 10),
    "out_group_size": (1, 1 << 10),
}
"""Number in a `quantization_config` -> its least and largest value."""
WEIGHTS = "model.safetensors"
INDEX = WEIGHTS + ".index.json"
ADAPTER = "adapter_config.json"
"""The file that marks a PEFT folder."""
BLOBS = "blobs"
"""Folder of a repository's files in the Hub's cache; the snapshots beside it are links to them."""


@dataclass
class Folder(Checkpoint):
    """A folder with a config.json, a tokenizer and packed weights."""

    output_name = "model"

    @classmethod
    def open(cls, path: str | Path) -> Folder:
        """Map a folder's weights.

        Raises:
            GradlessError: weights are missing, truncated or in a pickle, the format is not supported, or tensors contradict
                each other.
        """
        path = Path(path)
        tensors, metadata = read_headers(path)
        types: dict[str, str] = {}
        for file, each in metadata.items():
            types |= _packed_types(file, each)
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
        return str(read_config(self.path).get("model_type", "unknown"))

    @property
    def title(self) -> str:
        return self.path.name

    @property
    def files(self) -> list[Path]:
        """The files with weights."""
        return sorted({info.file for info in self.tensors.values()})

    def fingerprint(self) -> str:
        hashes = [sha256(file) for file in self.files]
        return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        return identity(self.path)

    def export(self, path: Path, floats: Mapping[str, Tensor] | None = None) -> None:
        with replacing(path) as temporary:
            copy_folder(self.path, temporary)
            for info, content in self.changes(floats or {}):
                patch(temporary / info.file.name, info, content)


def copy_folder(source: Path, target: Path) -> None:
    """Copy a folder with its content, except the copy itself if that lies inside."""
    around = {target.resolve(), *target.resolve().parents}

    def skipped(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if Path(folder, name).resolve() in around}

    shutil.copytree(source, target, ignore=skipped)


def is_quantized(path: Path) -> bool:
    """Whether a folder's linear layers are packed, by any tool."""
    if quantization(path) is not None:
        return True
    return any(FORMAT in read_header(file)[1] for file in sorted(path.glob("*.safetensors")))


def quantization(path: Path) -> Mapping[str, object] | None:
    """A quantizer's settings with `quant_method`, from config.json's `quantization_config` or from a tool's file, or None.

    Raises:
        GradlessError: the settings are no mapping, or two files contradict each other.
    """
    file = path / "config.json"
    config = read_config(path) if file.is_file() else {}
    inner = mapping(config, "text_config", str(file))
    found = mapping(config, "quantization_config", str(file)) or mapping(inner, "quantization_config", str(file))
    beside = {name: read_object(path / name) for name in SETTINGS if (path / name).is_file()}
    for name, settings in {file.name: found, **beside}.items():
        _check_settings(settings, path / name)
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
    """Name -> SHA-256 of each file beside the weights that matters to the model: configuration, tokenizer."""
    files = {file for pattern in MATTERS for file in path.glob(pattern) if file.is_file()}
    return {file.name: sha256(file) for file in sorted(files)}


def _check_settings(settings: dict[str, object], file: Path) -> None:
    """Check the type and range of the settings that layouts read."""
    for name, (least, most) in LIMITS.items():
        value = settings.get(name, least)
        if type(value) is not int or not (least <= value <= most or (value == -1 and name in ROWS)):
            raise GradlessError(
                f"{file}: {name} is {shown_value(value)}; it is a whole number from {least} to {most}"
                f"{', or -1 for whole rows' * (name in ROWS)}."
            )
    for name in ("dynamic", "extra_config"):
        mapping(settings, name, str(file), of=is_object, what="an object")


def read_config(path: Path) -> dict[str, object]:
    """A folder's config.json.

    Raises:
        GradlessError: the file cannot be read, or is no JSON object.
    """
    return read_object(path / "config.json", infinities=True)


def weight_files(path: Path) -> list[Path]:
    """A folder's safetensors: the shards that its index names, else model.safetensors, else every file.

    Raises:
        GradlessError: a file is missing or outside the folder, the weights are pickles, or the folder holds an adapter.
    """
    if (path / ADAPTER).is_file():
        raise GradlessError(
            f"{path} holds an adapter ({ADAPTER}); give the model that it is for, and the adapter's own folder to "
            "gradless eval --adapter, or merge it."
        )
    index = path / INDEX
    if index.is_file():
        names = set(_weight_map(path).values())
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
    """Sentences for the user about safetensors in a folder that are no part of its model."""
    names = sorted({file.name for file in path.glob("*.safetensors")} - {file.name for file in weight_files(path)})
    return [f"{path / name} holds tensors, but the model's are in other files; it is not read" for name in names]


def _inside(path: Path, name: str) -> Path:
    """A file of a folder, by its plain name.

    Raises:
        GradlessError: the name or a link leads out of the folder. Links to the blobs of the Hub's cache are allowed.
    """
    if Path(name).name != name or name in (".", ".."):
        raise GradlessError(f"{path} names weights in {name!r}, which is no file of that folder; copy them into it.")
    place, home = (path / name).resolve(), path.resolve()
    if place.parent not in (home, home.parent.parent / BLOBS):
        raise GradlessError(f"{path / name} is a link out of its folder, to {place}; copy the file into the folder.")
    return path / name


def _weight_map(path: Path) -> dict[str, str]:
    """Tensor -> file, from the index of a folder."""
    index = path / INDEX
    shards = mapping(read_object(index), "weight_map", str(index), of=_is_name, what="the name of a file")
    if not shards:
        raise GradlessError(f"{index} names no weights; download or copy it again.")
    return shards


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and value.isprintable() and 0 < len(value.encode()) < 256


def read_headers(path: Path) -> tuple[dict[str, TensorInfo], dict[Path, dict[str, str]]]:
    """The tensors of a folder, and the metadata of each of its files.

    Raises:
        GradlessError: a file cannot be read, a tensor is in two files, or a tensor of the index is in none.
    """
    tensors: dict[str, TensorInfo] = {}
    metadata = {}
    for file in weight_files(path):
        more, about = read_header(file)
        if twice := tensors.keys() & more.keys():
            name = min(twice)
            raise GradlessError(
                f"{path} holds {shown(name)} twice, in {tensors[name].file.name} and in {file.name}; take one away."
            )
        tensors |= more
        metadata[file] = about
    if (path / INDEX).is_file() and (lacking := _weight_map(path).keys() - tensors.keys()):
        raise GradlessError(
            f"{path} lacks {len(lacking)} tensors that {INDEX} names ({shown(min(lacking))}); download it again."
        )
    return tensors, metadata


def _packed_types(file: Path, metadata: Mapping[str, str]) -> dict[str, str]:
    """Weight name -> block type, from the metadata of one of our files; empty for other files."""
    if FORMAT not in metadata:
        return {}
    where = f"{file}: its {FORMAT}"
    types = parse_object(metadata[FORMAT].encode(), where, file.stat().st_size)
    return mapping({FORMAT: types}, FORMAT, str(file), of=is_text, what="a block type")


def _in_blocks(info: TensorInfo, types: dict[str, str]) -> TensorInfo:
    """The place of a tensor; one of our packed matrices gets its block type and shape."""
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
