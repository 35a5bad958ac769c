"""`TunableModel`: what a run, a method's recipe and a replay need of a model, whatever file it lies in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from gradless.errors import GradlessError
from gradless.spaces import Space
from gradless.targets import EVERYTHING, Kind, Targets
from gradless.types import LanguageModel, Tokenizer

if TYPE_CHECKING:
    from gradless.formats.adapter import LoRA


class TunableModel(Protocol):
    """A loaded model.

    Attributes:
        model: the transformers model; there is none if only its file was opened, which is enough for a replay.
        tokenizer: its tokenizer, or None.
        quantized: whether the base's weights are packed.
        lora: the adapters that are tuned in place of the weights, or None.
    """

    @property
    def model(self) -> LanguageModel: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def quantized(self) -> bool: ...

    @property
    def lora(self) -> LoRA | None: ...

    @property
    def path(self) -> Path | None:
        """The file or folder of the base; None if the model came from none."""

    @property
    def output_name(self) -> str:
        """The name of the tuned file or folder in a run's output."""

    def fingerprint(self) -> str:
        """One hash of the base's weights."""

    def identity(self) -> dict[str, str]:
        """The SHA-256 of each file beside the weights that matters, by its name."""

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """Names of what can be tuned of a `Kind`.

        Raises:
            GradlessError: the targets leave nothing.
        """

    @property
    def spaces(self) -> Callable[..., list[Space]]:
        """(kind, names, **options) -> spaces over the named tensors of a `Kind`; the options are those of a parameter group."""

    def save(self, path: Path) -> None:
        """Write the model, with what its spaces tuned, in the base's format.

        Raises:
            GradlessError: the tuned values are not finite, or the disk is full.
        """

    def written(self, path: Path) -> list[Path]:
        """The files and folders that `save` writes."""

    def is_centred(self, name: str) -> bool:
        """Whether a packed tensor's scales multiply numbers of both signs."""

    def has_offset(self, name: str) -> bool:
        """Whether a packed tensor's blocks hold offsets of their own."""

    def grid_length(self, name: str) -> float:
        """How many steps the grid of a tensor's codes has from end to end."""

    def step_size(self, name: str) -> float:
        """The mean size of such a step, in units of the weights."""


class Plain:
    """The answers of a model that has no packed tensors, no adapters, and one file or folder to write."""

    lora: LoRA | None = None

    def written(self, path: Path) -> list[Path]:
        """See `TunableModel`."""
        return [path]

    def is_centred(self, name: str) -> bool:
        """See `TunableModel`."""
        raise NotImplementedError(name)

    def has_offset(self, name: str) -> bool:
        """See `TunableModel`."""
        raise NotImplementedError(name)

    def grid_length(self, name: str) -> float:
        """See `TunableModel`."""
        raise NotImplementedError(name)

    def step_size(self, name: str) -> float:
        """See `TunableModel`."""
        raise NotImplementedError(name)


def scales(model: TunableModel, **options: object) -> list[Space]:
    """Spaces over the scales of a model's quantized linear layers, relative to each scale."""
    return _blocks(model, "scale", options)


def offsets(model: TunableModel, **options: object) -> list[Space]:
    """Spaces over the offsets of a model's quantized linear layers; over the scales of blocks without offsets."""
    return _blocks(model, "offset", options)


def _blocks(model: TunableModel, part: str, options: dict[str, object]) -> list[Space]:
    return model.spaces(Kind.BLOCKS, _named(model, Kind.BLOCKS), part=part, **options)


def codes(model: TunableModel, **options: object) -> list[Space]:
    """Spaces over the integer codes of a model's quantized linear layers."""
    return model.spaces(Kind.CODES, _named(model, Kind.CODES), **options)


def _named(model: TunableModel, kind: Kind) -> list[str]:
    names = model.tunable(kind)
    if not names:
        raise GradlessError(f"{model.path} has no {kind} to tune; give a quantized file or folder.")
    return names
