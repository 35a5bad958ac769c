"""Cells of GGUF files: every architecture that is read, and whatever its metadata can state, beside llama.cpp."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gradless.formats.gguf_config import ARCHITECTURES
from gradless.formats.gguf_model import load_gguf
from tests.conformance.cells import Cell, check_base, trying
from tests.llama_cpp import distance
from tests.test_gguf_forward import CLOSE, ENDS, IDS, RAMPS, SIZES, TENSORS, VARIANTS, YARN
from tests.tiny import tiny_gguf

GGUF = "GGUF"
ROUNDED = 0.2
"""How far log-probabilities of a Q4_1 file may be from llama.cpp's, which rounds activations to 8 bits."""
LEARNING = {kind: {"logit_scale": 1.0} for kind in ("command-r", "cohere2")}
"""What a tiny model of random weights needs for its answers to differ by more than rounding."""
Stated = tuple[str, Mapping[str, Any], Mapping[str, Any]]
"""An architecture and what its file states beside the usual: metadata and tensors."""


def stated() -> dict[str, Stated]:
    """What files may state, by a name: rope scalings, factors, biases, heads, windows, caps and scales."""
    found: dict[str, Stated] = {}
    for kind in ("llama", "qwen2", "qwen3", "gemma3", "phi3"):
        more = {"attention.sliding_window_pattern": 2} if kind == "gemma3" else {}
        found |= {f"{kind}: {name}": (kind, metadata | more, {}) for name, metadata in VARIANTS.items()}
    found |= {f"mistral3: yarn, {name}": ("mistral3", YARN | metadata, {}) for name, metadata in RAMPS.items()}
    found |= {f"{kind}: {name}": (kind, metadata, tensors) for name, (kind, metadata, tensors) in TENSORS.items()}
    return found | {f"{kind}: {name}": (kind, metadata, {}) for name, (kind, metadata) in SIZES.items()}


def names() -> list[tuple[str, str]]:
    """Architecture and format of every such cell."""
    return [(kind, GGUF) for kind in ARCHITECTURES] + [(kind, f"{GGUF}, {name}") for name, (kind, _, _) in stated().items()]


def check_gguf(architecture: str, form: str, folder: Path) -> Cell:
    """Try an architecture's file: forward, rows and methods, or, of what a file states, the forward alone."""
    with trying(architecture, form, folder) as cell:
        _, metadata, tensors = (architecture, {}, {}) if form == GGUF else stated()[form.removeprefix(f"{GGUF}, ")]
        path = tiny_gguf(folder / "exact.gguf", architecture, "F32", "F32", metadata=metadata, tensors=tensors)
        with cell.looking("logits"):
            deep = metadata.get("block_count", 0) > 40
            _agree(path, CLOSE.get(architecture, 1e-4) * (10 if deep else 1))
        if form == GGUF:
            base = tiny_gguf(folder / "base.gguf", architecture, metadata=LEARNING.get(architecture))
            with cell.looking("packed logits"):
                _agree(base, ROUNDED)
            check_base(cell, base, None, folder)
    return cell


def _agree(path: Path, tolerance: float) -> None:
    off = distance(load_gguf(path, dtype=torch.float32).model, path, IDS, ENDS)
    assert off < tolerance, f"log-probabilities are off by {off:.3g} from llama.cpp's"
