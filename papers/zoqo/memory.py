"""ZOQO's Table V measured: peak memory of one update of a three-layer network, in full precision, with QAT, and with ZOQO.

    python papers/zoqo/memory.py [--json]    # prints the table; half a minute

The paper simulated the peak of a network whose widths it does not give. Here it is three square linear layers of WIDTH without
biases and ReLUs between them, which come near the paper's 903.71 MB in full precision, and a batch of 64:

    full precision    fp32 weights, gradients and the momentum of SGD: 12 bytes a weight
    QAT               the same on latent weights, fake-quantized to int8 before every matmul, straight-through gradients
    ZOQO              int8 codes with a scale for 64 of them, updated in place; the paper's whole steps and uniform noise
    ZOQO, default     as gradless runs it by default: one row in 16, with a byte a code of error feedback

Both of the first peak in the update: until then QAT has freed its rounded weights for the gradients and holds no momentum. Each
is a process of its own, and its zero is what it holds after one update of a tiny network, when everything is imported (see
benchmarks/memory.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from memory import Peak

from gradless import ZOQO, blocks
from gradless.layers import QuantLinear
from gradless.methods.codes import DEFAULT_STRIDE
from gradless.spaces import CodeSpace
from gradless.tensor import BlockWeight

WIDTH, TINY, LAYERS, BATCH = 4992, 64, 3, 64
PAPER = {"full precision": 903.71, "QAT": 583.83, "ZOQO": 371.21}
"""MB, simulated: arXiv 2501.06736, Table V."""


class FakeQuantized(nn.Linear):
    """A linear layer whose latent weight is rounded to int8 before every use; gradients pass the rounding unchanged."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low, high = self.weight.detach().aminmax()
        scale = float(torch.maximum(-low, high)) / 127
        return F.linear(x, torch.fake_quantize_per_tensor_affine(self.weight, scale, 0, -127, 127))


def network(layer: Callable[[int], nn.Module]) -> nn.Sequential:
    return nn.Sequential(*(part for i in range(LAYERS) for part in (layer(i), nn.ReLU())))[:-1]


def loss_of(model: nn.Module, width: int) -> Callable[[], torch.Tensor]:
    inputs = torch.randn(BATCH, width)
    return lambda: model(inputs).square().mean()


def first_order(width: int, kind: type[nn.Linear]) -> None:
    """Make a network and update it once."""
    model = network(lambda _: kind(width, width, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    loss_of(model, width)().backward()
    optimizer.step()


def zoqo(width: int, *, stride: int) -> None:
    """Make a network of random codes and update it once."""
    block = blocks.block_type("int8/64")

    def layer(i: int) -> QuantLinear:
        codes = torch.randint(-127, 128, (width, width // block.size, block.nbytes), dtype=torch.int8)
        packed = codes.view(torch.uint8)
        packed[..., block.scale_at : block.scale_at + 2] = torch.tensor([1e-4], dtype=torch.float16).view(torch.uint8)
        return QuantLinear(BlockWeight(f"layers.{i}", block, packed), None, torch.bfloat16)

    model = network(layer)
    spaces = [CodeSpace(one.packed, stride=stride, residual=stride > 1) for one in model if isinstance(one, QuantLinear)]
    as_in_the_paper = {"lr": 1.0, "eps": 1.0, "whole_steps": True, "distribution": "uniform"}
    optimizer = ZOQO(spaces, **({} if stride > 1 else as_in_the_paper))
    with torch.inference_mode():
        optimizer.step(loss_of(model, width))


ROWS: dict[str, Callable[[int], None]] = {
    "full precision": partial(first_order, kind=nn.Linear),
    "QAT": partial(first_order, kind=FakeQuantized),
    "ZOQO": partial(zoqo, stride=1),
    "ZOQO, default": partial(zoqo, stride=DEFAULT_STRIDE),
}


def peak_of(update: Callable[[int], None]) -> int:
    update(TINY)
    peak = Peak()
    update(WIDTH)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object: bytes by name")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(peak_of(ROWS[arguments.row]))
        return
    measured = {
        name: int(subprocess.run([sys.executable, __file__, "--row", name], check=True, stdout=subprocess.PIPE).stdout)
        for name in ROWS
    }
    if arguments.json:
        print(json.dumps(measured))
        return
    print("| | paper, simulated, MB | of full precision | measured, MB | of full precision |\n|---|---|---|---|---|")
    for name, peak in measured.items():
        published = f"{PAPER[name]:.2f} | {PAPER[name] / PAPER['full precision']:.2f}" if name in PAPER else "- | -"
        print(f"| {name} | {published} | {peak / 1e6:.2f} | {peak / measured['full precision']:.2f} |")


if __name__ == "__main__":
    main()
