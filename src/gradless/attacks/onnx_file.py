"""A model in an ONNX file, run by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradless.attacks.answers import choose
from gradless.errors import GradlessError

_TAKEN = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(double)": np.float64, "tensor(uint8)": np.uint8}


class OnnxFile:
    """Asks an ONNX file. Its one input takes the images, and one of its outputs is the answer.

    Images are cast to the input's dtype. An input of bytes takes pixels times 255, which must be whole numbers. If the file
    fixes the batch size, images are split into such batches, and the last batch is filled up with copies. Among several
    outputs scores come before classes. Maps from classes to scores (ZipMap's) are read as scores.

    Args:
        path: the file.

    Raises:
        GradlessError: there is no such model, it does not take images, or onnxruntime is missing.
    """

    def __init__(self, path: Path) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise GradlessError("ONNX files need onnxruntime: pip install gradless[onnx].") from error
        if not path.is_file():
            raise GradlessError(f"--model {path}: there is no such file.")
        self.path, options = path, onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are reported below
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's classes of errors share no base
            raise GradlessError(f"--model {path} cannot be loaded by onnxruntime: {_first_line(error)}") from error
        inputs = self._session.get_inputs()
        if len(inputs) != 1:
            names = ", ".join(each.name for each in inputs) or "none"
            raise GradlessError(f"--model {path} has {len(inputs)} inputs ({names}); it must have one, the images.")
        (self._input,) = inputs
        if self._input.type not in _TAKEN:
            raise GradlessError(f"--model {path} takes {self._input.type}; it must take images of floats, or of bytes.")

    def __call__(self, batch: Tensor) -> Tensor:
        """Scores (n, classes) or classes (n,) of images (n, ...).

        Raises:
            GradlessError: the images do not fit, the run fails, or no output can be identified as the answer.
        """
        sizes = self._input.shape or []
        wanted, given = sizes[1:], list(batch.shape[1:])
        if len(sizes) > 0 and (
            len(wanted) != len(given) or any(isinstance(a, int) and a != b for a, b in zip(wanted, given, strict=True))
        ):
            turned = sorted(map(str, wanted)) == sorted(map(str, given))
            raise GradlessError(
                f"--model {self.path} takes images of shape {tuple(wanted)}, and these are of shape {tuple(given)}"
                + (": give them with their dimensions in that order." if turned else ".")
            )
        size = sizes[0] if sizes and isinstance(sizes[0], int) and sizes[0] > 0 else len(batch)
        return torch.cat([self._run(batch[i : i + size], size) for i in range(0, len(batch), size)])

    def _run(self, part: Tensor, size: int) -> Tensor:
        """The answer to at most `size` images, asked as a batch of that size."""
        images = self._cast(torch.cat([part, part[-1:].expand(size - len(part), *part.shape[1:])]))
        try:
            values = self._session.run(None, {self._input.name: images})
        except Exception as error:
            raise GradlessError(f"--model {self.path} failed on a batch of {size}: {_first_line(error)}") from error
        names = (output.name for output in self._session.get_outputs())
        return choose({name: _listed(value) for name, value in zip(names, values, strict=True)}, size)[: len(part)]

    def _cast(self, images: Tensor) -> NDArray[np.generic]:
        taken = _TAKEN[self._input.type]
        if taken is not np.uint8:
            return images.numpy().astype(taken)
        pixels = images * 255
        if bool(((pixels - pixels.round()).abs() > 1e-2).any()):
            raise GradlessError(f"--model {self.path} takes bytes; give --pixel-bits 8, so that images are rounded to bytes.")
        return pixels.round().to(torch.uint8).numpy()


def _listed(value: object) -> object:
    """Scores (n, classes) of n maps from classes 0, 1, .. to scores; anything else as it is."""
    if not (isinstance(value, list) and value and all(isinstance(each, Mapping) for each in value)):
        return value
    classes = range(len(value[0]))
    if any(each.keys() != set(classes) for each in value):
        raise GradlessError(
            f"the model names its classes {', '.join(map(str, list(value[0])[:5]))}; they must be 0, 1, and so on."
        )
    return np.array([[each[i] for i in classes] for each in value])


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
