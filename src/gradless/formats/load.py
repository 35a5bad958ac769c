"""Load a model, whatever file or folder it lies in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeVar

from gradless.formats.dense import DenseModel
from gradless.formats.folder import Folder, is_quantized
from gradless.formats.folder_model import load_folder
from gradless.formats.gguf import GGUFFile
from gradless.formats.gguf_model import load_gguf
from gradless.formats.hub import local
from gradless.formats.quantized import QuantizedModel


def load(model: str | Path, *, trust_remote_code: bool = False) -> QuantizedModel | DenseModel:
    """Load a GGUF file, or a folder of a quantized or a dense model, by its path or its name on the Hub."""
    path = local(model, trust_remote_code=trust_remote_code)
    if not path.is_dir():
        return _noted(load_gguf(path))
    load = load_folder if is_quantized(path) else DenseModel.load
    return _noted(load(path, trust_remote_code=trust_remote_code))


def open_model(path: Path) -> QuantizedModel | DenseModel:
    """What a replay needs of a model: its tensors, and no module around them if they are packed."""
    if path.is_dir() and not is_quantized(path):
        return _noted(DenseModel.load(path))
    return QuantizedModel(Folder.open(path) if path.is_dir() else GGUFFile.open(path))


LoadedModel = TypeVar("LoadedModel", bound=QuantizedModel | DenseModel)


def _noted(loaded: LoadedModel) -> LoadedModel:
    """A loaded model, and on standard error what its user should know of it."""
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    return loaded
