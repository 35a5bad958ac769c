"""The Triton kernels: on a GPU, or by Triton's interpreter (see conftest.py); and compiled for GPUs that are not here."""

import os
import subprocess
import sys

import pytest
import torch

from gradless.blocks import ZERO_AT, block_type
from gradless.kernels import reference
from gradless.kernels.self_test import first_difference, some_bytes
from gradless.noise import Direction, Signs, uniform_grid
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, Views
from tests.strategies import DISTRIBUTIONS, EVERY_TYPE

ops = pytest.importorskip("gradless.kernels.triton", reason="Triton is not installed")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
INTERPRETED = DEVICE.type == "cpu"
FEW = ("Q4_1", "Q6_K", "nf4/32", "uint4/64+zero", "int8/64+fp32")
WIDE = Move(Direction(3, 1, 4, uniform_grid(90)), 1.0)
INTEGER_TYPES = ["Q4_1", "Q6_K", "int8/64", "uint8/32+zero"]


def some(name: str, part: Part, rows: int = 5, blocks: int = 3) -> BlockWeight:
    block = block_type(name)
    packed = some_bytes((rows, blocks, block.nbytes)).to(DEVICE)
    for at, dtype in block.fields.items():
        top = packed[..., at + dtype.itemsize - 1]
        top.copy_(top % 40 if dtype is torch.float16 else torch.full_like(top, 60))  # finite, and not too small for fp16
    if block.has_zero_point:
        packed[..., ZERO_AT + 1] = 0
    weight = BlockWeight("w", block, packed, blocks_per_value=2 if block.has_zero_point else 1)
    weight.tune(part)
    return weight


def both_sides(move: Move) -> tuple[Move, Move]:
    return move, move._replace(coefficient=-move.coefficient)


@pytest.mark.parametrize("name", FEW)
def test_every_kernel_has_the_references_bits(name, monkeypatch):
    if INTERPRETED:  # it rounds a fused product and sum twice
        monkeypatch.setattr(ops, "linear_int8", reference.linear_int8)
    assert first_difference(ops, str(DEVICE), [name]) is None


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in EVERY_TYPE if name not in FEW])
def test_every_kernel_has_the_references_bits_on_every_type(name, monkeypatch):
    test_every_kernel_has_the_references_bits(name, monkeypatch)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("span", [1, 3, 32])
def test_noise_has_noise_pys_bits(distribution, span):
    direction = Direction(2**63 + 5, 2**31, 9, distribution, span)
    assert torch.equal(ops.coordinates(direction, "w", 3000, DEVICE).cpu(), direction.values("w", 0, 3000))
    signs = Signs(((direction, 0.3), (Direction(1, 2, 3, distribution, span), -0.7)))
    assert torch.equal(ops.coordinates(signs, "w", 300, DEVICE).cpu(), signs.values("w", 0, 300))


@pytest.mark.parametrize("name", INTEGER_TYPES)
@pytest.mark.parametrize("read", ["still", "scale", "two scales", "code", "two codes"])
def test_integer_products_are_the_references_but_for_one_rounding_a_group(name, read):
    tensor = some(name, Part.SCALE)
    if "code" in read:
        tensor.tuned = TunedCodes(stride=2)
    move = WIDE if "code" in read else Move(Direction(7, 1), 0.03)
    tensor.views = Views(() if read == "still" else both_sides(move) if "two" in read else (move,))
    rows = torch.tensor([4, 2, 0, 1], device=DEVICE)
    x = torch.randn(tensor.views.count, 7, tensor.columns, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ours, theirs = (each.linear_int8(tensor, rows, x) for each in (ops, reference))
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize("views", [0, 1, 2])
def test_few_tokens_meet_weights_that_are_never_stored(name, views, monkeypatch):
    tensor, rows = some(name, Part.SCALE, rows=40), torch.randperm(40, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    tensor.views = Views(both_sides(Move(Direction(7, 1), 0.03))[:views])
    x = torch.randn(max(1, views), 5, tensor.columns, generator=torch.Generator().manual_seed(0)).to(DEVICE).half()
    expected = reference.linear(tensor, rows, x.float())
    monkeypatch.setattr(ops, "dequantize", None)
    assert torch.allclose(ops.linear(tensor, rows, x).float(), expected, rtol=2e-3, atol=2e-3 * float(expected.abs().max()))


def test_views_of_two_directions_are_read_one_after_the_other():
    tensor, rows = some("Q4_1", Part.BOTH), torch.tensor([1, 3], device=DEVICE)
    tensor.views = Views((Move(Direction(1, 1), 0.1), Move(Direction(2, 1), 0.1)))
    assert torch.equal(ops.dequantize(tensor, rows, torch.float32), reference.dequantize(tensor, rows, torch.float32))


def test_every_program_compiles_for_gpus_that_are_not_here():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton_offline"]
    done = subprocess.run(command, env=compiling, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert {"dequantize, sm_80", "linear, sm_90", "linear_int8, sm_90", "move_codes, sm_80"} <= set(done.stdout.splitlines())
