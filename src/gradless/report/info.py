"""The contents of a quantized checkpoint, and the values that each method would tune in it."""

from __future__ import annotations

import math
from collections import Counter
from typing import TypedDict

import torch

from gradless import kernels
from gradless.errors import GradlessError
from gradless.formats.folder import Folder, is_quantized
from gradless.formats.gguf import GGUFFile
from gradless.formats.hub import local
from gradless.methods.registry import RECIPES
from gradless.noise import Direction
from gradless.tensor import Move, PackedWeight, Part

ENOUGH = 0.9
"""Smallest cosine between a perturbation and its rounding to a bf16 scratch without a warning of `info`."""


class TypeRow(TypedDict):
    """The tensors of one type."""

    type: str
    tensors: int
    weights: int
    bits_per_weight: float
    bytes: int


class Survival(TypedDict):
    """How well a perturbation survives a bf16 scratch; see `surviving`."""

    eps: float
    cosine: float


class Description(TypedDict):
    """The contents of a file; see `describe`."""

    path: str
    bytes: int
    format: str
    architecture: str
    name: str
    types: list[TypeRow]
    tunable: dict[str, dict[str, int]]
    would_tune: dict[str, str]
    kernels: str
    why_not_compiled: str | None
    products: dict[str, str]
    surviving: dict[str, Survival]


def describe(path: str, eps: float | None = None) -> Description:
    """Types, sizes, and the values that each method would tune.

    Args:
        path: a GGUF file, or a quantized folder.
        eps: the perturbation to check against the scratch's rounding; None for the default.
    """
    folder = local(path)
    if folder.is_dir() and not is_quantized(folder):
        raise GradlessError(f"{path} is a folder without quantized weights; info shows GGUF files and quantized folders.")
    file = Folder.open(folder) if folder.is_dir() else GGUFFile.open(folder)
    counts, weights, nbytes = Counter[str](), Counter[str](), Counter[str]()
    for name, tensor in file.quantized.items():
        kind = tensor.type_name
        counts[kind] += 1
        weights[kind] += tensor.rows * tensor.columns
        nbytes[kind] += sum(info.nbytes for info in file.parts(name).values())
    for info in (file.tensors[name] for name in file.floats):
        counts[info.type] += 1
        weights[info.type] += math.prod(info.shape)
        nbytes[info.type] += info.nbytes
    linear = [file.quantized[name] for name in file.linear_layers()]
    shown = [(tensor, eps or _scale_eps(tensor)) for tensor in _one_a_type(linear)]
    tunable = {each.name: each.tunable(file) for each in RECIPES.values()}
    return {
        "path": str(file.path),
        "bytes": sum(each.stat().st_size for each in {info.file for info in file.tensors.values()}),
        "format": file.layout.title,
        "architecture": file.architecture,
        "name": file.title,
        "types": [
            {
                "type": name,
                "tensors": counts[name],
                "weights": weights[name],
                "bits_per_weight": round(8 * nbytes[name] / weights[name], 3),
                "bytes": nbytes[name],
            }
            for name in sorted(counts, key=lambda name: -nbytes[name])
        ],
        "tunable": {name: counts for name, (counts, _) in tunable.items()},
        "would_tune": {name: phrase for name, (_, phrase) in tunable.items()},
        "kernels": kernels.name(),
        "why_not_compiled": kernels.why_not_compiled(),
        "products": kernels.products(),
        "surviving": {tensor.type_name: {"eps": eps, "cosine": round(surviving(tensor, eps), 4)} for tensor, eps in shown},
    }


def _scale_eps(tensor: PackedWeight) -> float:
    """The default perturbation of a tensor's scales, by the first method that moves scales alone."""
    found = (each.scale_eps(centred=tensor.is_centred) for each in RECIPES.values())
    return next(eps for eps in found if eps is not None)


def _one_a_type(tensors: list[PackedWeight]) -> list[PackedWeight]:
    return list({tensor.type_name: tensor for tensor in tensors}.values())


def surviving(tensor: PackedWeight, eps: float, part: Part = Part.SCALE) -> float:
    """The cosine between a perturbation of `tensor` in fp32 and its rounding to a bf16 scratch."""
    own = tensor.under(Move(Direction(0, 0), eps), Move(Direction(0, 0), -eps))
    own.tune(part)
    rows = torch.arange(min(own.rows, 256))
    sides = []
    for dtype in (torch.float32, torch.bfloat16):
        plus, minus = kernels.dequantize(own, rows, dtype).float()
        sides.append(plus - minus)
    return float(torch.nn.functional.cosine_similarity(sides[0].flatten(), sides[1].flatten(), dim=0))


def as_text(description: Description) -> str:
    """The description for a person."""
    lines = [
        f"{description['path']}: {description['name']} ({description['architecture']}), {description['format']}, "
        f"{description['bytes']:,} bytes",
        "",
        f"  {'type':16} {'tensors':>8} {'weights':>14} {'bits':>7} {'bytes':>14}",
    ]
    for row in description["types"]:
        lines.append(
            f"  {row['type']:16} {row['tensors']:>8} {row['weights']:>14,} {row['bits_per_weight']:>7} {row['bytes']:>14,}"
        )
    lines += [
        "",
        *(f"  {name:5} would tune {phrase}" for name, phrase in description["would_tune"].items()),
        f"  kernels: {description['kernels']}"
        + (f" ({description['why_not_compiled']})" if description["why_not_compiled"] else "")
        + "".join(f"; {activations} products: {how}" for activations, how in description["products"].items()),
    ]
    for name, left in description["surviving"].items():
        if left["cosine"] < ENOUGH:
            lines.append(
                f"  warning: rounding {name} to bf16 leaves a perturbation of eps {left['eps']} with a cosine of only "
                f"{left['cosine']:.2f} to itself; give a larger --eps."
            )
    return "\n".join(lines)
