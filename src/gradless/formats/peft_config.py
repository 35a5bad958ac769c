"""The adapter_config.json of a PEFT folder: each key is used, changes no forward, or is refused with its value."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard, TypeVar

from gradless.errors import GradlessError
from gradless.readers.json import is_object, is_text, read_object

T = TypeVar("T")

CONFIG = "adapter_config.json"
USED = frozenset(
    {"peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"}
)
"""Keys that `PeftLoRA` is made from."""
RECORDS = frozenset(
    {
        *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"),  # its origin
        *(
            "lora_dropout",
            "eva_config",
            "loftq_config",
            "corda_config",
            "lora_ga_config",
        ),  # its training, or its initial values
        *("layers_to_transform", "layers_pattern", "ensure_weight_tying"),  # which layers have factors; the tensors show this
        *("fan_in_fan_out", "megatron_core", "qalora_group_size", "runtime_config"),  # other operations, or where they run
    }
)
"""Keys that change no forward, whatever they say."""
PLAIN: dict[str, tuple[object, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": (None, "none"),
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal", "mica"),  # the other values change the base too
}
"""Keys that change no forward if they have one of these values."""
OFF = frozenset(
    {
        *("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias", "megatron_config"),
        *("modules_to_save", "monteclora_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora"),
        *("use_qalora", "velora_config"),
    }
)
"""Keys that change no forward if they are null, false or empty. Keys that are in no list are treated alike."""
_PATTERN = re.compile(r"[\w.\\^$|\[\]-]*(?:[*+][\w.\\^$|\[\]-]*){0,3}")
"""Allowed regular expressions for names: no groups, and few repeats, so that matching is fast."""


@dataclass(frozen=True)
class PeftLoRA:
    """A LoRA adapter as its configuration describes it.

    Attributes:
        rank: r of the layers that no key of `ranks` matches.
        alpha: of the layers that no key of `alphas` matches.
        rank_stabilized: the update is alpha / sqrt(r) times B A instead of alpha / r (arXiv 2312.03732).
        ranks: regular expression for the end of a layer's name -> its r.
        alphas: regular expression for the end of a layer's name -> its alpha.
        targets: ends of the names of the layers with factors; None if only the tensors show them.
        excluded: ends of the names of layers without factors, although `targets` matches them.
    """

    rank: int
    alpha: float
    rank_stabilized: bool
    ranks: dict[str, int]
    alphas: dict[str, float]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]

    def rank_of(self, path: str) -> int:
        """r of a layer, by its name in the adapter."""
        return _matched(self.ranks, path, self.rank)

    def factor_of(self, path: str) -> float:
        """The factor of a layer's B A."""
        rank, alpha = self.rank_of(path), float(_matched(self.alphas, path, self.alpha))
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def names(self, path: str) -> bool:
        """Whether the configuration says that this layer has factors."""
        return self.targets is not None and _ends(path, self.targets) and not _ends(path, self.excluded)


def read_config(folder: Path) -> PeftLoRA:
    """The adapter that a PEFT folder's configuration describes.

    Raises:
        GradlessError: the configuration cannot be read, or is not that of plain LoRA.
    """
    try:
        config = read_object(folder / CONFIG, infinities=True)  # infinities are refused below, by name
    except GradlessError as error:
        raise GradlessError(f"{folder} holds no adapter that can be read; give a PEFT folder. {error}") from error
    if config.get("peft_type") != "LORA":
        raise GradlessError(f"{folder} holds a {config.get('peft_type')} adapter; gradless reads plain LORA adapters.")
    for key, value in config.items():
        if key not in USED | RECORDS and not _plain(key, value):
            raise _refused(folder, key, value)
    listed = not (config.get("layers_to_transform") or isinstance(config.get("exclude_modules"), str))
    return PeftLoRA(
        _each(folder, "r", config.get("r"), _rank),
        _each(folder, "lora_alpha", config.get("lora_alpha"), _number),
        _each(folder, "use_rslora", config.get("use_rslora") or False, _flag),
        _patterns(folder, "rank_pattern", config.get("rank_pattern"), _rank),
        _patterns(folder, "alpha_pattern", config.get("alpha_pattern"), _number),
        _names(folder, "target_modules", config.get("target_modules")) if listed else None,
        _names(folder, "exclude_modules", config.get("exclude_modules")) or (),
    )


def _plain(key: str, value: object) -> bool:
    if key in PLAIN:
        return any(value is each or (isinstance(value, str) and value == each) for each in PLAIN[key])
    return value is None or value is False or value in ([], {})


def _refused(folder: Path, key: str, value: object) -> GradlessError:
    hint = ""
    if key == "init_lora_weights":
        hint = (
            ": its base is not the model as it is; convert it with PEFT's save_pretrained(..., "
            "path_initial_model_for_weight_conversion=...)"
        )
    return GradlessError(
        f"{folder} holds a LORA adapter with {key} {reprlib.repr(value)}; gradless reads plain LORA adapters{hint}."
    )


def _rank(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31


def _number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**31


def _flag(value: object) -> TypeGuard[bool]:
    return isinstance(value, bool)


def _texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(map(is_text, value))


def _each(folder: Path, key: str, value: object, fits: Callable[[object], TypeGuard[T]]) -> T:
    if not fits(value):
        raise _refused(folder, key, value)
    return value


def _patterns(folder: Path, key: str, value: object, fits: Callable[[object], TypeGuard[T]]) -> dict[str, T]:
    patterns: dict[str, T] = {}
    for pattern, chosen in _each(folder, key, value or {}, is_object).items():
        try:
            re.compile(pattern)
            readable = len(pattern) <= 200 and _PATTERN.fullmatch(pattern) is not None
        except re.error:
            readable = False
        if not readable or not fits(chosen):
            raise _refused(folder, key, {pattern: chosen})
        patterns[pattern] = chosen
    return patterns


def _names(folder: Path, key: str, value: object) -> tuple[str, ...] | None:
    """Ends of names; None if there are none, or a regular expression."""
    if value is None or isinstance(value, str):
        return None
    return tuple(_each(folder, key, value, _texts))


def _matched(chosen: dict[str, T], path: str, otherwise: T) -> T:
    """The value of the first pattern that matches a name from its beginning, or from a dot, to its end."""
    return next((value for pattern, value in chosen.items() if re.match(rf"(.*\.)?({pattern})$", path)), otherwise)


def _ends(path: str, ends: tuple[str, ...]) -> bool:
    return any(path == end or path.endswith("." + end) for end in ends)
