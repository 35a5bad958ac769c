"""Models to attack, by what a user calls them: a Python callable, an ONNX file, an address."""

from __future__ import annotations

import importlib
import sys
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gradless.attacks.endpoint import Endpoint, shown
from gradless.attacks.onnx_file import OnnxFile
from gradless.attacks.oracle import Predict
from gradless.errors import GradlessError


def load(name: str, *, rate: float | None = None, timeout: float = 30.0) -> Predict:
    """The model of this name.

    Args:
        name: `module:attribute` (a callable or a torch module), a path ending in .onnx, or an http(s) address.
        rate: for an address, images a second at most.
        timeout: for an address, seconds that a call may take.

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
        raise GradlessError(f"--model {name} is {type(found).__name__}, nothing that can be called with a batch of images.")
    return TorchModule(found) if isinstance(found, nn.Module) else found


def is_address(name: str) -> bool:
    """Whether a model of this name is asked over HTTP."""
    return name.lower().startswith(("http://", "https://"))


def called(name: str) -> str:
    """A model's name as it may be written down: without what an address has for the server alone."""
    return shown(name) if is_address(name) else name


class TorchModule:
    """A torch module in eval mode, which gets its images on the device that it lies on."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module.eval()
        held = next(chain(module.parameters(), module.buffers()), None)
        self.device = None if held is None else held.device

    def __call__(self, batch: Tensor) -> Any:
        """What the module returns for a batch."""
        return self.module(batch.to(self.device))
