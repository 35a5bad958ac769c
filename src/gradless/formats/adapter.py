"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) with factors on a grid.

A frozen linear layer, packed or dense, returns y + (alpha / r) (x A.T) B.T. A and B are levels of one grid, times one scale for
each layer. The base is never written. An adapter is saved as a PEFT folder, and for a GGUF base also as a GGUF adapter.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeGuard

import gguf
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.formats.dense import DenseModel
from gradless.formats.gguf import GGUFFile
from gradless.formats.model import Plain
from gradless.formats.peft_config import CONFIG, read_config
from gradless.formats.quantized import QuantizedModel
from gradless.grids import integers, lora_scale
from gradless.layers import Linear, QuantLinear
from gradless.noise import Direction, Stream, uniform
from gradless.spaces import GridSpace, Space, linear_layers
from gradless.targets import EVERYTHING, Kind, Targets

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """The settings of a run's adapters.

    Attributes:
        rank: r.
        alpha: the update is alpha / r times B A.
        bits: of the factors' symmetric integer grid, 2 to 8.
        seed: of A's initial values, uniform in +-1 / sqrt(in_features). B begins at zero.
    """

    rank: int
    alpha: float = 64.0
    bits: int = 8
    seed: int = 0

    @property
    def factor(self) -> float:
        return self.alpha / self.rank


@dataclass
class Adapter:
    """One layer's factors: A (r, in_features) and B (out_features, r)."""

    path: str
    a: GridSpace
    b: GridSpace

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as a forward reads them now, fp32."""
        return self.a.shown(), self.b.shown()


class AdaptedModel(Plain):
    """A loaded model with adapters on its linear layers. Only the codes of the adapters are tuned.

    Args:
        base: any model that gradless loads; its modules get hooks.
        lora: settings of the adapters.

    Raises:
        GradlessError: the model has no linear layer, or the rank is above those of all layers.
    """

    output_name = "adapter"
    lora: LoRA

    def __init__(self, base: QuantizedModel | DenseModel, lora: LoRA) -> None:
        self.base, self.lora = base, lora
        self.model, self.tokenizer, self.path = base.model, base.tokenizer, base.path
        self.quantized = base.quantized
        self.layers = adaptable(base)
        if not self.layers:
            raise GradlessError(f"{type(base.model).__name__} has no linear layer for an adapter.")
        most = max(min(layer.in_features, layer.out_features) for layer in self.layers.values())
        if lora.rank > most:
            raise GradlessError(f"lora is {lora.rank}; no layer of this model has a rank above {most}: give at most that.")
        self.adapters: dict[str, Adapter] = {}

    def fingerprint(self) -> str:
        """The base's."""
        return self.base.fingerprint()

    def identity(self) -> dict[str, str]:
        """The base's."""
        return self.base.identity()

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """The layers that get adapters.

        Raises:
            GradlessError: the targets choose nothing.
        """
        return targets.choose([(path, path) for path in self.layers], self.layers) if kind == Kind.CODES else []

    def grid_length(self, name: str) -> float:
        """Number of steps of the factors' grid, from end to end."""
        del name
        return integers(self.lora.bits).length

    def step_size(self, name: str) -> float:
        """The size of one grid step in a layer's factors."""
        return new_adapter(name, self.layers[name], self.lora).a.scale

    def spaces(self, kind: str, names: list[str], *, clamp: bool = False, residual: bool = False) -> list[Space]:
        """Make the adapters of the named layers, once, and return the spaces of their factors."""
        assert kind == Kind.CODES
        found: list[Space] = []
        for name in names:
            assert name not in self.adapters, f"{name} has an adapter already"
            adapter = self.adapters[name] = new_adapter(name, self.layers[name], self.lora, clamp=clamp, residual=residual)
            attach(self.layers[name], adapter.factors, self.lora.factor)
            found += [adapter.a, adapter.b]
        return found

    def written(self, path: Path) -> list[Path]:
        """The paths that `save` writes."""
        return [path, path.with_name(path.name + ".gguf")] if _is_gguf(self.base) else [path]

    def save(self, path: str | Path) -> None:
        """Write a PEFT folder, and for a GGUF base also a GGUF adapter beside it, named like the folder plus .gguf."""
        path = Path(path)
        source = self.base.path
        write_peft(path, list(self.adapters.values()), self.lora, "" if source is None else str(source.resolve()))
        if _is_gguf(self.base):
            write_gguf(self.written(path)[1], self.base, list(self.adapters.values()), self.lora)


def _is_gguf(base: QuantizedModel | DenseModel) -> TypeGuard[QuantizedModel]:
    return isinstance(base, QuantizedModel) and isinstance(base.file, GGUFFile)


def adaptable(base: QuantizedModel | DenseModel) -> dict[str, Linear]:
    """Path -> linear layer that gets an adapter: the layers that are tuned if there are no adapters."""
    if isinstance(base, QuantizedModel):
        linear = set(base.linear_layers())
        return {path: m for path, m in base.model.named_modules() if isinstance(m, QuantLinear) and m.packed.name in linear}
    chosen = linear_layers(base.model)
    return {path: m for path, m in base.model.named_modules() if isinstance(m, nn.Linear) and chosen(path, m)}


def new_adapter(path: str, layer: Linear, lora: LoRA, *, clamp: bool = False, residual: bool = False) -> Adapter:
    """A layer's initial factors. Both have one scale, twice A's range, so that B can grow from zero."""
    grid, shape = integers(lora.bits), (lora.rank, layer.in_features)
    names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    words = Direction(lora.seed, 0).words(names[0], Stream.INITIAL)
    a = (2 * uniform(words, 0, math.prod(shape), "cpu") - 1).view(shape) / math.sqrt(layer.in_features)
    scale = lora_scale(a, grid)
    device = _weight(layer).device
    codes = (grid.nearest(a / scale).short(), torch.zeros(layer.out_features, lora.rank, dtype=torch.int16))
    each = zip(names, codes, strict=True)
    return Adapter(path, *(GridSpace(n, c.to(device), grid, scale, clamp=clamp, residual=residual) for n, c in each))


def attach(layer: nn.Module, factors: Callable[[], tuple[Tensor, ...]], factor: float) -> None:
    """Make a layer's forwards add factor * (x A.T) B.T in fp32; `factors` gives (A, B)."""

    def add(_layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        a, b = factors()
        return y + (factor * (inputs[0].float() @ a.T @ b.T)).to(y.dtype)

    layer.register_forward_hook(add)


def write_peft(folder: Path, adapters: list[Adapter], lora: LoRA, base: str) -> None:
    """Write adapters as a PEFT LoRA folder, in fp32, which represents every level of the grid exactly."""
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [adapter.path for adapter in adapters],
        "inference_mode": True,
    }
    tensors = {_PREFIX + space.name: space.shown().contiguous().cpu() for each in adapters for space in (each.a, each.b)}
    with replacing(folder) as temporary:
        temporary.mkdir(parents=True)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2))
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})


def attach_peft(base: QuantizedModel | DenseModel, folder: Path) -> None:
    """Make a loaded model run with the adapter of a PEFT folder.

    Raises:
        GradlessError: the folder holds no LoRA adapter, one for another model, or one with more than plain factors. No layer is
            changed then.
    """
    if folder.is_file():
        raise GradlessError(f"{folder} is a file; give the PEFT folder of the adapter, which holds {CONFIG} and {WEIGHTS}.")
    lora, layers = read_config(folder), adaptable(base)
    known = {path: path for path in layers} | _without_wrapper(layers)
    found: dict[str, tuple[tuple[Tensor, Tensor], float]] = {}
    for path, pair in _read_factors(folder).items():
        ours = known.get(path) or known.get(_unwrapped(path), path)
        shapes = {factor: tuple(values.shape) for factor, values in pair.items()}
        if not _fits(layers.get(ours), shapes) or ours in found:
            held = ", ".join(f"{factor} {shape}" for factor, shape in sorted(shapes.items()))
            raise GradlessError(f"{folder} does not fit this model: no linear layer {path} takes {held}.")
        if shapes["lora_A"][0] != lora.rank_of(path):
            key = "r" if lora.rank_of(path) == lora.rank else "rank_pattern"
            raise GradlessError(
                f"{folder} holds a LORA adapter with {key} {lora.rank_of(path)} for {path}, whose factors have rank "
                f"{shapes['lora_A'][0]}: configuration and weights are not of one adapter."
            )
        device = _weight(layers[ours]).device
        found[ours] = (pair["lora_A"].to(device), pair["lora_B"].to(device)), lora.factor_of(path)
    if not found:
        raise GradlessError(f"{folder} holds an adapter without factors; it would change nothing.")
    if missing := [path for path in layers if path not in found and lora.names(path)]:
        raise GradlessError(
            f"{folder} lacks the factors of {len(missing)} layers that its configuration names ({missing[0]} first)."
        )
    for path, (factors, factor) in found.items():
        attach(layers[path], partial(tuple, factors), factor)


_FACTOR = re.compile(r"(?:base_model\.model\.)?(?P<path>.+)\.(?P<factor>lora_[AB])(?:\.(?P<adapter>[^.]+))?\.weight")


def _read_factors(folder: Path) -> dict[str, dict[str, Tensor]]:
    """The factors of a PEFT folder, fp32, by the layers' names in the adapter.

    Raises:
        GradlessError: the factors cannot be read or are not finite floats, or there are other tensors.
    """
    path, pairs, adapters, others = folder / WEIGHTS, defaultdict[str, dict[str, Tensor]](dict), set(), []
    if not path.is_file() and path.with_suffix(".bin").is_file():
        raise GradlessError(f"{folder} holds a pickle, which runs code; let PEFT save the adapter as {WEIGHTS}.")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                match = _FACTOR.fullmatch(name)
                if match is None:
                    others.append(name)
                    continue
                adapters.add(match["adapter"])
                held = pairs[match["path"]]
                if match["factor"] in held:
                    raise GradlessError(f"{path} holds {match['factor']} of {match['path']} twice.")
                held[match["factor"]] = file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise GradlessError(f"{folder} holds no adapter that can be read ({error}); give a PEFT folder.") from error
    if others or len(adapters) > 1:
        what = f"{len(others)} tensors beside LoRA's factors, {others[0]} first" if others else f"{len(adapters)} adapters"
        raise GradlessError(f"{folder} holds {what}; gradless reads plain LORA adapters, one in a folder.")
    for layer, pair in pairs.items():
        for factor, values in pair.items():
            if not values.is_floating_point() or not bool(values.float().isfinite().all()):
                raise GradlessError(f"{folder} holds {factor} of {layer} with values that are no finite floats.")
            pair[factor] = values.float()
    return pairs


def _fits(layer: Linear | None, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Whether the shapes are those of a layer's two factors, for any rank."""
    if layer is None or shapes.keys() != {"lora_A", "lora_B"} or not shapes["lora_A"]:
        return False
    rank = shapes["lora_A"][0]
    return shapes == {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}


def _unwrapped(path: str) -> str:
    """A layer's name in the language model alone, if that is a part of a model of images and text."""
    return ".".join(part for part in path.split(".") if part != "language_model")


def _without_wrapper(paths: Iterable[str]) -> dict[str, str]:
    """Name without a wrapper -> name, for names without a wrapper that are unique."""
    count = Counter(map(_unwrapped, paths))
    return {_unwrapped(path): path for path in paths if count[_unwrapped(path)] == 1}


def _weight(layer: Linear) -> Tensor:
    """The weight that a layer's forward reads."""
    return layer.packed.packed if isinstance(layer, QuantLinear) else layer.weight


def write_gguf(path: Path, base: QuantizedModel, adapters: list[Adapter], lora: LoRA) -> None:
    """Write adapters as a GGUF file that llama.cpp applies to the base: F32, with B's rows in the file's order."""
    layers = dict(base.model.named_modules())
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), base.file.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.alpha)
        for adapter in adapters:
            layer = layers[adapter.path]
            assert isinstance(layer, QuantLinear)
            tensor = layer.packed
            b = torch.empty_like(adapter.b.shown())
            b[tensor.file_rows] = adapter.b.shown()
            for name, values in (("lora_a", adapter.a.shown()), ("lora_b", b)):
                writer.add_tensor(f"{tensor.name}.{name}", values.contiguous().cpu().numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
