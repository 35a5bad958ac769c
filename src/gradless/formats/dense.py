"""Dense checkpoints: folders of safetensors that transformers loads. MeZO tunes them, and `dequantize` writes them."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats.account import Account
from gradless.formats.bounded import bounded, unbuildable
from gradless.formats.checkpoint import mapped, patch, rounded
from gradless.formats.folder import copy_folder, identity, read_headers, unread
from gradless.formats.model import Plain
from gradless.fusing import fuse
from gradless.readers.tensors import FLOAT_TYPES, TYPES, TensorInfo
from gradless.spaces import Space, check_finite, dense_spaces, parameter_sites
from gradless.targets import EVERYTHING, Kind, Targets
from gradless.types import LanguageModel, Tokenizer

ACCOUNTED = ("LOAD REPORT", "specifies to tie")
"""Parts of transformers' warnings that the account of a load repeats."""


@dataclass
class DenseModel(Plain):
    """A dense transformers model, and the folder that it came from, if any.

    Attributes:
        notes: sentences for the user about the load: those of `Account.settle`, and transformers' warnings.
        searched: the spaces that were made last.
    """

    model: LanguageModel
    tokenizer: Tokenizer | None = None
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    searched: list[Space] = field(default_factory=list)

    output_name = "model"
    quantized = False

    @classmethod
    @bounded(values_a_byte=1)
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Tokenizer | None = None,
        trust_remote_code: bool = False,
    ) -> DenseModel:
        """Load a folder: safetensors only, and Python code in the folder only if it is trusted.

        Raises:
            GradlessError: the folder cannot be read, or its tensors are not those of the model that config.json describes.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(path)
        tensors, _ = read_headers(path)
        if not (path / "config.json").is_file():
            raise GradlessError(f"{path} holds no model; a folder needs config.json and *.safetensors.")
        how: dict[str, object] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            with _overheard() as heard:
                model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **how)
        except (ValueError, OSError, KeyError, ImportError, RuntimeError) as error:
            if heard.report is not None:
                _settled(path, heard, tensors)  # raises a better sentence
            raise GradlessError(unbuildable(path, error)) from error
        if heard.report is None:
            raise GradlessError(f"this version of transformers does not say what it loaded of {path}; install 5.23.")
        notes = [*unread(path), *_settled(path, heard, tensors), *(f"transformers: {line}" for line in heard.warnings)]
        fuse(model.requires_grad_(False).eval())
        return cls(model, tokenizer or AutoTokenizer.from_pretrained(path, **how), path, notes)

    def fingerprint(self) -> str:
        """One hash of the folder's weights, or of the parameters if there is no folder."""
        if self.path is None:
            digest = hashlib.sha256()
            for name, parameter in self.model.named_parameters():
                digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()
        parts = "".join(f"{file.name}:{sha256(file)};" for file in sorted(self.path.glob("*.safetensors")))
        return hashlib.sha256(parts.encode()).hexdigest()

    def identity(self) -> dict[str, str]:
        """Name -> SHA-256 of each file beside the weights that matters; empty if there is no folder."""
        return {} if self.path is None else identity(self.path)

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """Names of the parameters that are searched; empty for other kinds.

        Raises:
            GradlessError: the targets choose nothing.
        """
        if kind != Kind.PARAMETERS:
            return []
        everything = parameter_sites(self.model, lambda _name, _module: True)
        return targets.choose([(name.rpartition(".")[0], name) for name in everything], list(parameter_sites(self.model)))

    def spaces(self, kind: str, names: list[str], *, master: bool = False) -> list[Space]:
        """Spaces over the named parameters.

        Raises:
            GradlessError: transformers cannot write the model in the form of its folder.
        """
        assert kind == Kind.PARAMETERS
        if self.path is not None:
            _written(self.model, self.path, read_headers(self.path)[0], values=False)
        wanted = set(names)
        self.searched = dense_spaces(self.model, lambda name, _module: name in wanted, master=master)
        return self.searched

    def save(self, path: str | Path) -> None:
        """Write the tuned folder, whole or not at all: a copy of the model's folder in which only tuned numbers differ.

        Each keeps the file's own type.

        Raises:
            GradlessError: a tuned number is not finite, or the disk is full.
        """
        path = Path(path)
        check_finite(self.searched)
        if self.path is None:
            write_folder(self.model, self.tokenizer, path)
            return
        tensors, _ = read_headers(self.path)
        before, after = mapped(tensors), _written(self.model, self.path, tensors)
        with replacing(path) as temporary:
            copy_folder(self.path, temporary)
            for name, values in after.items():
                old, info = before[name], tensors[name]
                moved = old.to(values.dtype) != values
                if moved.any():
                    patch(temporary / info.file.name, info, torch.where(moved, rounded(values.float(), old.dtype), old))


def write_folder(model: LanguageModel, tokenizer: Tokenizer | None, path: Path) -> None:
    """Save a model and its tokenizer to a folder, whole or not at all."""
    with replacing(path) as temporary:
        model.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)


class _Report(Protocol):
    """transformers' report of a load."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, Sequence[int], Sequence[int]]]
    conversion_errors: dict[str, object]


@dataclass
class _Heard:
    """Reports of transformers during a load.

    Attributes:
        model: the loaded model.
        report: the names that were filled, and those that were not, before any was initialized, tied or left out.
        warnings: the first lines of other warnings.
    """

    model: LanguageModel | None = None
    report: _Report | None = None
    warnings: list[str] = field(default_factory=list)


@contextmanager
def _overheard() -> Iterator[_Heard]:
    """Record transformers' reports and warnings inside. A class may declare any name ignorable, and the command line shows no
    warnings."""
    import copy

    from transformers import PreTrainedModel
    from transformers.utils import logging as their_logging

    heard = _Heard()
    finish = PreTrainedModel.mark_tied_weights_as_initialized

    def overhear(model: LanguageModel, report: _Report) -> object:
        heard.model, heard.report = model, copy.deepcopy(report)
        return finish(model, report)

    class Ear(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            line = record.getMessage().strip().splitlines()[0]
            counted = any(what in line for what in ACCOUNTED)
            if record.levelno >= logging.WARNING and not counted and line not in heard.warnings:
                heard.warnings.append(line)

    logger, ear = logging.getLogger("transformers"), Ear()
    their_logging.get_logger("transformers")  # sets its own handler up
    level, handlers = logger.level, list(logger.handlers)
    logger.setLevel(min(level or logging.WARNING, logging.WARNING))
    logger.handlers = [ear]
    PreTrainedModel.mark_tied_weights_as_initialized = overhear
    try:
        yield heard
    finally:
        PreTrainedModel.mark_tied_weights_as_initialized = finish
        logger.handlers = handlers
        logger.setLevel(level)


def _places(model: LanguageModel, names: list[str]) -> dict[str, tuple[str, bool]]:
    """Name in the folder -> (name in the model, whether transformers converts the tensor first, such as to fuse experts)."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    mapping = get_model_conversion_mapping(model) or []
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    own = model.state_dict()
    places = {}
    for name in names:
        place, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, own)
        if place not in own and name in own:
            place, pattern = name, None
        places[name] = (place, pattern is not None)
    return places


def _settled(path: Path, heard: _Heard, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Settle the account of a dense load and return its notes."""
    model, report, contents = heard.model, heard.report, mapped(tensors)
    assert model is not None
    assert report is not None
    account, own = Account(path, model), model.state_dict()
    places = _places(model, list(tensors))
    for name, (place, converted) in places.items():
        info = tensors[name]
        if place not in own:
            account.leave(name, contents[name], place)
            continue
        if info.type not in FLOAT_TYPES and (own[place].is_floating_point() or own[place].dtype is not TYPES[info.type]):
            account.unfit(name, f"{name} in {info.type}, where the model has {own[place].dtype}")
        if not converted:
            account.place(name, place)
    for place in own.keys() - report.missing_keys - account.placed.keys():
        account.place(place, place)
    for place, held, wanted in report.mismatched_keys:
        account.unfit(place, f"{place} of {tuple(held)}, where config.json says {tuple(wanted)}")
    for place, why in report.conversion_errors.items():
        account.unfit(place, f"{place}: {str(why).strip().splitlines()[-1]}")
    for place in report.unexpected_keys - {place for place, _ in places.values()}:
        account.leave(place)
    return account.settle(model)


def _written(model: LanguageModel, path: Path, tensors: Mapping[str, TensorInfo], *, values: bool = True) -> dict[str, Tensor]:
    """The model's parameters by their names, and in the form, of the folder; on the meta device without `values`.

    Raises:
        GradlessError: transformers cannot write them in that form.
    """
    from transformers.core_model_loading import revert_weight_conversion

    places = _places(model, list(tensors))
    own = {name: x.detach() if values else x.detach().to("meta") for name, x in model.state_dict().items()}
    reverted = dict(own)
    if any(converted for _, converted in places.values()):
        reverted |= revert_weight_conversion(model, own)
    found, prefix = {}, f"{model.base_model_prefix}."
    for name, (place, converted) in _places(model, list(tensors)).items():
        if not converted:
            written = own.get(place)
        else:
            written = next((reverted[n] for n in (name, prefix + name, name.removeprefix(prefix)) if n in reverted), None)
        if written is None:
            continue  # a noted tensor, which stays as it is
        if written.shape != tensors[name].shape:
            raise GradlessError(
                f"{path}: transformers writes {name} as {tuple(written.shape)}, not as it was; it cannot be tuned."
            )
        if tensors[name].type in FLOAT_TYPES:
            found[name] = written.contiguous()
    return found
