"""Folders in other tools' formats, written here bit by bit from random codes, with the weights that they stand for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

GROUP = 64
AWQ_PLACES = [0, 2, 4, 6, 1, 3, 5, 7]
Made = tuple[dict[str, torch.Tensor], torch.Tensor]
"""A layer's tensors, by what their names end with, and its weight."""


def stream(values: np.ndarray, bits: int) -> np.ndarray:
    """(m, n) small integers -> int32 (m, n * bits / 32): each row's bits one after the other, by Python's own integers."""
    rows = []
    for row in values.tolist():
        whole = sum(int(value) << (bits * i) for i, value in enumerate(row))
        rows.append(np.frombuffer(whole.to_bytes(len(row) * bits // 8, "little"), np.int32))
    return np.stack(rows)


def gptq(rng, rows, columns, *, bits, symmetric, act_order=False, version=1, group=GROUP) -> Made:
    group = group or columns
    groups = -(-columns // group)
    codes = rng.integers(0, 2**bits, (columns, rows))
    zeros = np.full((groups, rows), 2 ** (bits - 1)) if symmetric else rng.integers(1, 2**bits, (groups, rows))
    scales = (rng.uniform(0.5, 1.5, (groups, rows)) * 0.06 / 2**bits).astype(np.float16)
    g_idx = np.arange(columns) // group
    if act_order:
        rng.shuffle(g_idx)
    weight = scales.astype(np.float32)[g_idx] * (codes - zeros[g_idx])
    tensors = {
        "qweight": torch.from_numpy(stream(codes.T, bits).T.copy()),
        "qzeros": torch.from_numpy(stream(zeros - (version == 1), bits)),
        "scales": torch.from_numpy(scales),
        "g_idx": torch.from_numpy(g_idx.astype(np.int32)),
    }
    return tensors, torch.from_numpy(weight.T.astype(np.float32))


def awq(rng, rows, columns) -> Made:
    groups = columns // GROUP
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(0, 16, (groups, rows))
    scales = (rng.uniform(0.5, 1.5, (groups, rows)) * 0.004).astype(np.float16)

    def packed(values):
        return torch.from_numpy(stream(values.reshape(len(values), -1, 8)[..., AWQ_PLACES].reshape(len(values), -1), 4))

    weight = scales.astype(np.float32).repeat(GROUP, 0) * (codes - zeros.repeat(GROUP, 0))
    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": torch.from_numpy(scales)}
    return tensors, torch.from_numpy(weight.T.astype(np.float32))


NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334]
NF4 += [-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224]
NF4 += [0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0]
FP4 = [x / 12 for x in (0, 0.0625, 8, 12, 4, 6, 2, 3)]
FP4 += [-x for x in FP4]


def four_bit(rng, rows, columns, *, kind, nested, block=GROUP) -> Made:
    table = torch.tensor({"nf4": NF4, "fp4": FP4}[kind])
    codes = rng.integers(0, 16, rows * columns)
    n = rows * columns // block
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": [rows, columns]}
    tensors = {
        "weight": torch.from_numpy((codes[::2] << 4 | codes[1::2]).astype(np.uint8)).unsqueeze(1),
        "weight.quant_map": table,
    }
    if nested:
        levels = torch.linspace(-1, 1, 256)
        tensors["weight.absmax"] = torch.from_numpy(rng.integers(0, 256, n).astype(np.uint8))
        tensors["weight.nested_absmax"] = torch.from_numpy(rng.uniform(0.005, 0.015, -(-n // 256)).astype(np.float32))
        tensors["weight.nested_quant_map"] = levels
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.03}
        scales = levels[tensors["weight.absmax"].long()] * tensors["weight.nested_absmax"].repeat_interleave(256)[:n] + 0.03
    else:
        scales = torch.from_numpy(rng.uniform(0.02, 0.04, n).astype(np.float32))
        tensors["weight.absmax"] = scales
    stored = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    tensors[f"weight.quant_state.bitsandbytes__{kind}"] = stored
    return tensors, (table[codes].view(n, block) * scales.unsqueeze(1)).view(rows, columns)


def eight_bit(rng, rows, columns) -> Made:
    codes = torch.from_numpy(rng.integers(-127, 128, (rows, columns)).astype(np.int8))
    largest = torch.from_numpy(rng.uniform(0.02, 0.06, rows).astype(np.float32))
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    return tensors, codes.float() * (largest / 127).unsqueeze(1)


def aqlm(rng, rows, columns, *, codebooks, bits) -> Made:
    codes = rng.integers(0, 2**bits, (rows, columns // 8, codebooks))
    table = (rng.standard_normal((codebooks, 2**bits, 1, 8)) * 0.02).astype(np.float16)
    scales = rng.uniform(0.5, 1.5, (rows, 1, 1, 1)).astype(np.float16)
    vectors = sum(table[i].astype(np.float32)[codes[..., i], 0] for i in range(codebooks))
    dtype = np.int8 if bits <= 8 else np.int16
    signed = np.where(codes >= 2 ** (bits - 1), codes - 2**bits, codes).astype(dtype)
    tensors = {"codes": torch.from_numpy(signed), "codebooks": torch.from_numpy(table), "scales": torch.from_numpy(scales)}
    return tensors, torch.from_numpy(vectors.reshape(rows, columns) * scales.astype(np.float32).reshape(rows, 1))


AUTOROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
AQLM = {"quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True, "load_in_8bit": False}
FORMATS = {
    "gptq-4": (gptq, {"bits": 4, "symmetric": True}, {"bits": 4}),
    "gptq-4 in act-order": (gptq, {"bits": 4, "symmetric": False, "act_order": True}, {"bits": 4, "desc_act": True}),
    "gptq-3": (gptq, {"bits": 3, "symmetric": False, "act_order": True}, {"bits": 3, "desc_act": True}),
    "gptq-2": (gptq, {"bits": 2, "symmetric": False}, {"bits": 2}),
    "gptq-8, a group a row": (gptq, {"bits": 8, "symmetric": False, "group": 0}, {"bits": 8, "group_size": -1}),
    "gptq-4, groups of 128": (gptq, {"bits": 4, "symmetric": True, "group": 128}, {"bits": 4, "group_size": 128}),
    "gptq-v2": (gptq, {"bits": 4, "symmetric": False, "version": 2}, {"bits": 4, "checkpoint_format": "gptq_v2"}),
    "autoround": (gptq, {"bits": 4, "symmetric": True}, {"bits": 4, **AUTOROUND}),
    "awq": (awq, {}, {"quant_method": "awq", "bits": 4, "version": "gemm"}),
    "nf4": (four_bit, {"kind": "nf4", "nested": False}, BNB | {"bnb_4bit_quant_type": "nf4"}),
    "nf4, blocks of 128": (four_bit, {"kind": "nf4", "nested": False, "block": 128}, BNB | {"bnb_4bit_quant_type": "nf4"}),
    "nf4, nested": (four_bit, {"kind": "nf4", "nested": True}, BNB | {"bnb_4bit_quant_type": "nf4"}),
    "fp4": (four_bit, {"kind": "fp4", "nested": False}, BNB | {"bnb_4bit_quant_type": "fp4"}),
    "aqlm 2x8": (aqlm, {"codebooks": 2, "bits": 8}, AQLM | {"num_codebooks": 2, "nbits_per_codebook": 8}),
    "aqlm 1x12": (aqlm, {"codebooks": 1, "bits": 12}, AQLM | {"num_codebooks": 1, "nbits_per_codebook": 12}),
    "int8": (eight_bit, {}, BNB | {"load_in_4bit": False, "load_in_8bit": True}),
}  # fmt: skip
"""How each is made, and what its config.json says (GPTQ with groups of 64 unless it says otherwise)."""


CODED = [name for name in FORMATS if not name.startswith("aqlm")]
"""Those whose codes are on a grid."""


def _projection(key: str, _tensor: torch.Tensor) -> bool:
    return key.endswith("_proj.weight")


def quantized_folder(
    dense: Path,
    folder: Path,
    name: str,
    *,
    shards: int = 1,
    seed: int = 0,
    chosen: Callable[[str, torch.Tensor], bool] = _projection,
) -> dict[str, torch.Tensor]:
    """Write a dense folder's shapes in a format, with random weights for the chosen matrices; returns these by name."""
    make, options, config = FORMATS[name]
    rng = np.random.default_rng(seed)
    shutil.copytree(dense, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    stored, weights = {}, {}
    for key, tensor in load_file(dense / "model.safetensors").items():
        if chosen(key, tensor):
            parts, weights[key] = make(rng, *tensor.shape, **options)
            stored |= {key.removesuffix("weight") + part: value.contiguous() for part, value in parts.items()}
        else:
            stored[key] = tensor
    described = json.loads((folder / "config.json").read_text())
    described["quantization_config"] = {"quant_method": "gptq", "group_size": GROUP} | config
    (folder / "config.json").write_text(json.dumps(described))
    write_shards(folder, stored, shards)
    return weights


def write_shards(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Write tensors into one file, or into shards with their index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    files = {name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in sorted(set(files.values())):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
