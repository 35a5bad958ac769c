"""Tiny GGUF files with random weights and a byte-level tokenizer, made on the spot."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gradless.blocks import BLOCK_TYPES, ZERO_AT, block_type

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, FFN, LAYERS, CONTEXT = 256, 4, 2, 64, 512, 2, 128


def _bytes_to_text() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes, in byte order."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


VOCABULARY = [*_bytes_to_text(), "th", "Ġth", "<|end|>"]
MERGES = ["t h", "Ġ th"]


def random_blocks(block_name: str, rows: int, columns: int, rng: np.random.Generator, size: float = 0.03) -> np.ndarray:
    """Random packed bytes of any type, with scales that make weights of about `size`."""
    block = block_type(block_name)
    blocks = columns // block.size
    packed = rng.integers(0, 256, (rows, blocks, block.nbytes), dtype=np.uint8)
    levels = {"Q8_0": 127, "Q6_K": 32 * 127, "Q5_K": 31 * 63, "Q4_K": 15 * 63, "Q3_K": 4 * 32, "Q2_K": 3 * 15, "IQ4_NL": 127}
    scale = size / levels.get(block_name, 8) * rng.uniform(0.5, 1.5, (rows, blocks, 1)).astype(np.float32)
    signed = scale * np.where(rng.random(scale.shape) < 0.5, -1, 1) if block.offset_at is None else scale
    width = block.scale_type.itemsize
    packed[..., block.scale_at : block.scale_at + width] = signed.astype(f"f{width}").view(np.uint8)
    if block.has_zero_point:
        packed[..., ZERO_AT : ZERO_AT + 2] = rng.integers(0, 17, scale.shape, dtype=np.int16).view(np.uint8)
    elif block.offset_at is not None:
        offset = scale * 7.5 if block.offset_unit is None else -scale * block.offset_unit
        packed[..., block.offset_at : block.offset_at + 2] = offset.astype(np.float16).view(np.uint8)
    return packed.reshape(rows, blocks * block.nbytes)


GATED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
UNGATED = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")
QKV_BIASES = ("attn_q.bias", "attn_k.bias", "attn_v.bias")
BIASES = (*QKV_BIASES, "attn_output.bias", "ffn_up.bias", "ffn_down.bias")
QK_NORMS = ("attn_q_norm", "attn_k_norm")
POST_NORMS = ("post_attention_norm", "post_ffw_norm")
PRE_NORMS = ("attn_norm", "ffn_norm")
LAYERS_OF: dict[str, tuple[str, ...]] = {
    "llama": (*PRE_NORMS, *GATED),
    "qwen2": (*PRE_NORMS, *GATED, *QKV_BIASES),
    "qwen3": (*PRE_NORMS, *GATED, *QK_NORMS),
    "gemma": (*PRE_NORMS, *GATED),
    "gemma2": (*PRE_NORMS, *GATED, *POST_NORMS),
    "gemma3": (*PRE_NORMS, *GATED, *QK_NORMS, *POST_NORMS),
    "phi3": (*PRE_NORMS, "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
    "olmo2": (*GATED, *QK_NORMS, *POST_NORMS),
    "exaone4": (*GATED, *QK_NORMS, *POST_NORMS),
    "glm4": (*PRE_NORMS, *(name for name in GATED if name != "ffn_gate"), *POST_NORMS),
    "stablelm": (*PRE_NORMS, "attn_norm.bias", "ffn_norm.bias", *GATED),
    "starcoder2": (*PRE_NORMS, "attn_norm.bias", "ffn_norm.bias", *UNGATED, *BIASES),
    "nemotron": (*PRE_NORMS, "attn_norm.bias", "ffn_norm.bias", *UNGATED),
    "arcee": (*PRE_NORMS, *UNGATED),
    "command-r": ("attn_norm", *GATED),
    "cohere2": ("attn_norm", *GATED),
}
"""The tensors of a layer, in the file's order: ".weight" unless they say ".bias". Architectures without a line have llama's."""
LAYER_NORMS = ("stablelm", "starcoder2", "nemotron", "command-r", "cohere2", "gpt2", "bloom", "falcon")
"""Architectures that subtract the mean; those with a bias of the last norm have one for each norm of `LAYERS_OF` too."""
OWN_HEADS = ("olmo2", "stablelm", "nemotron")
"""Those that llama.cpp does not open with a tied head."""
FUSED_GATES = ("phi3", "glm4")
FULL_QK_NORMS = ("olmo2",)
"""Architectures that normalize all heads together."""


def usual_metadata(architecture: str) -> dict[str, Any]:
    """What a tiny model of an architecture states, by whole keys."""
    own: dict[str, Any] = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }
    own["attention.layer_norm_epsilon" if architecture in LAYER_NORMS else "attention.layer_norm_rms_epsilon"] = 1e-5
    own["rope.freq_base"] = 10000.0
    if architecture in ("qwen3", "gemma", "gemma2", "gemma3"):
        own["attention.key_length"] = own["attention.value_length"] = 128 if architecture == "qwen3" else HEAD_DIM
    if architecture in ("gemma2", "gemma3", "cohere2"):
        own["attention.sliding_window"] = 64
    if architecture in ("command-r", "cohere2"):
        own["logit_scale"] = 0.0625
    if architecture in ("llama", "phi3", "stablelm", "nemotron", "glm4", "command-r", "cohere2"):
        own["rope.dimension_count"] = HEAD_DIM
    if architecture == "granite":
        own |= {"logit_scale": 4.0, "attention.scale": 0.1, "embedding_scale": 3.0, "residual_scale": 0.5}
    own["vocab_size"] = len(VOCABULARY)
    if architecture == "stablelm":
        own["use_parallel_residual"] = False
    last = len(VOCABULARY) - 1
    return {
        "general.name": f"tiny {architecture}".replace("phi3", "phi"),  # by that name llama.cpp looks for special tokens
        **{f"{architecture}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": VOCABULARY,
        "tokenizer.ggml.token_type": [1] * last + [3],
        "tokenizer.ggml.merges": MERGES,
        **{f"tokenizer.ggml.{name}_token_id": last for name in ("bos", "eos", "padding", "unknown")},
        "tokenizer.ggml.add_bos_token": False,
    }


def tiny_gguf(
    path: Path,
    architecture: str = "llama",
    block: str = "Q4_1",
    embedding: str = "Q8_0",
    seed: int = 0,
    *,
    metadata: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray | float | None] | None = None,
) -> Path:
    """Write a two-layer model of an architecture.

    Args:
        block: the type of its linear layers: a block type, F32, F16 or BF16.
        embedding: the type of its embedding.
        metadata: values that replace the usual ones or add to them (sizes follow), None to leave a key out. The
            architecture's name before a key is left out ("rope.scaling.type"); general ones are whole ("general.type").
        tensors: the same for tensors, which are written as F32: an array, or a number as the mean of random values in the
            usual shape ("output.weight": 0.0 is a head of its own, "blk.0.attn_q.bias": 0.0 a bias), or None.
    """
    rng = np.random.default_rng(seed)
    stated = usual_metadata(architecture)
    for key, value in (metadata or {}).items():
        whole = key.partition(".")[0] in ("general", "tokenizer", "split", "diffusion", architecture)
        stated[key if whole else f"{architecture}.{key}"] = value
    stated = {key: value for key, value in stated.items() if value is not None}
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in stated.items():
        writer.add_key_value(key, value, _value_type(value))

    shapes = _shapes(architecture, {key.removeprefix(f"{architecture}."): value for key, value in stated.items()})
    changed = {name: value for name, value in (tensors or {}).items() if not isinstance(value, float)}
    extra = {name: value for name, value in (tensors or {}).items() if isinstance(value, float)}
    names = _usual_tensors(architecture, stated[f"{architecture}.block_count"])
    for name in [*names, *(name for name in extra if name not in names)]:
        if name in changed:
            continue
        shape = shapes[name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]]
        shape = shape[:1] if name.endswith(".bias") else shape
        if name in extra or len(shape) == 1:
            kind, mean = "F32", extra.get(name, 0.0 if name.endswith(".bias") else 1.0)
        else:
            kind, mean = embedding if name.startswith(("token_embd", "output.")) else block, 0.0
        if kind in BLOCK_TYPES:
            data = random_blocks(kind, *shape, rng)
        else:
            values = mean + (0.1 if len(shape) == 1 else 0.03) * rng.standard_normal(shape)
            data = gguf.quantize(values.astype(np.float32), gguf.GGMLQuantizationType[kind])
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])
    for name, values in changed.items():
        if values is not None:
            writer.add_tensor(name, np.asarray(values, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value_type(value: Any) -> gguf.GGUFValueType:
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    if type(value) is int and value < 0:
        return gguf.GGUFValueType.INT32
    return gguf.GGUFValueType[kinds.get(type(value), "ARRAY")]


def _usual_tensors(architecture: str, layers: int) -> list[str]:
    of_layer = LAYERS_OF.get(architecture, LAYERS_OF["llama"])
    names = ["token_embd.weight", "output_norm.weight"]
    if architecture in OWN_HEADS:
        names.append("output.weight")
    if any(name.endswith("norm.bias") for name in of_layer):
        names.append("output_norm.bias")
    return names + [
        f"blk.{layer}.{name}" + ("" if name.endswith(".bias") else ".weight") for layer in range(layers) for name in of_layer
    ]


def _shapes(architecture: str, stated: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Of the tensors with names like these: (rows, columns) or (values,)."""
    hidden, ffn, heads = (stated[f"{name}"] for name in ("embedding_length", "feed_forward_length", "attention.head_count"))
    kv_heads = stated.get("attention.head_count_kv", heads)
    kv_heads = kv_heads[0] if isinstance(kv_heads, list) else kv_heads
    key = stated.get("attention.key_length", hidden // heads)
    value = stated.get("attention.value_length", hidden // heads)
    full = architecture in FULL_QK_NORMS
    norms = dict.fromkeys((*PRE_NORMS, *POST_NORMS, "output_norm"), (hidden,))
    words = (len(stated["tokenizer.ggml.tokens"]), hidden)
    return norms | {
        "token_embd": words,
        "output": words,
        "attn_q": (heads * key, hidden),
        "attn_k": (kv_heads * key, hidden),
        "attn_v": (kv_heads * value, hidden),
        "attn_qkv": (heads * key + kv_heads * (key + value), hidden),
        "attn_output": (hidden, heads * value),
        "attn_q_norm": (heads * key if full else key,),
        "attn_k_norm": (kv_heads * key if full else key,),
        "ffn_gate": (ffn, hidden),
        "ffn_up": (2 * ffn if architecture in FUSED_GATES else ffn, hidden),
        "ffn_down": (hidden, ffn),
    }


def tiny_data(path: Path, rows: int = 24) -> Path:
    """A headerless TSV that a model can learn: the label is which letter stands in the text."""
    letters = ("a", "z")
    path.write_text("".join(f"{letters[i % 2] * 3} word {i}\t{i % 2}\n" for i in range(rows)))
    return path
