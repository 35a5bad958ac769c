"""formats/gguf_config.py, gguf_rope.py and gguf_model.py: the forward is llama.cpp's, or the file is refused by name."""

import numpy as np
import pytest
import torch

from gradless.formats.gguf_config import ARCHITECTURES
from gradless.formats.gguf_model import load_gguf
from tests.llama_cpp import distance
from tests.tiny import HEAD_DIM, tiny_gguf

IDS = [(7 * i + i * i) % 250 for i in range(100)]
ENDS = (1, 2, 33, 100)
CLOSE = {"gemma": 0.002, "gemma2": 0.002, "gemma3": 0.002, "starcoder2": 0.002}
"""llama.cpp reads its GELU from a table of fp16; all others agree within this."""
FACTORS = np.geomspace(1, 8, HEAD_DIM // 2)
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32}


def loaded(path, dtype=torch.float32):
    return load_gguf(path, dtype=dtype, tokenizer="none")


def off(path, **more):
    """How far our log-probabilities are from llama.cpp's."""
    return distance(loaded(path).model, path, IDS, ENDS, **more)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_architecture_is_llama_cpps(tmp_path, architecture):
    assert off(tiny_gguf(tmp_path / "a.gguf", architecture, "F32", "F32")) < CLOSE.get(architecture, 1e-4)


VARIANTS = {
    "linear": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    "linear, unnamed": {"rope.scaling.factor": 4.0},
    "linear, its old name": {"rope.scale_linear": 4.0},
    "linear with an attention factor": {"rope.scaling.factor": 4.0, "rope.scaling.attn_factor": 1.3},
    "no scaling, with a factor": {"rope.scaling.type": "none", "rope.scaling.factor": 4.0},
    "yarn": YARN,
    "yarn of the whole context": {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
    "yarn without a factor": {"rope.scaling.type": "yarn"},
    "yarn that shrinks": YARN | {"rope.scaling.factor": 0.5},
    "yarn with an attention factor": YARN | {"rope.scaling.attn_factor": 1.2},
    "an attention factor alone": {"rope.scaling.attn_factor": 1.3},
    "another base": {"rope.freq_base": 500000.0},
}


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_positions(tmp_path, architecture, variant):
    more = {"attention.sliding_window_pattern": 2} if architecture == "gemma3" else {}
    path = tiny_gguf(tmp_path / "a.gguf", architecture, "F32", "F32", metadata=VARIANTS[variant] | more)
    assert off(path) < CLOSE.get(architecture, 1e-4)


RAMPS = {
    "fast": {"rope.scaling.yarn_beta_fast": 3.0},
    "slow": {"rope.scaling.yarn_beta_slow": 0.2},
    "multiplier": {"rope.scaling.yarn_log_multiplier": 0.7},
    "of one": {"rope.scaling.yarn_log_multiplier": 1.0, "rope.scaling.factor": 48.0},
    "growing": {"attention.temperature_scale": 0.4},
}


@pytest.mark.parametrize("variant", RAMPS)
def test_the_ramp_of_a_mistral3(tmp_path, variant):
    path = tiny_gguf(tmp_path / "a.gguf", "mistral3", "F32", "F32", metadata=YARN | RAMPS[variant])
    plain = tiny_gguf(tmp_path / "b.gguf", "mistral3", "F32", "F32", metadata=YARN)
    assert off(path) < 1e-4
    assert distance(loaded(plain).model, path, IDS) > 1e-3


TENSORS = {
    "frequencies' factors": ("llama", {}, {"rope_freqs.weight": FACTORS}),
    "frequencies' factors and yarn": ("llama", YARN, {"rope_freqs.weight": FACTORS}),
    "frequencies' factors and linear scaling": ("llama", {"rope.scaling.factor": 2.0}, {"rope_freqs.weight": FACTORS}),
    "a head of its own": ("llama", {}, {"output.weight": 0.0}),
    "a head of its own, gemma3": ("gemma3", {}, {"output.weight": 0.0}),
    "biases of q, k, v": ("llama", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases of q in one layer": ("llama", {}, {"blk.0.attn_q.bias": 0.0}),
    "biases of o": ("llama", {}, {f"blk.{i}.attn_output.bias": 0.0 for i in (0, 1)}),
    "biases of the MLP": ("llama", {}, {f"blk.{i}.ffn_{n}.bias": 0.0 for i in (0, 1) for n in ("gate", "up", "down")}),
    "a bias of the MLP": ("llama", {}, {"blk.1.ffn_up.bias": 0.0}),
    "biases, qwen3": ("qwen3", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases, gemma": ("gemma", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases, granite": ("granite", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases, nemotron": ("nemotron", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases, stablelm": ("stablelm", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "biases, glm4": ("glm4", {}, {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qkv"}),
    "no biases, qwen2": ("qwen2", {}, {f"blk.{i}.attn_{n}.bias": None for i in (0, 1) for n in "qkv"}),
    "a parallel residual": (
        "stablelm",
        {"use_parallel_residual": True},
        {f"blk.{i}.ffn_norm.{n}": None for i in (0, 1) for n in ("weight", "bias")},
    ),
}


@pytest.mark.parametrize("variant", TENSORS)
def test_tensors_that_a_file_may_have(tmp_path, variant):
    architecture, metadata, tensors = TENSORS[variant]
    path = tiny_gguf(tmp_path / "a.gguf", architecture, "F32", "F32", metadata=metadata, tensors=tensors)
    assert off(path) < CLOSE.get(architecture, 1e-4)


SIZES = {
    "llama": ("llama", {"attention.key_length": 96, "attention.value_length": 96, "rope.dimension_count": 96}),
    "llama without its rope dimensions": ("llama", {"rope.dimension_count": None}),
    "llama, kv heads missing": ("llama", {"attention.head_count_kv": None}),
    "llama, a size for each layer": ("llama", {"attention.head_count_kv": [2, 2]}),
    "llama, epsilon": ("llama", {"attention.layer_norm_rms_epsilon": 0.1}),
    "qwen3": ("qwen3", {"attention.key_length": 64, "attention.value_length": 64}),
    "qwen3, 96": ("qwen3", {"attention.key_length": 96, "attention.value_length": 96}),
    "gemma": ("gemma", {"attention.key_length": 128, "attention.value_length": 128}),
    "gemma2": ("gemma2", {"attention.key_length": 32, "attention.value_length": 32}),
    "gemma3": ("gemma3", {"attention.key_length": 128, "attention.value_length": 128}),
    "granite": ("granite", {"attention.key_length": 32, "attention.value_length": 32, "rope.dimension_count": 32}),
    "phi3, part of a head rotates": ("phi3", {"rope.dimension_count": 48}),
    "stablelm, part of a head rotates": ("stablelm", {"rope.dimension_count": 16}),
    "nemotron, part of a head rotates": ("nemotron", {"rope.dimension_count": 32}),
    "glm4, part of a head rotates": ("glm4", {"rope.dimension_count": 32}),
    "gemma2, windows": ("gemma2", {"attention.sliding_window": 8}),
    "gemma2, caps": ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}),
    "gemma2, layers as the 27B": ("gemma2", {"block_count": 46, "attention.key_length": 32, "attention.value_length": 32}),
    "gemma3, windows": ("gemma3", {"attention.sliding_window": 8}),
    "gemma3, layers": ("gemma3", {"attention.sliding_window": 8, "block_count": 7}),
    "gemma3, a pattern": ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 3, "block_count": 4}),
    "gemma3, a pattern of none": ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 0}),
    "gemma3, no windows": ("gemma3", {"attention.sliding_window": None, "rope.freq_base": 5e5}),
    "gemma3, bases": (
        "gemma3",
        {"rope.freq_base": 1e6, "rope.freq_base_swa": 5e3, "attention.sliding_window": 8, "block_count": 7},
    ),
    "gemma3, linear scaling": (
        "gemma3",
        {"rope.freq_base": 1e6, "rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "block_count": 7},
    ),
    "gemma3, yarn": ("gemma3", YARN | {"block_count": 7}),
    "gemma3, a cap": ("gemma3", {"final_logit_softcapping": 3.0}),
    "gemma3, layers as the 27B": ("gemma3", {"block_count": 62, "attention.key_length": 32, "attention.value_length": 32}),
    "cohere2, windows": ("cohere2", {"attention.sliding_window": 8, "block_count": 5}),
    "cohere2, a pattern": ("cohere2", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}),
    "cohere2, a scale": ("cohere2", {"logit_scale": 1.5}),
    "command-r, a scale": ("command-r", {"logit_scale": 1.5}),
    "granite, scales": ("granite", {"logit_scale": 0.5, "attention.scale": 0.5, "embedding_scale": 6.0, "residual_scale": 0.3}),
    "granite, scales missing": ("granite", {"attention.scale": None, "embedding_scale": None, "residual_scale": None}),
    "smollm3, layers": ("smollm3", {"block_count": 5}),
    "no experts": ("llama", {"expert_count": 0, "expert_used_count": 0}),
    "a window that nothing leaves": ("llama", {"attention.sliding_window": 4096}),
}


@pytest.mark.parametrize("variant", SIZES)
def test_sizes_windows_and_scales(tmp_path, variant):
    architecture, metadata = SIZES[variant]
    path = tiny_gguf(tmp_path / "a.gguf", architecture, "F32", "F32", metadata=metadata)
    assert off(path) < CLOSE.get(architecture, 1e-4) * (10 if metadata.get("block_count", 0) > 40 else 1)
