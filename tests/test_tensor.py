"""A packed weight, what is tuned of it, and how it is read."""

import pytest
import torch

from gradless import kernels
from gradless.blocks import block_type
from gradless.errors import GradlessError
from gradless.kernels.self_test import some_bytes
from gradless.noise import Direction
from gradless.spaces import BlockSpace, CodeSpace
from gradless.tensor import BlockWeight, CodebookWeight, Move, Part, Views

MOVE = Move(Direction(3, 1), 0.1)


def weight(name: str = "Q4_1", rows: int = 4, blocks: int = 2) -> BlockWeight:
    block = block_type(name)
    packed = some_bytes((rows, blocks, block.nbytes))
    for at, dtype in block.fields.items():
        packed[..., at + dtype.itemsize - 1] = 0x3C  # positive and finite
    return BlockWeight("w", block, packed)


def codebooks() -> CodebookWeight:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2, 256, 8, generator=generator)
    return CodebookWeight("w", some_bytes((4, 3, 2)).view(torch.int8), torch.full((4, 1), 0.5), vectors)


def read(w: BlockWeight | CodebookWeight) -> torch.Tensor:
    return kernels.dequantize(w, torch.arange(w.rows), torch.float32)


@pytest.mark.parametrize(("w", "part"), [(weight(), Part.BOTH), (codebooks(), Part.SCALE), (codebooks(), Part.CODEBOOK)])
def test_a_weight_as_if_its_values_were_others_leaves_the_weight_alone(w, part):
    w.tune(part)
    before, values = read(w), w.tuned_values.values
    w.views = Views((MOVE,))
    other = w.at(2 * values)
    assert torch.allclose(read(other), 2 * before)
    assert torch.equal(read(w.under()), before)
    assert w.tuned_values.values is values
    assert not torch.equal(read(w), before)


def test_other_values_are_read_inside_a_context_and_no_longer():
    w = weight()
    w.tune(Part.SCALE)
    before, values = read(w), w.tuned_values.values
    with w.read_at(torch.zeros_like(values)):
        assert not torch.equal(read(w), before)
    assert w.tuned_values.values is values
    assert torch.equal(read(w), before)


def test_a_materialized_move_is_the_viewed_one():
    space = BlockSpace(weight(), Part.SCALE)
    before = space.values.clone()
    with space.viewed(MOVE):
        viewed = read(space.weight)
    with space.materialized(MOVE):
        assert torch.equal(read(space.weight), viewed)
    assert torch.equal(space.values, before)
    assert space.weight.tuned_values.values is space.values


def test_tuned_values_never_share_the_files_memory():
    w = weight("nf4/32+fp32", rows=1, blocks=1)  # its one fp32 scale could be read in place
    before = w.packed.clone()
    BlockSpace(w).move([MOVE])
    assert torch.equal(w.packed, before)


def test_codes_that_name_vectors_are_no_steps():
    w = codebooks()
    assert not w.has_grid
    with pytest.raises(GradlessError, match="w is 2x8/8, whose codes name vectors"):
        CodeSpace(w)


def test_what_is_not_tuned_is_not_given():
    w = weight()
    with pytest.raises(ValueError, match="no values of w are tuned"):
        w.unit()
    CodeSpace(w)
    with pytest.raises(ValueError, match="no values of w are tuned"):
        w.unit()
    w.tune(Part.SCALE)
    with pytest.raises(ValueError, match="no codes of w are tuned"):
        _ = w.tuned_rows
