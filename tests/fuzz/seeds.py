"""What the fuzzer begins with: small valid files, and one of each known kind of bad one."""

from __future__ import annotations

import json
import struct
from typing import Any

from tests.fuzz.mutate import Gguf, text

F32, Q8_0 = 0, 8


def gguf_file() -> Gguf:
    """A valid file with a value of every type."""
    scalars = zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
    strings = b"".join(map(text, (b"a", "ä".encode(), b"", b"word")))
    numbers = struct.pack("<IQ4f", 6, 4, 1, 2, 3, 4)
    keys = [
        (b"general.architecture", 8, text(b"llama")),
        (b"general.alignment", 4, struct.pack("<I", 32)),
        *((b"scalar.%d" % kind, kind, struct.pack("<" + code, 1)) for kind, code in scalars),
        (b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 4) + strings),
        (b"tokenizer.ggml.scores", 9, numbers),
        (b"flags", 9, struct.pack("<IQ3B", 7, 3, 1, 0, 1)),
        (b"nothing", 9, struct.pack("<IQ", 5, 0)),
    ]
    tensors = [(b"a.weight", [32, 2], Q8_0, 0), (b"b.weight", [5], F32, 96), (b"c.weight", [2, 2, 1, 1], F32, 128)]
    return Gguf(keys, tensors, bytes(160))


def bad_ggufs() -> dict[str, Gguf]:
    """Files made to hurt, by what they do."""

    def of(**changes: Any) -> Gguf:
        file = gguf_file()
        for name, value in changes.items():
            setattr(file, name, value)
        return file

    def tensor(shape: list[int], kind: int = F32, offset: int = 0, name: bytes = b"x") -> Gguf:
        return of(tensors=[(name, shape, kind, offset)])

    def key(kind: int, value: bytes, name: bytes = b"k") -> Gguf:
        return of(keys=[(name, kind, value)])

    def aligned(kind: int, value: bytes) -> Gguf:
        return key(kind, value, b"general.alignment")

    return {
        "sizes that overflow when they are padded (CVE-2025-53630)": of(
            tensors=[(b"a", [2**62 - 8], F32, 0), (b"b", [2**62 + 8], F32, 0)]
        ),
        "a size that overflows when it is counted in bytes (CVE-2026-27940)": tensor([2**61, 2, 2, 2]),
        "dimensions larger than the data (CVE-2026-7482)": tensor([1 << 20, 1 << 20]),
        "dimensions whose product is 2^64": tensor([2**32, 2**32]),
        "no dimensions": tensor([]),
        "a dimension of zero": tensor([0, 4]),
        "a dimension of 2^63": tensor([2**63]),
        "five dimensions": tensor([1] * 5),
        "an offset of 2^64 - 32": tensor([8], offset=2**64 - 32),
        "an offset off the alignment": tensor([8], offset=4),
        "overlapping tensors": of(tensors=[(b"a", [16], F32, 0), (b"b", [16], F32, 32)]),
        "one name twice": of(tensors=[(b"a", [8], F32, 0), (b"a", [8], F32, 32)]),
        "one key twice": of(keys=[(b"k", 0, b"\1"), (b"k", 0, b"\2")]),
        "an unknown type of tensor": tensor([8], kind=4),
        "a huge type of tensor": tensor([8], kind=2**32 - 1),
        "an unknown type of value": key(13, b"\0" * 8),
        "alignment 0": aligned(4, struct.pack("<I", 0)),
        "alignment 3": aligned(4, struct.pack("<I", 3)),
        "alignment 2^63": aligned(10, struct.pack("<Q", 2**63)),
        "alignment a string": aligned(8, text(b"32")),
        "alignment a float": aligned(6, struct.pack("<f", 32)),
        "alignment a list": aligned(9, struct.pack("<IQI", 4, 1, 32)),
        "alignment true": aligned(7, b"\1"),
        "a boolean of 2": key(7, b"\2"),
        "a string longer than the file": key(8, struct.pack("<Q", 2**40)),
        "a string of 2^64 - 1": key(8, struct.pack("<Q", 2**64 - 1)),
        "an array of 2^63 numbers": key(9, struct.pack("<IQ", 6, 2**63)),
        "an array of 2^61 strings": key(9, struct.pack("<IQ", 8, 2**61)),
        "an array whose last string is too long": key(9, struct.pack("<IQQ", 8, 1, 2**32)),
        "an array of arrays": key(9, struct.pack("<IQIQ", 9, 1, 0, 1)),
        "a string that is not UTF-8": key(8, text(b"\xff\xfe")),
        "a key that is not UTF-8": key(0, b"\1", b"\xff"),
        "2^63 tensors": of(counts=[2**63, None]),
        "2^63 keys": of(counts=[None, 2**63]),
        "version 1": of(version=1),
        "big-endian": of(version=3 << 24),
        "fewer scores than tokens": of(
            keys=[
                (b"tokenizer.ggml.tokens", 9, struct.pack("<IQ", 8, 2) + text(b"a") + text(b"b")),
                (b"tokenizer.ggml.scores", 9, struct.pack("<IQf", 6, 1, 0)),
            ]
        ),
        "tokens that are no strings": of(keys=[(b"tokenizer.ggml.tokens", 9, struct.pack("<IQI", 4, 1, 1))]),
    }


def safetensors(header: Any, data: bytes = b"") -> bytes:
    """A file around a header: a JSON value, or text."""
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(raw).to_bytes(8, "little") + raw + data


def safetensors_header() -> dict[str, Any]:
    """Of 48 bytes of data."""
    return {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b.c": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
        "d": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
        "e": {"dtype": "U8", "shape": [8, 1], "data_offsets": [40, 48]},
        "f": {"dtype": "F16", "shape": [0, 3], "data_offsets": [48, 48]},
    }


def bad_safetensors() -> dict[str, bytes]:
    """Files made to hurt, by what they do."""

    def of(entry: Any, data: int = 8) -> bytes:
        return safetensors({"a": entry}, bytes(data))

    def entry(**changes: Any) -> dict[str, Any]:
        return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes

    def without(name: str) -> dict[str, Any]:
        return {key: value for key, value in entry().items() if key != name}

    twice = json.dumps(entry())
    return {
        "a list": safetensors([]),
        "text": safetensors('"a"'),
        "deep nesting": safetensors("[" * 100_000 + "]" * 100_000),
        "deep nesting within": safetensors('{"a":' + "[" * 5000 + "]" * 5000 + "}"),
        "a tensor that is a list": of([]),
        "no dtype": of(without("dtype")),
        "no shape": of(without("shape")),
        "no data_offsets": of(without("data_offsets")),
        "a dtype that is a number": of(entry(dtype=3)),
        "a dtype that is a list": of(entry(dtype=[])),
        "an unknown dtype": of(entry(dtype="F31")),
        "a shape that is a number": of(entry(shape=2)),
        "a shape of text": of(entry(shape=["2"])),
        "a negative shape": of(entry(shape=[-1, -2])),
        "a fraction of a shape": of(entry(shape=[2.0])),
        "a true shape": of(entry(shape=[True, 2])),
        "a shape of 2^64": of(entry(shape=[2**64])),
        "a shape whose product overflows": of(entry(shape=[2**33, 2**33])),
        "a shape of another size": of(entry(shape=[3])),
        "negative offsets": of(entry(data_offsets=[-8, 0])),
        "reversed offsets": of(entry(data_offsets=[8, 0])),
        "fractional offsets": of(entry(data_offsets=[0.0, 8.0])),
        "one offset": of(entry(data_offsets=[8])),
        "three offsets": of(entry(data_offsets=[0, 4, 8])),
        "offsets beyond the file": of(entry(), data=4),
        "bytes of no tensor": of(entry(), data=12),
        "overlap": safetensors({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "a hole": safetensors({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
        "5,000 digits": safetensors('{"a":{"dtype":"F32","shape":[' + "1" * 5000 + '],"data_offsets":[0,8]}}', bytes(8)),
        "a number of 1e400": safetensors('{"a":{"dtype":"F32","shape":[1e400],"data_offsets":[0,8]}}', bytes(8)),
        "one name twice": safetensors(f'{{"a":{twice},"a":{twice}}}', bytes(8)),
        "metadata that is a list": safetensors({"__metadata__": [], "a": entry()}, bytes(8)),
        "metadata of numbers": safetensors({"__metadata__": {"a": 1}, "a": entry()}, bytes(8)),
        "half of a surrogate pair": safetensors('{"\\ud800":' + twice + "}", bytes(8)),
        "a header of 2^63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "an empty file": b"",
        "a field that nobody knows": of(entry(order="F")),
        "infinity": safetensors('{"a":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,8]}}', bytes(8)),
        "invalid UTF-8": (4).to_bytes(8, "little") + b'{"\xff',
        "a million objects": safetensors('{"a":[' + "{}," * 1_000_000 + "{}]}"),
    }


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 259,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "time_step_limit": [0.0, 1.0],
    "quantization_config": {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "dynamic": {"-:lm_head": {}},
    },
}
INDEX = {"metadata": {"total_size": 48}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
