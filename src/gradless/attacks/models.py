"""Models to attack, by what a user calls them: a Python callable, an ONNX file, an address."""

from __future__ import annotations

import importlib
import json
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from gradless.attacks.oracle import Predict
from gradless.errors import GradlessError

RETRIES = 5


def load(name: str, *, rate: float | None = None) -> Predict:
    """The model of this name.

    Args:
        name: `module:attribute` (a callable or a torch module), a path ending in .onnx, or an http(s) address.
        rate: for an address, images a second at most.

    Raises:
        GradlessError: there is no such model, or its library is missing.
    """
    if name.startswith(("http://", "https://")):
        return Endpoint(name, rate)
    if name.endswith(".onnx"):
        return onnx(Path(name))
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise GradlessError(f"--model {name}: give module:attribute, a file.onnx, or an http address.")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise GradlessError(f"--model {name}: {error}.") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise GradlessError(f"--model {name} is {type(found).__name__}, nothing that can be called with a batch of images.")
    return found.eval() if isinstance(found, nn.Module) else found


def onnx(path: Path) -> Predict:
    """An ONNX file, on the CPU, by onnxruntime: its first input takes the images, its first output is the answer."""
    try:
        import onnxruntime
    except ImportError as error:
        raise GradlessError("ONNX files need onnxruntime: pip install gradless[onnx].") from error
    if not path.is_file():
        raise GradlessError(f"--model {path}: there is no such file.")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (images, *more) = session.get_inputs()
    if more:
        raise GradlessError(f"--model {path} has {len(more) + 1} inputs; it must have one, the images.")
    return lambda batch: session.run(None, {images.name: batch.numpy()})[0]


class Endpoint:
    """A model behind HTTP: POST {"images": [..]} -> {"scores": [[..]]} or {"labels": [..]}.

    It waits so as to stay below the rate, and as long as a busy server (429, 503) asks for.

    Args:
        address: of the model.
        rate: images a second at most; None for no limit.
    """

    def __init__(self, address: str, rate: float | None = None) -> None:
        self.address, self.rate = address, rate
        self._next = 0.0

    def __call__(self, batch: torch.Tensor) -> Any:
        """Scores (n, classes) or labels (n,).

        Raises:
            GradlessError: there is no answer, or none that can be read.
        """
        time.sleep(max(0.0, self._next - time.monotonic()))
        if self.rate is not None:
            self._next = time.monotonic() + len(batch) / self.rate
        body = json.dumps({"images": batch.tolist()}).encode()
        request = urllib.request.Request(self.address, body, {"Content-Type": "application/json"})
        for attempt in range(RETRIES):
            try:
                with urllib.request.urlopen(request) as response:
                    return self._read(response.read())
            except urllib.error.HTTPError as error:
                if error.code not in (429, 503) or attempt + 1 == RETRIES:
                    raise GradlessError(f"{self.address} answered {error.code} {error.reason}.") from error
                asked = error.headers.get("Retry-After", "")
                time.sleep(float(asked) if asked.isdigit() else 2.0**attempt)
            except OSError as error:
                raise GradlessError(f"{self.address} cannot be reached: {error}.") from error
        raise AssertionError

    def _read(self, text: bytes) -> Any:
        try:
            answer = json.loads(text)
            return np.array(answer["scores"], dtype=np.float32) if "scores" in answer else np.array(answer["labels"])
        except (ValueError, KeyError, TypeError) as error:
            raise GradlessError(f'{self.address} answered with no JSON of "scores" or "labels": {text[:80]!r}.') from error
