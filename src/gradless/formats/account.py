"""The account of a load: every tensor of a file has a place in the model, and every parameter of the model is filled.

    account = Account(path, model)              # the model as its class makes it, before a tensor is placed
    account.place("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight")     # for each tensor with a place
    account.leave("model.layers.0.self_attn.q_proj.bias", values)                      # for each tensor without one
    notes = account.settle(model)               # the model as it will run; raises one sentence if something is wrong

No tensor is ignored because of its name. A tensor without a place is refused, unless its values prove that leaving it out
changes nothing: a bias of zeros for a layer that has none, or a buffer that equals the model's own. Such tensors are noted for
the user, and every export keeps them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from gradless.errors import GradlessError
from gradless.types import LanguageModel

SHOWN = 3
"""Largest number of names in a sentence."""
MASKED = -1e4
"""Largest score that an old mask buffer gives to hidden tokens."""
CLOSE = 2e-6
"""Largest relative difference between a derived fp32 buffer and the stored one: powers differ in the last bits between
machines."""
QUANTIZED = {
    *("qweight", "qzeros", "g_idx", "scales", "SCB", "absmax", "quant_map", "codes", "codebooks", "weight_format", "biases"),
    *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_zero_point", "weight_shape"),
    *("weight_scales", "input_scale", "input_amax", "W_q", "zero", "scale", "_data", "_scale"),
}
"""Endings of the names of packed layers' tensors in the formats of other tools."""
ADAPTER = (".base_layer.", ".lora_", ".modules_to_save.", ".original_module.")


class Account:
    """The use of every tensor of a file, and the source of every parameter and persistent buffer of a model.

    Args:
        path: of the file or folder, for messages.
        model: as its class makes it from the configuration; on the meta device or not.

    Attributes:
        expected: names of the model's parameters and persistent buffers.
        head: the name of the head's weight.
        placed: name in the model -> name in the file of the tensor that fills it.
    """

    def __init__(self, path: Path, model: LanguageModel) -> None:
        self.path = path
        self.expected = list(model.state_dict(keep_vars=True))
        self.tied: dict[str, str] = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
        self.head = {f"{path}.weight" for path, module in model.named_modules() if module is model.get_output_embeddings()}
        self.placed: dict[str, str] = {}
        self._left: dict[str, tuple[str, Tensor | None]] = {}
        self._unfit: dict[str, str] = {}

    def place(self, name: str, *places: str) -> None:
        """The file's tensor `name` fills the model's parameters or buffers `places`."""
        for place in places:
            if place in self.placed:
                self.unfit(name, f"{self.placed[place]} and {name}, which are both {place}")
            self.placed[place] = name

    def leave(self, name: str, values: Tensor | None = None, place: str | None = None) -> None:
        """The file's tensor `name` has no place.

        Args:
            name: of the tensor.
            values: of the tensor, which may prove it harmless; None if they cannot.
            place: the model's name for it, if that is another name.
        """
        self._left[name] = (place or name, values)

    def unfit(self, name: str, why: str) -> None:
        """The file's tensor `name` has a place, but cannot fill it."""
        self._unfit[name] = why

    def own_head(self) -> bool:
        """Whether the file holds a head and also the embedding that it is tied to. Then they are not tied, and both count."""
        heads = [{target, source} for target, source in self.tied.items() if {target, source} & self.head]
        return any(pair <= self.placed.keys() for pair in heads)

    def settle(self, model: LanguageModel) -> list[str]:
        """Close the account.

        Args:
            model: with every tensor in its place, and tied.

        Returns:
            Sentences for the user about tensors that change nothing and are not used.

        Raises:
            GradlessError: a tensor is left over, or a parameter or buffer is not filled.
        """
        noted: dict[str, list[str]] = {}
        foreign = []
        for name, (place, values) in self._left.items():
            reason = None if values is None else harmless(model, place, values)
            if reason is None:
                foreign.append(name)
            else:
                noted.setdefault(reason, []).append(name)
        missing = [name for name in self.expected if name not in self.placed and not self._is_tied(model, name)]
        tensors = [*model.named_parameters(), *model.named_buffers()]
        missing += [name for name, tensor in tensors if tensor.is_meta and name not in missing]
        if foreign or missing or self._unfit:
            raise GradlessError(self._refusal(foreign, missing, model))
        notes = [
            f"{self.path}: {_some(names)} ({reason}): not used, and kept as in the file" for reason, names in noted.items()
        ]
        own = [one for one, other in self.tied.items() if {one, other} <= self.placed.keys() and not _is_one(model, one, other)]
        if own:
            notes.append(f"{self.path}: {_some(own)} is the file's own, though its configuration ties it; the file's is read")
        return notes

    def _is_tied(self, model: LanguageModel, name: str) -> bool:
        """Whether the model's class ties a parameter to a filled one, and both are the same tensor."""
        pairs = [*self.tied.items(), *((source, target) for target, source in self.tied.items())]
        return any(one == name and other in self.placed and _is_one(model, one, other) for one, other in pairs)

    def _refusal(self, foreign: list[str], missing: list[str], model: LanguageModel) -> str:
        faults, kind = [], type(model).__name__
        if missing:
            faults.append(f"has no tensor for {_some(missing)} ({_counted(missing, 'parameter')} of {kind})")
        if foreign:
            faults.append(f"holds {_some(foreign)} ({_counted(foreign, 'tensor')} for which {kind} has no place)")
        if self._unfit:
            faults.append(
                f"holds what cannot be used: {'; '.join(list(self._unfit.values())[:SHOWN])} ({len(self._unfit)} in all)"
            )
        return f"{self.path} {', and '.join(faults)}; {_advice(foreign, missing)}."


def understood(config: Mapping[str, object], what: str, used: Collection[str], neutral: Collection[str]) -> None:
    """An account of a quantizer's settings: each is used, or changes no weight, or says nothing.

    Args:
        config: `quantization_config`.
        what: the quantizer's name.
        used: settings that are read.
        neutral: settings of how the file was made, or of kernels that gradless does not use.

    Raises:
        GradlessError: there is another one.
    """
    for name, value in config.items():
        if name != "quant_method" and name not in used and name not in neutral and value not in (None, {}, [], ""):
            raise GradlessError(
                f"{what} with {name} = {value!r}, a setting that gradless does not know and that may change the weights; "
                "quantize the model without it."
            )


def harmless(model: LanguageModel, place: str, values: Tensor) -> str | None:
    """Why a tensor without a place changes nothing, or None if its values do not prove it.

    Args:
        model: that has no place for the tensor.
        place: the model's name for it.
        values: of the tensor.
    """
    path, _, attribute = place.rpartition(".")
    module = _module(model, path)
    buffers = dict(model.named_buffers())
    if place in buffers:
        return "what the model derives" if _equal(values, buffers[place]) else None
    if attribute == "bias" and _is_without_bias(module, values):
        return "a bias of zeros for a layer that has none" if not values.any() else None
    if attribute == "inv_freq":
        derived = [buffer for name, buffer in buffers.items() if name.rpartition(".")[2] == attribute]
        return "what the model derives" if derived and all(_equal(values, each) for each in derived) else None
    if module is None:
        return None
    if attribute in ("bias", "mask", "causal_mask") and values.ndim in (2, 4) and _is_causal(values):
        return "the causal mask"
    if attribute == "masked_bias" and values.numel() == 1 and float(values) <= MASKED:
        return "the score of what a mask hides"
    if attribute == "position_ids" and torch.equal(values.flatten(), torch.arange(values.numel())):
        return "numbers of positions"
    return None


def _module(model: LanguageModel, path: str) -> nn.Module | None:
    try:
        found: nn.Module = model.get_submodule(path)
    except AttributeError:
        return None
    return found


def _is_without_bias(module: nn.Module | None, values: Tensor) -> bool:
    """Whether a module has a weight and no bias, and these values would fit as one."""
    if module is None or getattr(module, "bias", None) is not None or values.ndim != 1:
        return False
    if (rows := getattr(module, "out_features", None)) is None:  # do not unpack a packed layer's weight for this
        weight = getattr(module, "weight", None)
        rows = None if weight is None else len(weight)
    return bool(rows == len(values))


def _equal(stored: Tensor, derived: Tensor) -> bool:
    """Whether stored values equal the derived ones within the precision of their type."""
    if derived.is_meta or stored.shape != derived.shape:
        return False
    if not (stored.is_floating_point() and derived.is_floating_point()):
        return torch.equal(stored.double(), derived.cpu().double())
    near = max(CLOSE, torch.finfo(stored.dtype).eps)
    return torch.allclose(stored.double(), derived.cpu().double(), rtol=near, atol=0.0)


def _is_causal(values: Tensor) -> bool:
    """Whether a (1, 1, n, n) or (n, n) mask lets each position see itself and all earlier ones."""
    n = values.shape[-1]
    return values.numel() == n * n and torch.equal(values.reshape(n, n).bool(), torch.ones(n, n).tril().bool())


def _is_one(model: LanguageModel, one: str, other: str) -> bool:
    """Whether two names belong to the same tensor, packed or not."""
    (module, attribute), (twin, its) = (
        (_module(model, path), attribute) for path, _, attribute in (one.rpartition("."), other.rpartition("."))
    )
    if module is None or twin is None:
        return False
    if getattr(module, "packed", None) is not None:
        return getattr(twin, "packed", None) is module.packed
    return getattr(module, attribute, None) is getattr(twin, its, object())


def _counted(names: Collection[str], what: str) -> str:
    return f"{len(names)} {what}{'s' * (len(names) > 1)}"


def _some(names: Collection[str]) -> str:
    listed = ", ".join(list(names)[:SHOWN])
    return listed if len(names) <= SHOWN else f"{listed} and {len(names) - SHOWN} more"


def _advice(foreign: list[str], missing: list[str]) -> str:
    """Advice about tensors without a place and places without a tensor."""
    if any(part in f".{name}" for name in foreign for part in ADAPTER):
        return "an adapter in it was not merged: merge it, save the model and give that"
    if any(name.rpartition(".")[2] in QUANTIZED for name in foreign):
        return "these are a quantizer's, whose settings config.json does not state in a way that gradless reads"
    prefixes = {name.removesuffix(place) for name in foreign[:SHOWN] for place in missing if name.endswith(f".{place}")}
    if prefixes:
        return f"names begin with {min(prefixes)}, as of a model inside of another: save the language model alone and give that"
    return "weights and config.json are not of one model that gradless can hold: download it again, or give another"
