"""blocks.py against the gguf package's own dequantization."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless.blocks import BLOCK_TYPES, block_type
from tests.strategies import EVERY_TYPE
from tests.tiny import random_blocks


@pytest.mark.parametrize("name", BLOCK_TYPES)
@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**32 - 1))
def test_a_block_reads_as_ggml_reads_it(name, seed):
    block, kind = BLOCK_TYPES[name], gguf.GGMLQuantizationType[name]
    assert gguf.GGML_QUANT_SIZES[kind] == (block.size, block.nbytes)
    raw = random_blocks(name, 3, 2 * block.size, np.random.default_rng(seed))
    packed = torch.from_numpy(raw.reshape(-1, block.nbytes))
    codes, multiplier, offset_multiplier = block.unpack(packed)
    weight = (block.field(packed, block.scale_at)[:, None] * multiplier)[..., None] * block.level(codes)
    if block.offset_at is not None:
        weight = weight + (block.field(packed, block.offset_at)[:, None] * offset_multiplier)[..., None]
    assert np.array_equal(weight.reshape(3, -1).numpy(), gguf.dequantize(raw, kind))


@pytest.mark.parametrize("name", EVERY_TYPE)
@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**32 - 1))
def test_codes_are_written_where_they_are_read(name, seed):
    block, rng = block_type(name), np.random.default_rng(seed)
    packed = torch.from_numpy(random_blocks(name, 4, block.size, rng).reshape(-1, block.nbytes))
    codes, *fields = block.unpack(packed)
    lowest, highest = block.codes
    assert torch.equal(block.pack(packed, codes.flatten(1)), packed)
    others = torch.from_numpy(rng.integers(lowest, highest + 1, (4, block.size)))
    written, *kept = block.unpack(block.pack(packed, others))
    assert torch.equal(written.flatten(1).long(), others)
    assert all(torch.equal(a, b) for a, b in zip(fields, kept, strict=True))
