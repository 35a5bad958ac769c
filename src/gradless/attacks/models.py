"""Loads the model to attack by its name: a Python callable, an ONNX file, or an address."""

from __future__ import annotations

import importlib
import sys
from itertools import chain
from pathlib import Path

from torch import Tensor, nn

from gradless.attacks.endpoint import Endpoint, shown
from gradless.attacks.onnx_file import OnnxFile
from gradless.attacks.oracle import Predict
from gradless.errors import GradlessError


def load(name: str, *, rate: float | None = None, timeout: float = 30.0) -> Predict:
    """The model of this name.

    Args:
        name: `module:attribute` (a callable or a torch module), a path ending in .onnx, or an http(s) address.
        rate: for an address: most images a second.
        timeout: for an address: most seconds for a call.

    Raises:
        GradlessError: there is no such model, or its library is missing.
    """
    if is_address(name):
        return Endpoint(name, rate, timeout)
    if name.lower().endswith(".onnx"):
        return OnnxFile(Path(name))
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise GradlessError(f"--model {name}: give module:attribute, a file.onnx, or an http address.")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except GradlessError:
        raise
    except Exception as error:  # the module is the user's, and may fail in any way
        raise GradlessError(f"--model {name}: {error or type(error).__name__}.") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise GradlessError(f"--model {name} is {type(found).__name__}; it must be callable with a batch of images.")
    return TorchModule(found) if isinstance(found, nn.Module) else found


def is_address(name: str) -> bool:
    """Whether the name is an http(s) address."""
    return name.lower().startswith(("http://", "https://"))


def called(name: str) -> str:
    """A model's name for files and messages: an address without its secrets, see `endpoint.shown`."""
    return shown(name) if is_address(name) else name


class TorchModule:
    """A torch module in eval mode; images are moved to the device of its parameters."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        one = next(chain(module.parameters(), module.buffers()), None)
        self.device = None if one is None else one.device

    def __call__(self, batch: Tensor) -> object:
        """The module's output for a batch."""
        return self.module(batch.to(self.device))
