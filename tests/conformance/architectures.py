"""Tiny random models of every causal architecture that transformers knows, made from its own list and its own defaults.

A configuration's fields are shrunk by their names. Where an architecture's sizes depend on each other in a way of its own, it
has a line in `OWN`. A new architecture of a new transformers appears by itself; if it cannot be built, the suite says so.
"""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.tiny import VOCABULARY

NOT_BUILT = {
    "blt": "its patches of bytes are cut by a second model",
    "cohere_compass_text": "its defaults do not fit each other",
    "dots3_note": "its default settings name layers that a small one does not have",
    "emu3": "the folder of its text part is none that AutoModelForCausalLM opens",
    "gemma3n": "its images are seen through the library timm",
    "gemma4_assistant": "it drafts tokens for another model, from that model's states",
    "gemma4_unified_assistant": "it drafts tokens for another model, from that model's states",
    "mllama": "the folder of its text part is none that AutoModelForCausalLM opens",
    "musicgen": "it writes codes of sound",
    "musicgen_melody": "it writes codes of sound",
    "moshi": "it writes codes of sound",
    "phi4_multimodal": "its adapters make 900 million weights of any size",
    "qwen4_exp": "its defaults do not fit each other",
    "qwen4_exp_text": "its defaults do not fit each other",
    "reformer": "its default settings do not fit a small size",
    "xmod": "it must be told a language before it is called",
}
"""Architectures that are left out, and why."""
KINDS: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - NOT_BUILT.keys()))
"""transformers' names of all other causal architectures."""

WORDS = len(VOCABULARY)
_FIELDS = {
    1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace num_dense_layers",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers num_decoder_layers
        num_key_value_heads swa_num_key_value_heads index_n_heads linear_num_key_heads
        num_experts_per_tok moe_topk moe_k top_k_experts""",
    4: """num_attention_heads n_head n_heads num_heads attention_heads swa_num_attention_heads linear_num_value_heads
        linear_num_heads decoder_attention_heads encoder_attention_heads num_encoder_attention_heads
        num_decoder_attention_heads num_experts num_local_experts n_routed_experts moe_num_experts""",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads mamba_num_heads",
    16: """head_dim swa_head_dim kv_channels dim_head attention_head_size index_head_dim linear_key_head_dim
        linear_value_head_dim v_head_dim qk_nope_head_dim query_pre_attn_scalar mamba_d_state state_size
        ssm_state_size mamba_head_dim mamba_chunk_size chunk_size block_size""",
    64: """hidden_size d_model n_embd embedding_size word_embed_proj_dim emb_dim moe_intermediate_size
        shared_expert_intermediate_size shared_intermediate_size expert_ffn_hidden_size moe_shared_expert_intermediate_size
        shared_experts_intermediate_size kv_lora_rank q_lora_rank o_lora_rank sliding_window sliding_window_size
        attention_window_size window_size linear_head_dim hidden_size_per_layer_input router_hidden_size mamba_d_ssm
        gated_norm_rank hc_lowrank pronunciation_vocab_size shape_vocab_size""",
    128: """intermediate_size intermediate_size_mlp dense_intermediate_size dim_ff feed_forward_size n_inner dff d_inner ffn_dim
        decoder_ffn_dim encoder_ffn_dim ffn_hidden_size""",
    256: """max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions
        original_max_position_embeddings""",
    WORDS: "vocab_size vocab_size_per_layer_input unpadded_vocab_size",
}
_SIZES = {name: size for size, names in _FIELDS.items() for name in names.split()}
"""What fields of these names become."""
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere": {"logit_scale": 1.0},  # else its losses are all alike
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4},
    },
    "deepseek_v4": {"o_groups": 1},
    "deepseek_v2": {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"num_key_value_heads": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},  # else its losses are all alike
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "olmo_hybrid": {"linear_key_head_dim": 16, "linear_value_head_dim": 32},
    "smollm3": {"no_rope_layers": [1, 0]},
    "zamba": {"layers_block_type": ["mamba", "mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 5},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
"""What an architecture needs beside it."""
MLA = "kv_lora_rank"


def tiny_config(kind: str) -> Any:
    """A configuration of an architecture, of its own defaults but for its sizes, with a layer of each kind that it has."""
    return _shrunk(type(AutoConfig.for_model(kind)), OWN.get(kind, {}))


def _shrunk(kind: type, own: dict[str, Any]) -> Any:
    default = kind()
    values = {field.name: field.default for field in fields(kind)}
    sizes = {name: size for name, size in _SIZES.items() if isinstance(values.get(name), int) and values[name] > 0}
    if MLA in values:
        sizes["num_key_value_heads"] = sizes["num_attention_heads"]
    sizes |= {name: 64 for name in ("mamba_dt_rank", "time_step_rank") if name in values}  # else a sixteenth of a tiny size
    sizes |= {name: 0 for name, value in values.items() if name.endswith("_token_id") and _beyond(value)}
    sizes |= {"is_decoder": True} if "is_decoder" in values else {}
    layers = list(getattr(default, "layer_types", None) or ())
    kinds = list(dict.fromkeys(layers))
    if "layer_types" in values and len(kinds) > 1:
        sizes |= {"layer_types": kinds, "num_hidden_layers": len(kinds)}
    elif len(kinds) > 1:
        sizes["num_hidden_layers"] = 1 + max(layers.index(kind) for kind in kinds)
    parts = {name: _shrunk(type(getattr(default, name)), {}) for name in kind.sub_configs if getattr(default, name, None)}
    return kind(**{**sizes, **parts, **own})


def _beyond(token: Any) -> bool:
    """Whether a token id is none of the tiny vocabulary."""
    return isinstance(token, int) and token >= WORDS


def tiny_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model of an architecture, whose values no zero and no equal rows hide."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data += noise * (0.02 if parameter.ndim == 1 else 0.05)
    return model.to(dtype).requires_grad_(False)
