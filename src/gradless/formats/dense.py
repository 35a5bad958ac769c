"""Dense checkpoints: a folder of safetensors that transformers loads. What MeZO tunes, and what `dequantize` writes."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gradless.errors import GradlessError
from gradless.files import replacing, sha256
from gradless.formats.folder import unbuildable, weight_files
from gradless.fusing import fuse
from gradless.spaces import Space, check_finite, parameter_sites, parameters
from gradless.targets import EVERYTHING, Targets


@dataclass
class DenseModel:
    """A dense transformers model, and the folder it came from where it came from one."""

    model: Any
    tokenizer: Any = None
    path: Path | None = None

    output_name = "model"
    quantized = False

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        dtype: torch.dtype = torch.bfloat16,
        tokenizer: Any = None,
        trust_remote_code: bool = False,
    ) -> DenseModel:
        """Load a folder; safetensors only, and no Python of the folder's own unless it is trusted."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        path = Path(path)
        if not (path / "config.json").is_file():
            raise GradlessError(f"{path} holds no model; a folder needs config.json and *.safetensors.")
        weight_files(path)
        how: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
        try:
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **how)
        except (ValueError, OSError, KeyError) as error:
            raise GradlessError(unbuildable(path, error)) from error
        fuse(model.requires_grad_(False).eval())
        return cls(model, tokenizer or AutoTokenizer.from_pretrained(path, **how), path)

    def fingerprint(self) -> str:
        """One hash of the folder's weights, or of the parameters themselves where the model came from none."""
        if self.path is None:
            digest = hashlib.sha256()
            for name, parameter in self.model.named_parameters():
                digest.update(name.encode() + parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            return digest.hexdigest()
        parts = "".join(f"{file.name}:{sha256(file)};" for file in sorted(self.path.glob("*.safetensors")))
        return hashlib.sha256(parts.encode()).hexdigest()

    def tunable(self, kind: str, targets: Targets = EVERYTHING) -> list[str]:
        """Names of the parameters that are searched; of other kinds there are none.

        Raises:
            GradlessError: the targets leave nothing.
        """
        if kind != "parameters":
            return []
        everything = parameter_sites(self.model, lambda _name, _module: True)
        return targets.choose([(name.rpartition(".")[0], name) for name in everything], list(parameter_sites(self.model)))

    def spaces(self, kind: str, names: list[str], *, master: bool = False) -> list[Space]:
        """Spaces over the named parameters."""
        assert kind == "parameters"
        wanted = set(names)
        return parameters(self.model, lambda name, _module: name in wanted, master=master)

    def save(self, path: Path, spaces: list[Space]) -> None:
        """Write the tuned folder, whole or not at all.

        Raises:
            GradlessError: what was tuned is not finite, or the disk is full.
        """
        check_finite(spaces)
        write_folder(self.model, self.tokenizer, path)


def write_folder(model: Any, tokenizer: Any, path: Path) -> None:
    """Save a model and its tokenizer to a folder, under a temporary name first."""
    with replacing(path) as temporary:
        try:
            model.save_pretrained(temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
