"""gradless: fine-tune a quantized model with forward passes only, and get the same file format back."""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "GradlessError": "gradless.errors",
    "BlockSpace": "gradless.spaces",
    "CodeSpace": "gradless.spaces",
    "DenseSpace": "gradless.spaces",
    "GridSpace": "gradless.spaces",
    "Grid": "gradless.grids",
    "PackedWeight": "gradless.tensor",
    "dense_spaces": "gradless.spaces",
    "Estimate": "gradless.methods",
    "EZO": "gradless.methods",
    "MeZO": "gradless.methods",
    "NZO": "gradless.methods",
    "QZO": "gradless.methods",
    "QuZO": "gradless.methods",
    "ZOQO": "gradless.methods",
    "Journal": "gradless.journal",
    "GGUFFile": "gradless.formats.gguf",
    "load_gguf": "gradless.formats.gguf_model",
    "load_folder": "gradless.formats.folder_model",
    "AttackResult": "gradless.attacks.base",
    "LabelAttack": "gradless.attacks.labels",
    "QueryLog": "gradless.attacks.log",
    "SignHunter": "gradless.attacks.zoqo",
    "ZOQOAttack": "gradless.attacks.zoqo",
    "ZOSignSGDAttack": "gradless.attacks.zo_sign_sgd",
    "ZOConfig": "gradless.training.trainer",
    "ZOTrainer": "gradless.training.trainer",
}

__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str) -> Any:
    """Import on first use: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'gradless' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return getattr(home, name)
