"""Reads users' labels and models' answers, in the forms that libraries give them, as classes or scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from gradless.errors import GradlessError

K = TypeVar("K")

SCORES, CLASSES = ("logits", "scores", "probabilities", "probs"), ("labels", "label", "classes")
"""Names of outputs that identify them as scores or as classes."""
_MOST = 2**31
"""Classes must be below this, since they are kept as int32."""


def read_labels(given: object, images: int | None = None) -> Tensor:
    """The classes that a user gives, one an image.

    Args:
        given: integers (n,) or (n, 1), or one-hot rows (n, classes) of any dtype.
        images: n; None for as many as are given.

    Returns:
        int64 (n,).

    Raises:
        GradlessError: they are something else.
    """
    need = f"{'n' if images is None else images} images need integers from 0 on, (n,) or (n, 1), or one-hot rows (n, classes)"
    try:
        labels = tensor_of(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise GradlessError(f"labels cannot be read ({error}); {need}.") from error
    what = f"labels are {labels.dtype} of shape {tuple(labels.shape)}"
    if images is None and labels.ndim:
        images = len(labels)
    if labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == images:
        if not bool(((labels == 0) | (labels == 1)).all()) or not bool((labels.sum(1) == 1).all()):
            raise GradlessError(f"{what} whose rows are not one-hot; {need}.")
        return labels.long().argmax(1)
    labels = _column(labels)
    if labels.shape != (images,) or not _whole(labels) or bool(((labels < 0) | (labels >= _MOST)).any()):
        raise GradlessError(f"{what}; {need}.")
    return labels.long()


def read_answer(returned: object, images: int) -> Tensor:
    """A model's answer to a batch.

    Args:
        returned: scores (n, classes), also with more dimensions of one; classes, integers (n,) or (n, 1); or a model's
            output, a mapping, a tuple or a list that holds one of them. In a tuple of several arrays scores come before
            classes, and the first array comes first if it can be scores.
        images: n.

    Returns:
        Scores, fp32 or fp64 (n, classes), or classes, int64 (n,), on the CPU.

    Raises:
        GradlessError: the answer cannot be identified.
    """
    if isinstance(returned, Tensor):
        return choose({"an array": returned}, images)
    if (logits := getattr(returned, "logits", None)) is not None:
        return choose({"logits": logits}, images)
    if isinstance(returned, Mapping):
        known = [name for name in SCORES + CLASSES if returned.get(name) is not None]
        if not known and len(returned) > 1:
            names = ", ".join(map(str, returned))
            raise GradlessError(f"the model returned {names}, none of which is called scores or labels: return one of them.")
        return choose({name: returned[name] for name in known[:1] or returned}, images)
    if hasattr(returned, "values") and hasattr(returned, "indices"):  # torch's max, sort and topk
        return choose({"classes": returned.indices}, images)
    if isinstance(returned, tuple | list) and _several(returned, images):
        outputs = {f"output {i}": value for i, value in enumerate(returned)}
        scores = _of_kind(outputs, images, scores=True)
        others = [value for name, value in scores.items() if name != "output 0"]
        # Integers beside the first scores may be the classes of their columns.
        if "output 0" in scores and all(map(Tensor.is_floating_point, others)):
            return choose({"output 0": returned[0]}, images)
        return choose(outputs, images)
    return choose({"an array": returned}, images)


def read_classes(returned: object, images: int) -> Tensor:
    """The classes, int64 (n,), in a model's answer: those with the largest scores if it has scores; see `read_answer`."""
    answer = read_answer(returned, images)
    return answer.argmax(1) if answer.ndim == 2 else answer


def choose(outputs: Mapping[K, object], images: int) -> Tensor:
    """The output of a model that is its answer to a batch: scores if there are any, else classes.

    Args:
        outputs: by name; one named as in `SCORES` or `CLASSES` must hold what its name says.
        images: number of images in the batch.

    Returns:
        As `read_answer`.

    Raises:
        GradlessError: no output, or more than one, can be the answer.
    """
    scores = _of_kind(outputs, images, scores=True)
    if len(scores) > 1:
        scores = {name: value for name, value in scores.items() if str(name).lower() in SCORES}
    found = scores or _of_kind(outputs, images, scores=False)
    if len(found) == 1:
        (answer,) = found.values()
        return answer.double() if scores and not answer.is_floating_point() else answer
    returned = "; ".join(f"{name} {_described(value)}" for name, value in outputs.items()) or "nothing"
    raise GradlessError(
        f"the model was given {images} images and returned {returned}; it must return scores (n, classes) or labels (n,)"
        f"{_hint(outputs, images)}."
    )


def _hint(outputs: Mapping[K, object], images: int) -> str:
    if len(outputs) > 1:
        return ", alone or so that they can be told from its other outputs"
    try:
        (value,) = map(tensor_of, outputs.values())
    except (TypeError, ValueError, RuntimeError):
        return ""
    if value.shape[:1] != (images,) or value.numel() != images:
        return ""
    if value.is_floating_point():
        return ", not one float an image: of two classes return both scores, such as (1 - p, p), or (0, logit)"
    return " as integers from 0 on"


def _of_kind(outputs: Mapping[K, object], images: int, *, scores: bool) -> dict[K, Tensor]:
    """The outputs that can be scores, or classes, as tensors of their final shape and dtype."""
    found: dict[K, Tensor] = {}
    for name, value in outputs.items():
        if str(name).lower() in (CLASSES if scores else SCORES):
            continue
        try:
            tensor = tensor_of(value)
        except (TypeError, ValueError, RuntimeError):
            continue
        while tensor.ndim > 2 and tensor.shape[-1] == 1:
            tensor = tensor.squeeze(-1)
        if scores and tensor.ndim == 2 and len(tensor) == images and tensor.shape[1] > 1 and tensor.dtype != torch.bool:
            found[name] = tensor
        column = _column(tensor)
        if not scores and column.shape == (images,) and _whole(column) and not bool(((column < 0) | (column >= _MOST)).any()):
            found[name] = column.long()
    return found


def _several(values: tuple[object, ...] | list[object], images: int) -> bool:
    """Whether these are outputs for the whole batch, rather than rows, one for each image."""
    shapes = [tuple(value.shape) for value in values if hasattr(value, "shape")]
    if not shapes or len(values) != images:
        return bool(shapes)
    if any(len(shape) > 1 for shape in shapes):
        return images == 1 or any(len(shape) < 2 or shape[0] != 1 for shape in shapes)
    return isinstance(values, tuple) and any(shapes)


def tensor_of(value: object) -> Tensor:
    """An array of any library, or lists of numbers, as a dense tensor on the CPU: bool, int64, fp32 or fp64.

    Raises:
        TypeError, ValueError, RuntimeError: it is not an array of numbers.
    """
    value = getattr(value, "raw", value)  # eagerpy's, which Foolbox uses
    if isinstance(value, list | tuple) and any(hasattr(each, "shape") for each in value):
        parts = [tensor_of(each) for each in value]
        if all(part.ndim > 1 and len(part) == 1 for part in parts):
            parts = [part.squeeze(0) for part in parts]
        return torch.stack(parts)
    if not isinstance(value, Tensor):
        array = np.asarray(value)
        if array.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
            array = array.astype(np.float32)
        wanted = {"b": np.bool_, "i": np.int64, "u": np.int64, "f": np.float64}.get(array.dtype.kind)
        if wanted is None:
            raise TypeError(f"it holds {array.dtype}, no numbers")
        if array.dtype.kind == "u" and array.size and int(array.max()) >= 2**63:
            raise ValueError(f"it holds {array.max()}")
        array = array.astype(np.float32 if array.dtype.kind == "f" and array.dtype.itemsize <= 4 else wanted)
        return torch.from_numpy(np.ascontiguousarray(array).reshape(array.shape))
    tensor: Tensor = value.detach()
    if tensor.is_complex():
        raise TypeError("it holds complex numbers")
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = (tensor if tensor.layout == torch.strided else tensor.to_dense()).cpu()
    if tensor.is_floating_point():
        return tensor if tensor.dtype == torch.float64 else tensor.float()
    return tensor if tensor.dtype == torch.bool else tensor.long()


def _column(values: Tensor) -> Tensor:
    """(n, 1) as (n,); anything else as it is."""
    return values.squeeze(1) if values.ndim == 2 and values.shape[1] == 1 else values


def _whole(values: Tensor) -> bool:
    return not values.is_floating_point() and values.dtype != torch.bool


def _described(value: object) -> str:
    if hasattr(value, "shape"):
        return f"of shape {tuple(value.shape)} ({getattr(value, 'dtype', type(value).__name__)})"
    return f"of type {type(value).__name__}"
