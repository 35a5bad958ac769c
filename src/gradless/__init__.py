"""gradless: fine-tune a quantized model with forward passes only, and get the same file format back."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gradless.attacks.base import AttackResult as AttackResult
    from gradless.attacks.criteria import Misclassification as Misclassification
    from gradless.attacks.criteria import TargetedMisclassification as TargetedMisclassification
    from gradless.attacks.labels import LabelAttack as LabelAttack
    from gradless.attacks.log import QueryLog as QueryLog
    from gradless.attacks.zo_sign_sgd import ZOSignSGDAttack as ZOSignSGDAttack
    from gradless.attacks.zoqo import SignHunter as SignHunter
    from gradless.attacks.zoqo import ZOQOAttack as ZOQOAttack
    from gradless.batch import Batch as Batch
    from gradless.batch import Closure as Closure
    from gradless.errors import GradlessError as GradlessError
    from gradless.formats.folder_model import load_folder as load_folder
    from gradless.formats.gguf import GGUFFile as GGUFFile
    from gradless.formats.gguf_model import load_gguf as load_gguf
    from gradless.formats.load import load as load
    from gradless.formats.model import TunableModel as TunableModel
    from gradless.formats.model import codes as codes
    from gradless.formats.model import offsets as offsets
    from gradless.formats.model import scales as scales
    from gradless.grids import Grid as Grid
    from gradless.journal import Journal as Journal
    from gradless.methods.base import Estimate as Estimate
    from gradless.methods.base import Measurement as Measurement
    from gradless.methods.ezo.method import EZO as EZO
    from gradless.methods.mezo.method import MeZO as MeZO
    from gradless.methods.nzo.method import NZO as NZO
    from gradless.methods.quzo.method import QuZO as QuZO
    from gradless.methods.qzo.method import QZO as QZO
    from gradless.methods.zoqo.method import ZOQO as ZOQO
    from gradless.replaying import replay as replay
    from gradless.run import evaluate as evaluate
    from gradless.spaces import BlockSpace as BlockSpace
    from gradless.spaces import CodeSpace as CodeSpace
    from gradless.spaces import DenseSpace as DenseSpace
    from gradless.spaces import GridSpace as GridSpace
    from gradless.spaces import dense_spaces as dense_spaces
    from gradless.tensor import PackedWeight as PackedWeight
    from gradless.training.options import RunOptions as RunOptions
    from gradless.training.trainer import ZOConfig as ZOConfig
    from gradless.training.trainer import ZOTrainer as ZOTrainer
    from gradless.tuning import tune as tune

_HOMES = {
    "AttackResult": "attacks.base",
    "Misclassification": "attacks.criteria",
    "TargetedMisclassification": "attacks.criteria",
    "LabelAttack": "attacks.labels",
    "QueryLog": "attacks.log",
    "ZOSignSGDAttack": "attacks.zo_sign_sgd",
    "SignHunter": "attacks.zoqo",
    "ZOQOAttack": "attacks.zoqo",
    "Batch": "batch",
    "Closure": "batch",
    "GradlessError": "errors",
    "load_folder": "formats.folder_model",
    "GGUFFile": "formats.gguf",
    "load_gguf": "formats.gguf_model",
    "load": "formats.load",
    "TunableModel": "formats.model",
    "codes": "formats.model",
    "offsets": "formats.model",
    "scales": "formats.model",
    "Grid": "grids",
    "Journal": "journal",
    "Estimate": "methods.base",
    "Measurement": "methods.base",
    "EZO": "methods.ezo.method",
    "MeZO": "methods.mezo.method",
    "NZO": "methods.nzo.method",
    "QuZO": "methods.quzo.method",
    "QZO": "methods.qzo.method",
    "ZOQO": "methods.zoqo.method",
    "replay": "replaying",
    "evaluate": "run",
    "BlockSpace": "spaces",
    "CodeSpace": "spaces",
    "DenseSpace": "spaces",
    "GridSpace": "spaces",
    "dense_spaces": "spaces",
    "PackedWeight": "tensor",
    "RunOptions": "training.options",
    "ZOConfig": "training.trainer",
    "ZOTrainer": "training.trainer",
    "tune": "tuning",
}
"""The module of each public name: imported on first use, so that the command line starts without torch."""

__all__ = [*_HOMES, "__version__"]


if not TYPE_CHECKING:  # a checker that saw it would let every name pass

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'gradless' has no attribute {name!r}")
        return getattr(importlib.import_module(f"gradless.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
