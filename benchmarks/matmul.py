"""The integer product against the processor's limit and a bf16 product of the same shape; bf16 products of packed codes.

    python benchmarks/matmul.py [--json]

The limit is measured beside it, by a loop of vpdpbusd on registers (peak.cpp); without AVX-512 VNNI there is none.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import torch
from timing import medians, ratio, shown
from torch import Tensor

from gradless import kernels
from gradless.blocks import block_type
from gradless.formats.packed import packed_rows
from gradless.kernels.reference import products
from gradless.tensor import BlockWeight

SHAPES = {"2048x2048x2048": (2048, 2048, 2048), "512x576x1536": (512, 576, 1536), "512x1536x576": (512, 1536, 576)}
"""Tokens, columns, rows."""
ROUNDS = 20_000_000


def unpacked_first(tensor: BlockWeight, rows: Tensor, x: Tensor) -> Tensor:
    """x @ W.T by the library's product, with a whole W unpacked for it."""
    return products(x, kernels.dequantize(tensor, rows, x.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    variants, work = {}, {}
    if kernels.products()["int8"] == "AVX-512 VNNI":
        library = Path(tempfile.mkdtemp()) / "peak.so"
        command = ["g++", "-O2", "-fopenmp", "-shared", "-fPIC", str(Path(__file__).with_name("peak.cpp")), "-o", str(library)]
        subprocess.run(command, check=True)
        peak = ctypes.CDLL(str(library)).int8_peak
        variants["peak"] = lambda: peak(ctypes.c_int64(ROUNDS))
        work["peak"] = 128 * 12 * ROUNDS * torch.get_num_threads()
    for shape, (tokens, columns, rows) in SHAPES.items():
        x, weight, every = torch.randn(1, tokens, columns).bfloat16(), torch.randn(rows, columns), torch.arange(rows)
        variants[f"bf16 {shape}"] = partial(torch.nn.functional.linear, x, weight.bfloat16())
        for grid in ("int4", "int8"):
            name, packed = packed_rows(weight, "w", grid, 64, search=False)
            tensor = BlockWeight("w", block_type(name), packed)
            variants[f"{grid} {shape}"] = partial(kernels.linear_int8, tensor, every, x)
            if grid == "int4":
                variants[f"bf16 after unpacking int4 {shape}"] = partial(unpacked_first, tensor, every, x)
                variants[f"bf16 in panels of int4 {shape}"] = partial(kernels.linear, tensor, every, x)
        work |= {name: 2 * tokens * columns * rows for name in variants if name.endswith(shape)}
    times = medians(variants)
    ratios: dict[str, float | None] = {}
    for name in variants:
        if name.startswith("bf16 in panels"):
            ratios[f"after unpacking / {name}"] = ratio(times, name.replace("in panels of", "after unpacking"), name)
        if name.startswith("int"):
            ratios[f"bf16 / {name}"] = ratio(times, "bf16 " + name.split()[1], name)
            if "peak" in times:
                share = ratio(times, "peak", name)
                ratios[f"{name} / peak"] = None if share is None else share * work[name] / work["peak"]
    if arguments.json:
        print(json.dumps({"ratios": ratios, "times": times}))
        return
    for name, row in times.items():
        samples = f"{row['accepted']} undisturbed samples of {len(row['taken'])}"
        print(f"{name:40} {work[name] / row['median'] / 1e9:8.0f} GOP/s ({samples})")
    for name, value in ratios.items():
        print(f"{name:60} {shown(value)}")


if __name__ == "__main__":
    main()
