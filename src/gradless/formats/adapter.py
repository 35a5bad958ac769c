"""LoRA adapters (Hu et al., 2021, arXiv 2106.09685) whose factors live on a grid.

A frozen linear layer, packed or dense, gets y + (alpha / r) (x A.T) B.T. A and B are the levels of one grid times one scale a
layer; the base is never written. An adapter is saved as a PEFT folder, and for a GGUF base also as a GGUF adapter.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard

import gguf
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gradless.errors import GradlessError
from gradless.files import replacing
from gradless.formats.dense import DenseModel
from gradless.formats.gguf import GGUFFile
from gradless.formats.quantized import QuantizedModel
from gradless.grids import integers, lora_scale
from gradless.layers import QuantLinear
from gradless.noise import Direction, Stream, uniform
from gradless.spaces import GridSpace, Space, linear_layers
from gradless.targets import EVERYTHING, Targets

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoRA:
    """What the adapters of a run are.

    Attributes:
        rank: r.
        alpha: the update is alpha / r times B A.
        bits: of the factors' symmetric integer grid, 2 to 8.
        seed: of A's first values, uniform in +-1 / sqrt(in_features); B begins at zero.
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
        """A and B as a forward reads them now: fp32."""
        return self.a.shown(), self.b.shown()


class AdaptedModel:
    """A loaded model whose linear layers have adapters: what is tuned are their codes, and the model itself is left alone.

    Args:
        base: any model that gradless loads; its modules get hooks.
        lora: what the adapters are.

    Raises:
        GradlessError: the model has no linear layer.
    """

    output_name = "adapter"

    def __init__(self, base: QuantizedModel | DenseModel, lora: LoRA) -> None:
        self.base, self.lora = base, lora
        self.model, self.tokenizer, self.path = base.model, base.tokenizer, base.path
        self.quantized = base.quantized
        self.layers = adaptable(base)
        if not self.layers:
            raise GradlessError(f"{type(base.model).__name__} has no linear layer for an adapter.")
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
            GradlessError: the targets leave nothing.
        """
        return targets.choose([(path, path) for path in self.layers], self.layers) if kind == "codes" else []

    def grid_length(self, name: str) -> float:
        """How many steps the factors' grid has from end to end."""
        del name
        return integers(self.lora.bits).length

    def step_size(self, name: str) -> float:
        """The size of such a step in a layer's factors."""
        return new_adapter(name, self.layers[name], self.lora).a.scale

    def spaces(self, kind: str, names: list[str], *, clamp: bool = False, residual: bool = False) -> list[Space]:
        """Make the named layers' adapters, once; the spaces of their factors."""
        assert kind == "codes"
        found: list[Space] = []
        for name in names:
            assert name not in self.adapters, f"{name} has an adapter already"
            adapter = self.adapters[name] = new_adapter(name, self.layers[name], self.lora, clamp=clamp, residual=residual)
            attach(self.layers[name], adapter.factors, self.lora.factor)
            found += [adapter.a, adapter.b]
        return found

    def written(self, path: Path) -> list[Path]:
        """What `save` writes."""
        return [path, path.with_name(path.name + ".gguf")] if _is_gguf(self.base) else [path]

    def save(self, path: Path, spaces: list[Space]) -> None:
        """Write a PEFT folder; for a GGUF base a GGUF adapter beside it, under the folder's name and .gguf."""
        del spaces
        source = self.base.path
        write_peft(path, list(self.adapters.values()), self.lora, "" if source is None else str(source.resolve()))
        if _is_gguf(self.base):
            write_gguf(self.written(path)[1], self.base, list(self.adapters.values()), self.lora)


def _is_gguf(base: QuantizedModel | DenseModel) -> TypeGuard[QuantizedModel]:
    return isinstance(base, QuantizedModel) and isinstance(base.file, GGUFFile)


def adaptable(base: QuantizedModel | DenseModel) -> dict[str, Any]:
    """The linear layers that adapters go to, by their paths: those whose weights would be tuned otherwise."""
    if isinstance(base, QuantizedModel):
        linear = set(base.file.linear_layers())
        return {path: m for path, m in base.model.named_modules() if isinstance(m, QuantLinear) and m.packed.name in linear}
    chosen = linear_layers(base.model)
    return {path: m for path, m in base.model.named_modules() if chosen(path, m)}


def new_adapter(path: str, layer: Any, lora: LoRA, *, clamp: bool = False, residual: bool = False) -> Adapter:
    """A layer's factors as they begin: one scale for both, twice A's own range, so that B has room to grow from zero."""
    grid, shape = integers(lora.bits), (lora.rank, layer.in_features)
    names = (f"{path}.lora_A.weight", f"{path}.lora_B.weight")
    words = Direction(lora.seed, 0).words(names[0], Stream.INITIAL)
    a = (2 * uniform(words, 0, math.prod(shape), "cpu") - 1).view(shape) / math.sqrt(layer.in_features)
    scale = lora_scale(a, grid)
    device = (layer.packed.packed if isinstance(layer, QuantLinear) else layer.weight).device
    codes = (grid.nearest(a / scale).short(), torch.zeros(layer.out_features, lora.rank, dtype=torch.int16))
    each = zip(names, codes, strict=True)
    return Adapter(path, *(GridSpace(n, c.to(device), grid, scale, clamp=clamp, residual=residual) for n, c in each))


def attach(layer: nn.Module, factors: Callable[[], tuple[Tensor, ...]], factor: float) -> None:
    """Let a layer's forwards add factor * (x A.T) B.T, computed in fp32, with the (A, B) that `factors` gives."""

    def add(_layer: nn.Module, inputs: tuple[Tensor], y: Tensor) -> Tensor:
        a, b = factors()
        return y + (factor * (inputs[0].float() @ a.T @ b.T)).to(y.dtype)

    layer.register_forward_hook(add)


def write_peft(folder: Path, adapters: list[Adapter], lora: LoRA, base: str) -> None:
    """Write adapters as PEFT's LoRA folder, in fp32, which holds every level of the grid exactly."""
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


UNREAD = ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform")
"""What PEFT's configuration may ask for and gradless does not do."""


def attach_peft(base: QuantizedModel | DenseModel, folder: Path) -> None:
    """Let a loaded model run with the adapter of a PEFT folder.

    Raises:
        GradlessError: the folder holds no LoRA adapter, one for another model, or one with more than plain factors.
    """
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise GradlessError(f"{folder} holds no adapter that can be read ({error}); give a PEFT folder.") from error
    asked = [name for name in UNREAD if config.get(name)] + ["bias"] * (config.get("bias", "none") != "none")
    if config.get("peft_type") != "LORA" or asked or not {"r", "lora_alpha"} <= config.keys():
        what = f"a LORA adapter with {asked[0]}" if asked else f"a {config.get('peft_type')} adapter"
        raise GradlessError(f"{folder} holds {what}; gradless reads plain LORA adapters.")
    layers = adaptable(base)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, values in tensors.items():
        path, _, factor = name.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        pairs.setdefault(path, {})[factor] = values.float()
    for path, pair in pairs.items():
        layer = layers.get(path)
        shapes = {"lora_A": (config["r"], layer.in_features), "lora_B": (layer.out_features, config["r"])} if layer else {}
        if {factor: tuple(values.shape) for factor, values in pair.items()} != shapes:
            held = ", ".join(f"{factor} {tuple(values.shape)}" for factor, values in pair.items())
            raise GradlessError(f"{folder} does not fit this model: no linear layer {path or '(none)'} takes {held}.")
        assert layer is not None
        attach(layer, partial(tuple, (pair["lora_A"], pair["lora_B"])), config["lora_alpha"] / config["r"])
    if not pairs:
        raise GradlessError(f"{folder} holds an adapter without factors; it would change nothing.")


def write_gguf(path: Path, base: QuantizedModel, adapters: list[Adapter], lora: LoRA) -> None:
    """Write adapters as a GGUF file that llama.cpp applies to the base (F32; B's rows in the file's order)."""
    layers = dict(base.model.named_modules())
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(str(temporary), base.file.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", lora.alpha)
        for adapter in adapters:
            tensor = layers[adapter.path].packed
            b = torch.empty_like(adapter.b.shown())
            b[tensor.file_rows] = adapter.b.shown()
            for name, values in (("lora_a", adapter.a.shown()), ("lora_b", b)):
                writer.add_tensor(f"{tensor.name}.{name}", values.contiguous().cpu().numpy().astype(np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
