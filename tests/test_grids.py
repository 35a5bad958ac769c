"""grids.py: levels in order, rounding to them, ranges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless import grids
from gradless.grids import GRIDS, NF4
from gradless.noise import Direction, Stream

EACH = pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS.keys())


@EACH
def test_levels_ascend_and_round_to_themselves(grid):
    table = grid.table()
    assert (table.diff() > 0).all()
    codes = torch.arange(grid.lowest, grid.highest + 1)
    assert torch.equal(grid.values(codes), table)
    assert torch.equal(grid.nearest(table), codes)
    assert torch.equal(grid.stochastic(table, Direction(0, 0).words("w", Stream.ROUNDING)), codes)
    assert -128 <= grid.lowest <= 0 <= grid.highest <= 127 or len(table) <= 128


def test_the_sizes_are_the_formats_own():
    assert [len(GRIDS[name].levels) for name in ("int4", "uint4", "int8", "uint8", "nf4")] == [15, 16, 255, 256, 16]
    assert len(GRIDS["fp8-e4m3"].levels) == 2 * 127 - 1
    assert max(GRIDS["fp8-e4m3"].levels) == 448
    assert len(GRIDS["fp8-e5m2"].levels) == 2 * 124 - 1
    assert max(GRIDS["fp8-e5m2"].levels) == 57344


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_rounding_to_nearest_is_torchs_own(dtype):
    x = torch.cat([torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 10**e for e in range(-3, 3)])
    assert torch.equal(grids.floating(dtype).values(grids.floating(dtype).nearest(x)), x.clamp(-448, 448).to(dtype).float())
    whole = torch.arange(-9, 9) / 2
    assert torch.equal(GRIDS["int8"].nearest(whole), whole.round().long())


@EACH
@settings(deadline=None, max_examples=20)
@given(st.floats(-1.2, 1.2))
def test_nearest_is_nearest(grid, share):
    x = torch.tensor([share * max(grid.levels)])
    assert (grid.values(grid.nearest(x)) - x).abs() <= (grid.table() - x).abs().min() * (1 + 1e-6)


@EACH
def test_stochastic_rounding_is_unbiased_between_neighbours(grid):
    """Also where the neighbours are not equally far: the mean is x within five standard errors."""
    table, n = grid.table(), 20_000
    for place in (0, len(table) // 3, len(table) - 2):
        low, high = table[place], table[place + 1]
        for share in (0.1, 0.5, 0.73):
            x = low + share * (high - low)
            codes = grid.stochastic(x.expand(n), Direction(place, 3).words("w", Stream.ROUNDING))
            assert set(codes.tolist()) <= {grid.lowest + place, grid.lowest + place + 1}
            error = (high - low) * (share * (1 - share) / n) ** 0.5
            assert abs(grid.values(codes).double().mean() - x) < 5 * error


@EACH
@given(st.integers(-300, 300))
def test_a_step_is_k_levels_and_stops_at_the_ends(grid, k):
    codes = torch.arange(grid.lowest, grid.highest + 1)
    stepped = grid.step(codes, k)
    assert torch.equal(stepped, (codes + k).clamp(codes[0], codes[-1]))


@given(st.integers(2, 8), st.floats(-3, 0), st.floats(0.1, 3))
def test_mid_tread_has_a_zero_and_stays_in_its_range(bits, low, high):
    grid, s = grids.mid_tread(bits, low, high)
    values = grid.table().double() * s
    assert s == pytest.approx((high - low) / (2**bits - 1))
    assert 0.0 in grid.levels
    assert values[0] >= low - 1e-6
    assert values[-1] <= high + 1e-6
    assert len(values) <= 2**bits


def test_mid_tread_needs_zero_inside():
    with pytest.raises(ValueError, match="around zero"):
        grids.mid_tread(4, 0.5, 1.0)


@pytest.mark.parametrize("name", ["int4", "uint4", "int8", "uint8", "nf4", "fp8-e4m3"])
def test_ranges_cover_their_groups_and_a_search_is_never_worse(name):
    grid, x = GRIDS[name], torch.randn(40, 64, generator=torch.Generator().manual_seed(0)) + 0.3
    x[7] = 0.0
    plain = grids.round_trip(x, grid, *grids.scale_and_offset(x, grid))
    searched = grids.round_trip(x, grid, *grids.scale_and_offset(x, grid, search=True))
    assert torch.equal(plain[7], x[7])
    scale, _ = grids.scale_and_offset(x, grid)
    assert ((plain - x).abs().amax(1) <= scale * grid.table().diff().max() / 2 + 1e-5).all()
    each = [(y - x).square().sum(1) for y in (searched, plain)]
    assert (each[0] <= each[1]).all()
    assert each[0].sum() < each[1].sum() or "8" in name


def test_an_adapters_range_leaves_b_room():
    a = torch.linspace(-0.05, 0.05, 11)
    grid = GRIDS["int8"]
    assert grids.lora_scale(a, grid) * grid.highest == pytest.approx(0.1)


def test_codebooks_are_sorted():
    with pytest.raises(ValueError, match="ascending"):
        grids.codebook("bad", (0.0, 1.0, 0.5))
    assert NF4.values(NF4.nearest(torch.tensor([0.04, -2.0]))).tolist() == pytest.approx([0.0796, -1.0], abs=1e-3)
