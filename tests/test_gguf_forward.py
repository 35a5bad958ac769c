"""formats/gguf_config.py, gguf_rope.py and gguf_model.py: the forward is llama.cpp's, or the file is refused by name."""

import numpy as np
import pytest
import torch

from gradless.errors import GradlessError
from gradless.formats.gguf_config import ARCHITECTURES
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from tests.llama_cpp import distance
from tests.tiny import HEAD_DIM, LAYERS_OF, tiny_gguf

IDS = [(7 * i + i * i) % 250 for i in range(100)]
ENDS = (1, 2, 33, 100)
CLOSE = {"gemma": 0.002, "gemma2": 0.002, "gemma3": 0.002, "starcoder2": 0.002}
"""llama.cpp reads its GELU from a table of fp16; all others agree within this."""
FACTORS = np.geomspace(1, 8, HEAD_DIM // 2)
PAIR = {"rope_factors_short.weight": FACTORS**0.3, "rope_factors_long.weight": FACTORS}
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


SLOW = [pytest.param(architecture, marks=pytest.mark.slow) for architecture in ("qwen2", "qwen3", "gemma3", "phi3")]


@pytest.mark.parametrize("architecture", ["llama", *SLOW])
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
    "a pair of factors": ("llama", {"rope.scaling.type": "longrope"}, dict.fromkeys(PAIR, FACTORS)),
    "a parallel residual in words only": ("stablelm", {"use_parallel_residual": True}, {}),
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
    "glm4, a part that rounds": (
        "glm4",
        {"attention.key_length": 44, "attention.value_length": 44, "rope.dimension_count": 30},
    ),
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


DEEP = [pytest.param(variant, marks=pytest.mark.slow) for variant in SIZES if "27B" in variant]


@pytest.mark.parametrize("variant", [*(variant for variant in SIZES if "27B" not in variant), *DEEP])
def test_sizes_windows_and_scales(tmp_path, variant):
    architecture, metadata = SIZES[variant]
    path = tiny_gguf(tmp_path / "a.gguf", architecture, "F32", "F32", metadata=metadata)
    assert off(path) < CLOSE.get(architecture, 1e-4) * (10 if metadata.get("block_count", 0) > 40 else 1)


# -- the forward that runs: packed, in bf16, with fused passes ----------------------------------------------------------

PACKED = {
    "llama, factors": ("llama", {}, {"rope_freqs.weight": FACTORS}),
    "llama, biases and a head": (
        "llama",
        {},
        {"output.weight": 0.0} | {f"blk.{i}.attn_{n}.bias": 0.0 for i in (0, 1) for n in "qk"},
    ),
    "qwen2, yarn": ("qwen2", YARN, {}),
    "qwen3, heads of 96": ("qwen3", {"attention.key_length": 96, "attention.value_length": 96}, {}),
    "gemma3, windows": ("gemma3", {"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}, {}),
    "gemma2, windows and caps": ("gemma2", {"attention.sliding_window": 8, "attn_logit_softcapping": 2.0}, {}),
    "phi3, part of a head": ("phi3", {"rope.dimension_count": 48}, {}),
    "granite": ("granite", {}, {}),
    "cohere2, windows": ("cohere2", {"attention.sliding_window": 8}, {}),
}


@pytest.mark.parametrize("variant", PACKED)
def test_packed_in_bf16_with_fused_passes_it_is_the_same_model(tmp_path, variant):
    architecture, metadata, tensors = PACKED[variant]
    path = tiny_gguf(tmp_path / "a.gguf", architecture, metadata=metadata, tensors=tensors)
    exact, rounded = (loaded(path, dtype).model for dtype in (torch.float32, torch.bfloat16))
    with torch.inference_mode():
        ours, theirs = (model(torch.tensor([IDS]), use_cache=False).logits.float() for model in (exact, rounded))
    assert (ours - theirs).square().mean().sqrt() < 0.05 * ours.std()
    assert distance(exact, path, IDS, ENDS) < 0.1  # llama.cpp rounds activations to 8 bits


@pytest.mark.parametrize("variant", [variant for variant in PACKED if not variant.startswith("gemma2")])
def test_the_configuration_alone_says_the_forward(tmp_path, variant):
    """A dense model that is made from it, as `dequantize` writes one, is the same."""
    architecture, metadata, tensors = PACKED[variant]
    packed = loaded(tiny_gguf(tmp_path / "a.gguf", architecture, metadata=metadata, tensors=tensors))
    dense = dequantized(packed).float()
    with torch.inference_mode():
        ours, theirs = (model(torch.tensor([IDS]), use_cache=False).logits for model in (packed.model, dense))
    assert (ours - theirs).abs().max() < 0.05 * ours.std()  # `dequantized` rounds to bf16


# -- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "an unknown key": ("llama", {"attention.novel": 3}, {}, "states llama.attention.novel = 3, which is not read"),
    "a scale that llama has not": ("llama", {"attention.scale": 0.5}, {}, "states llama.attention.scale = 0.5"),
    "a cap": ("qwen3", {"attn_logit_softcapping": 30.0}, {}, "states qwen3.attn_logit_softcapping"),
    "a cap in gemma3": ("gemma3", {"attn_logit_softcapping": 30.0}, {}, "states gemma3.attn_logit_softcapping = 30"),
    "a negative cap": ("gemma2", {"final_logit_softcapping": -1.0}, {}, "states gemma2.final_logit_softcapping = -1"),
    "a window": ("llama", {"attention.sliding_window": 16}, {}, "states llama.attention.sliding_window = 16"),
    "a window, qwen2": ("qwen2", {"attention.sliding_window": 16}, {}, "states qwen2.attention.sliding_window = 16"),
    "a window of minus one": ("gemma3", {"attention.sliding_window": -1}, {}, "must be a whole number of at least 0"),
    "a list of windows": (
        "gemma3",
        {"attention.sliding_window_pattern": [True, False]},
        {},
        "for each layer, and not the same",
    ),
    "sight of what comes after": ("llama", {"attention.causal": False}, {}, "states llama.attention.causal = False"),
    "part of a head": ("llama", {"rope.dimension_count": 32}, {}, "states llama.rope.dimension_count = 32, with heads of 64"),
    "an odd part": ("phi3", {"rope.dimension_count": 33}, {}, "states phi3.rope.dimension_count = 33"),
    "keys unlike values": ("qwen3", {"attention.value_length": 64}, {}, "heads whose keys and values differ in size"),
    "heads for each layer": ("llama", {"attention.head_count_kv": [2, 4]}, {}, "for each layer, and not the same"),
    "an unknown scaling": ("llama", {"rope.scaling.type": "dynamic"}, {}, "states rope.scaling.type = 'dynamic'"),
    "a scaling that is no word": ("llama", {"rope.scaling.type": 3}, {}, "rope.scaling.type is 3; it must be a word"),
    "a negative factor": ("llama", {"rope.scaling.factor": -2.0}, {}, "states rope.scaling.factor = -2.0"),
    "a base of one": ("llama", YARN | {"rope.freq_base": 1.0}, {}, "is 1.0; it must be a finite number above 1"),
    "turns of zero": ("mistral3", YARN | {"rope.scaling.yarn_beta_slow": 0.0}, {}, "it must be a finite number above 0"),
    "a multiplier below zero": (
        "mistral3",
        YARN | {"rope.scaling.yarn_log_multiplier": -1.0},
        {},
        "yarn_log_multiplier = -1.0",
    ),
    "an epsilon below zero": ("llama", {"attention.layer_norm_rms_epsilon": -1.0}, {}, "it must be a finite number above 0"),
    "a scale of zero": ("granite", {"logit_scale": 0.0}, {}, "it must be a finite number above 0"),
    "a factor of infinity": ("llama", {"rope.scaling.factor": float("inf")}, {}, "is inf; it must be a finite number"),
    "alpha": ("llama", {"rope.scaling.alpha": 4.0}, {}, "states llama.rope.scaling.alpha"),
    "yarn's ends": ("llama", YARN | {"rope.scaling.yarn_beta_fast": 8.0}, {}, "states llama.rope.scaling.yarn_beta_fast = 8.0"),
    "yarn's share": ("qwen2", YARN | {"rope.scaling.yarn_ext_factor": 0.5}, {}, "states qwen2.rope.scaling.yarn_ext_factor"),
    "no epsilon": ("llama", {"attention.layer_norm_rms_epsilon": None}, {}, "has no llama.attention.layer_norm_rms_epsilon"),
    "no length": ("llama", {"context_length": 0}, {}, "is 0; it must be a whole number of at least 1"),
    "kv heads that divide none": ("qwen2", {"attention.head_count_kv": 3}, {}, "has 4 heads over 3 of keys and values"),
    "more layers than tensors": (
        "llama",
        {"block_count": 2},
        {"blk.2.attn_q.weight": np.ones((256, 256))},
        "tensors of 3",
    ),
    "no positions": ("granite", {"rope.scaling.finetuned": False}, {}, "states granite.rope.scaling.finetuned = False"),
    "an adapter": ("llama", {"general.type": "adapter"}, {}, "is an adapter"),
    "a projector": ("llama", {"general.type": "mmproj"}, {}, "is the projector of a multimodal model"),
    "an importance matrix": ("llama", {"general.type": "imatrix"}, {}, "is an importance matrix"),
    "a control vector": ("controlvector", {}, {}, "is a control vector, not a model"),
    "a part": ("llama", {"split.count": 3, "split.no": 1}, {}, "is one of 3 parts of a model"),
    "a diffusion model": ("llama", {"diffusion.shift_logits": True}, {}, "states diffusion.shift_logits"),
    "another architecture": ("rwkv6", {}, {}, "the architecture rwkv6 is not supported. Supported are llama, "),
    "experts": ("qwen2moe", {}, {}, "the architecture qwen2moe is not supported"),
    "llama's experts": ("llama", {}, {"blk.0.ffn_gate_inp.weight": np.ones((4, 256))}, "blk.0.ffn_gate_inp.weight"),
    "factors for qwen2": (
        "qwen2",
        {},
        {"rope_freqs.weight": FACTORS},
        "has rope_freqs.weight, where its architecture reads none",
    ),
    "factors for phi3": ("phi3", {}, {"rope_freqs.weight": FACTORS}, "has rope_freqs.weight, where"),
    "factors that are few": ("llama", {}, {"rope_freqs.weight": FACTORS[:5]}, "must be 32 positive numbers"),
    "factors that are negative": ("llama", {}, {"rope_freqs.weight": -FACTORS}, "must be 32 positive numbers"),
    "one of two": (
        "phi3",
        {},
        {"rope_factors_long.weight": FACTORS},
        "has rope_factors_long.weight, where its architecture reads rope_factors_short.weight and",
    ),
    "a pair without longrope": ("llama", {}, PAIR, "has rope_factors_short.weight"),
    "experts in words only": ("llama", {"expert_count": 8}, {}, "states llama.expert_count = 8"),
    "a bias that has no place": ("qwen2", {}, {"output.bias": np.ones(259)}, "output.bias|lm_head.bias"),
    "a norm that has no place": ("llama", {}, {"blk.0.attn_q_norm.weight": np.ones(64)}, "blk.0.attn_q_norm"),
    "a head in gemma": ("gemma", {}, {"output.weight": 0.0}, "has a head of its own"),
    "no head in olmo2": ("olmo2", {}, {"output.weight": None}, "has no head"),
    "a missing norm": ("llama", {}, {"blk.1.attn_norm.weight": None}, "input_layernorm.weight"),
    "a missing layer": (
        "llama",
        {"block_count": 3},
        {f"blk.1.{n}.weight": None for n in LAYERS_OF["llama"]},
        "3 layers .* of 2",
    ),
    "a missing bias": ("starcoder2", {}, {"blk.0.ffn_up.bias": None}, "has no blk.0.ffn_up.bias"),
    "a missing embedding": ("llama", {}, {"token_embd.weight": None}, "token_embd.weight is missing"),
    "another width": ("llama", {}, {"token_embd.weight": np.ones((259, 128))}, "259 x 128"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_computed_is_refused_by_name(tmp_path, case):
    architecture, metadata, tensors, sentence = REFUSED[case]
    path = tiny_gguf(tmp_path / "a.gguf", architecture, metadata=metadata, tensors=tensors)
    with pytest.raises(GradlessError, match=sentence):
        loaded(path)


def test_what_changes_no_forward_is_read_over(tmp_path):
    more = {"rope.scaling.finetuned": True, "tensor_data_layout": "Meta AI original pth", "general.sampling.temp": 0.7}
    plain, told = tiny_gguf(tmp_path / "a.gguf"), tiny_gguf(tmp_path / "b.gguf", metadata=more)
    with torch.inference_mode():
        one, other = (loaded(path).model(torch.tensor([IDS])).logits for path in (plain, told))
    assert torch.equal(one, other)


# -- Phi's two sets of factors -----------------------------------------------------------------------------------------

LONG = {
    "context_length": 512,
    "rope.scaling.attn_factor": 1.2,
    "rope.scaling.original_context_length": 256,  # no context of llama.cpp is shorter
}


@pytest.mark.parametrize("named", ["longrope", None])
def test_sequences_keep_to_the_context_that_short_factors_are_for(tmp_path, named):
    """llama.cpp chooses by the context that it is started with; here no row of a batch may choose for the others."""
    path = tiny_gguf(tmp_path / "a.gguf", "phi3", "F32", "F32", metadata=LONG | {"rope.scaling.type": named}, tensors=PAIR)
    model = loaded(path).model
    assert model.config.max_position_embeddings == 256
    assert distance(model, path, IDS, ENDS, context=256) < 1e-4
    assert distance(model, path, IDS, ENDS, context=512) > 1e-2


def test_factors_that_are_the_same_for_every_length_limit_none(tmp_path):
    path = tiny_gguf(tmp_path / "b.gguf", "phi3", "F32", "F32", metadata=LONG, tensors=dict.fromkeys(PAIR, FACTORS))
    model = loaded(path).model
    assert model.config.max_position_embeddings == 512
    ids = [i % 250 for i in range(300)]
    assert distance(model, path, ids, (100, 300), context=512) < 1e-4
