"""Tiny GGUF files with random weights and a byte-level tokenizer, made on the spot."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from gradless.blocks import ZERO_AT, block_type

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
    levels = {"Q8_0": 127, "Q6_K": 32 * 127, "Q5_K": 31 * 63, "Q4_K": 15 * 63, "Q3_K": 4 * 32, "Q2_K": 3 * 15}
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


def tiny_gguf(path: Path, architecture: str = "llama", block: str = "Q4_1", embedding: str = "Q8_0", seed: int = 0) -> Path:
    """Write a two-layer model of an architecture, its linear layers in one block type."""
    rng = np.random.default_rng(seed)
    head_dim = 128 if architecture == "qwen3" else HEAD_DIM  # transformers takes Qwen3's 128 as given
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_name(f"tiny {architecture}")
    writer.add_block_count(LAYERS)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    if architecture in ("qwen3", "gemma3"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if architecture == "gemma3":
        writer.add_sliding_window(64)
    if architecture == "llama":
        writer.add_rope_dimension_count(head_dim)
    writer.add_vocab_size(len(VOCABULARY))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(VOCABULARY)
    writer.add_token_types([1] * (len(VOCABULARY) - 1) + [3])
    writer.add_token_merges(MERGES)
    for add in (writer.add_bos_token_id, writer.add_eos_token_id, writer.add_pad_token_id, writer.add_unk_token_id):
        add(len(VOCABULARY) - 1)
    writer.add_add_bos_token(False)

    def matrix(name: str, rows: int, columns: int, kind: str) -> None:
        data = random_blocks(kind, rows, columns, rng)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def vector(name: str, n: int, mean: float = 1.0) -> None:
        writer.add_tensor(name, (mean + 0.1 * rng.standard_normal(n)).astype(np.float32))

    matrix("token_embd.weight", len(VOCABULARY), HIDDEN, embedding)
    vector("output_norm.weight", HIDDEN)
    for layer in range(LAYERS):
        prefix = f"blk.{layer}."
        vector(prefix + "attn_norm.weight", HIDDEN)
        vector(prefix + "ffn_norm.weight", HIDDEN)
        shapes = {
            "attn_q": (HEADS * head_dim, HIDDEN),
            "attn_k": (KV_HEADS * head_dim, HIDDEN),
            "attn_v": (KV_HEADS * head_dim, HIDDEN),
            "attn_output": (HIDDEN, HEADS * head_dim),
            "ffn_gate": (FFN, HIDDEN),
            "ffn_up": (FFN, HIDDEN),
            "ffn_down": (HIDDEN, FFN),
        }
        for name, (rows, columns) in shapes.items():
            matrix(f"{prefix}{name}.weight", rows, columns, block)
        if architecture == "qwen2":
            for name in ("attn_q", "attn_k", "attn_v"):
                vector(f"{prefix}{name}.bias", shapes[name][0], 0.0)
        if architecture in ("qwen3", "gemma3"):
            vector(prefix + "attn_q_norm.weight", head_dim)
            vector(prefix + "attn_k_norm.weight", head_dim)
        if architecture == "gemma3":
            vector(prefix + "post_attention_norm.weight", HIDDEN)
            vector(prefix + "post_ffw_norm.weight", HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tiny_data(path: Path, rows: int = 24) -> Path:
    """A headerless TSV that a model can learn: the label is which letter stands in the text."""
    letters = ("a", "z")
    path.write_text("".join(f"{letters[i % 2] * 3} word {i}\t{i % 2}\n" for i in range(rows)))
    return path
