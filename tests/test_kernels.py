"""The compiled kernels against the reference: the same bits on random shapes, types, parts and moves."""

import shutil
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless import kernels, noise
from gradless.blocks import block_type
from gradless.kernels import reference
from gradless.kernels.self_test import first_difference
from gradless.noise import Direction, Rademacher, Signs
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, Views
from tests.strategies import DISTRIBUTIONS, EVERY_TYPE, INTEGER_DISTRIBUTIONS
from tests.tiny import random_blocks

cpu = pytest.importorskip("gradless.kernels.cpu", reason="the C++ kernels were not built", exc_type=OSError)

SPANS = st.sampled_from([1, 1, 3, 32, 256])
MOVES = st.builds(
    Move,
    st.builds(
        Direction, st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.integers(0, 9), st.sampled_from(DISTRIBUTIONS), SPANS
    ),
    st.floats(-3, 3, width=32),
    st.floats(0.5, 1.0, width=32),
)


def views_of(moves):
    """None; one; the two sides of a query; and two of different directions."""
    mirrored = moves.map(lambda move: (move, move._replace(coefficient=-move.coefficient)))
    return st.one_of(st.just(()), st.tuples(moves), mirrored, st.tuples(moves, moves))


VIEWS = views_of(MOVES)
VALUE_PARTS = [Part.SCALE, Part.OFFSET, Part.BOTH]
CODES = "codes"
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


def tune(weight: BlockWeight, what: str | None, *, relative: bool = True, stride: int = 1, clamp: bool = False) -> None:
    """Tune a part, CODES, or nothing."""
    if what == CODES:
        weight.tuned = TunedCodes(stride, clamp)
    elif what is not None:
        weight.tune(what, relative=relative)


def quant(name: str, rows: int, blocks: int, seed: int = 0) -> BlockWeight:
    block = block_type(name)
    packed = torch.from_numpy(random_blocks(name, rows, blocks * block.size, np.random.default_rng(seed)))
    return BlockWeight("w", block, packed.view(rows, blocks, block.nbytes), blocks_per_value=1 + seed % 3)


@given(
    codes=st.sampled_from([torch.int8, torch.int16]),
    bits=st.integers(3, 8),
    codebooks=st.integers(1, 8),
    size=st.sampled_from([4, 8, 16]),
    groups=st.integers(1, 9),
    dtype=DTYPES,
    seed=st.integers(0, 99),
)
@settings(max_examples=100, deadline=None)
def test_sums_of_vectors(codes, bits, codebooks, size, groups, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.randn(codebooks << bits, size, generator=generator)
    names = torch.randint(-(1 << bits - 1), 1 << bits - 1, (5, groups, codebooks), generator=generator).to(codes)
    ours, theirs = (kernels.vectors(names, table, dtype) for kernels in (cpu, reference))
    assert torch.equal(ours, theirs)
    first = sum(table.view(codebooks, -1, size)[k, int(names[0, 0, k]) % (1 << bits)] for k in range(codebooks))
    assert torch.allclose(theirs[0, :size].float(), first, rtol=2**-7, atol=2**-7)


def test_the_compiled_kernels_are_in_use_here():
    assert kernels.name() == "cpu", kernels.why_not_compiled()


def test_the_torch_path_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("GRADLESS_KERNELS", "torch")
    kernels._own.cache_clear()
    try:
        assert kernels.name() == "torch"
        assert kernels.why_not_compiled() == "GRADLESS_KERNELS=torch"
    finally:
        kernels._own.cache_clear()


@pytest.mark.parametrize("what", ["_STRUCTS", "Kind", "_FUNCTIONS"])
def test_a_library_of_other_sources_is_refused(monkeypatch, what):
    other = {"_STRUCTS": cpu._STRUCTS[::-1], "Kind": list(cpu.Kind)[1:], "_FUNCTIONS": {**cpu._FUNCTIONS, "new": (None, ())}}
    monkeypatch.setattr(cpu, what, other[what])
    with pytest.raises(OSError, match="was built from other sources; install gradless again"):
        cpu._load()


def test_a_kernel_that_differs_is_found_out(monkeypatch):
    assert first_difference(cpu) is None
    monkeypatch.setattr(cpu, "move_blocks", lambda weight, _moves: weight.tuned_values.values.add_(1e-6))
    assert first_difference(cpu) == "Q4_0, scale"


@settings(deadline=None, max_examples=40)
@given(MOVES, st.integers(0, 3000), st.integers(1, 5000))
def test_coordinates_have_noise_pys_bits(move, start, count):
    direction = move.direction
    drawn = cpu.coordinates(direction, "w", start + count, torch.device("cpu"))[start:]
    assert torch.equal(drawn, direction.values("w", start, count))


@settings(deadline=None, max_examples=20)
@given(MOVES, st.lists(st.text(max_size=9), min_size=1, max_size=9), st.integers(1, 3000))
def test_coordinates_of_each_have_noise_pys_bits(move, names, count):
    direction, device = move.direction, torch.device("cpu")
    assert torch.equal(
        cpu.coordinates_of_each(direction, names, count, device),
        reference.coordinates_of_each(direction, names, count, device),
    )


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(EVERY_TYPE),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from([None, *Part, CODES]),
    st.booleans(),
    VIEWS,
    DTYPES,
    st.integers(0, 99),
)
def test_dequantize_has_the_references_bits(name, rows, blocks, part, relative, views, dtype, seed):
    tensor = quant(name, rows, blocks, seed)
    tune(tensor, part, relative=relative)
    if part is not None:
        tensor.views = Views(views)
    some = torch.randint(rows, (rows + 3,), generator=torch.Generator().manual_seed(seed))
    ours, theirs = (ops.dequantize(tensor, some, dtype) for ops in (cpu, reference))
    assert torch.equal(ours, theirs)


@settings(deadline=None, max_examples=80)
@given(
    st.sampled_from(EVERY_TYPE),
    st.integers(1, 300),
    st.integers(1, 9),
    st.sampled_from(VALUE_PARTS),
    st.booleans(),
    st.lists(MOVES, min_size=1, max_size=4),
)
def test_move_blocks_has_the_references_bits(name, rows, blocks, part, relative, moves):
    ours, theirs = (quant(name, rows, blocks, seed=len(moves)) for _ in range(2))
    for tensor, ops in ((ours, cpu), (theirs, reference)):
        tensor.tune(part, relative=relative)
        ops.move_blocks(tensor, moves)
    assert torch.equal(ours.tuned_values.values, theirs.tuned_values.values)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40_000), DTYPES, DTYPES, st.booleans(), MOVES)
def test_moved_has_the_references_bits(n, source, dtype, stochastic, move):
    values = Direction(9, 9).values("x", 0, n).to(source)
    arguments = (values, "w", move, dtype)
    assert torch.equal(cpu.moved(*arguments, stochastic=stochastic), reference.moved(*arguments, stochastic=stochastic))


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(EVERY_TYPE), st.sampled_from(VALUE_PARTS), MOVES)
def test_a_scale_never_crosses_zero(name, part, move):
    tensor = quant(name, 8, 3)
    tensor.tune(part, relative=False)
    base = tensor.file_values(tensor.part)
    kernels.move_blocks(tensor, [move._replace(coefficient=100 * move.coefficient)])
    if tensor.keeps_sign:
        values = tensor.tuned_values.values
        assert ((values == 0) | (values.sign() == base.sign())).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(threads):
    before = torch.get_num_threads()
    tensor = quant("Q4_1", 500, 18)
    tensor.tune(Part.SCALE)
    tensor.views = Views((Move(Direction(1, 2), 0.01),))
    torch.set_num_threads(threads)
    try:
        rows = torch.arange(500)
        assert torch.equal(cpu.dequantize(tensor, rows, torch.bfloat16), reference.dequantize(tensor, rows, torch.bfloat16))
    finally:
        torch.set_num_threads(before)


def test_torchs_openmp_is_the_only_one():
    """In a process of its own: other libraries, such as scikit-learn, bring theirs into this one."""
    script = (
        "from gradless import kernels; from gradless.noise import Direction; import torch\n"
        "kernels.on('cpu').coordinates(Direction(0, 0), 'w', 1 << 20, torch.device('cpu')); assert kernels.name() == 'cpu'\n"
        "libraries = {line.split()[-1] for line in open('/proc/self/maps')}\n"
        "print(*(path for path in libraries if 'libgomp' in path or 'libomp' in path or 'libiomp' in path))"
    )
    runtimes = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout.split()
    assert len(runtimes) == 1, runtimes
    assert "/torch/" in runtimes[0]


def test_a_relative_move_of_the_offset_shifts_a_block_as_far_as_one_of_the_scale():
    shifts = []
    for part in (Part.SCALE, Part.OFFSET):
        tensor = quant("Q4_1", 64, 18)
        rows = torch.arange(64)
        still = kernels.dequantize(tensor, rows, torch.float32)
        tensor.tune(part)
        tensor.views = Views((Move(Direction(0, 0), 0.01),))
        moved = kernels.dequantize(tensor, rows, torch.float32)
        shifts.append(float((moved - still).view(64, 18, 32).mean(2).square().mean().sqrt()))
    assert shifts[0] == pytest.approx(shifts[1], rel=0.2)


@pytest.mark.parametrize(("eps", "least"), [(1e-2, 0.97), (1e-3, 0.5)])
def test_how_much_of_a_perturbation_survives_a_bf16_scratch(eps, least):
    """bf16 keeps 8 bits of a weight: a relative 1e-2 comes through, and 1e-3 is half lost. `info` warns below 0.9."""
    from gradless.report.info import ENOUGH, surviving

    cosine = surviving(quant("Q4_1", 256, 18), eps)
    assert cosine > least
    assert (cosine < ENOUGH) == (eps < 5e-3)


def test_stochastic_bf16_updates_are_unbiased_and_nearest_ones_vanish():
    x = torch.full((200_000,), 1.0, dtype=torch.bfloat16)
    tiny = Move(Direction(1, 0, 0, Rademacher()), 0.0, 1 + 1e-4)
    nearest = kernels.on("cpu").moved(x, "w", tiny, torch.bfloat16)
    stochastic = kernels.on("cpu").moved(x, "w", tiny, torch.bfloat16, stochastic=True)
    assert torch.equal(nearest, x)
    assert float(stochastic.double().mean() - 1) == pytest.approx(1e-4, rel=0.15)


INTEGER = st.builds(
    Direction, st.integers(0, 2**64 - 1), st.integers(0, 9), st.integers(0, 9), st.sampled_from(INTEGER_DISTRIBUTIONS), SPANS
)
SIGNS = st.builds(
    lambda terms, span: Signs(tuple((replace(direction, span=span), weight) for direction, weight in terms)),
    st.lists(st.tuples(INTEGER, st.floats(-2, 2, width=32)), min_size=1, max_size=3),
    SPANS,
)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(EVERY_TYPE),
    st.integers(1, 5),
    st.integers(1, 4),
    views_of(st.builds(Move, INTEGER, st.sampled_from([-1.0, 1.0]), st.just(1.0))),
    DTYPES,
    st.booleans(),
)
def test_a_query_reads_codes_as_the_reference_does_and_writes_none(name, rows, blocks, views, dtype, clamp):
    tensor = quant(name, rows, blocks)
    tensor.tuned, tensor.views = TunedCodes(clamp=clamp), Views(views)
    before = tensor.packed.clone()
    order = torch.randperm(rows)
    assert torch.equal(cpu.dequantize(tensor, order, dtype), reference.dequantize(tensor, order, dtype))
    assert torch.equal(tensor.packed, before)


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(EVERY_TYPE),
    st.integers(1, 5),
    st.integers(1, 4),
    st.one_of(INTEGER, SIGNS),
    st.sampled_from([-1.0, 2.0, 0.3, -1.7, 100.0]),
)
def test_codes_move_as_in_the_reference_and_stay_on_their_grid(name, rows, blocks, direction, coefficient):
    ours, theirs = quant(name, rows, blocks), quant(name, rows, blocks)
    before = ours.packed.clone()
    for tensor in (ours, theirs):
        tensor.tuned = TunedCodes()
    move = Move(direction, coefficient)
    assert cpu.move_codes(ours, move) == reference.move_codes(theirs, move)
    assert torch.equal(ours.packed, theirs.packed)
    block = ours.block
    was, now = (block.unpack(packed.flatten(0, 1)) for packed in (before, ours.packed))
    lowest, highest = block.codes
    assert ((now.codes >= lowest) & (now.codes <= highest) | (now.codes == was.codes)).all()
    assert all(torch.equal(a, b) for a, b in zip(was[1:], now[1:], strict=True))
    asked = (coefficient * direction.values("w", 0, was.codes.numel())).view_as(was.codes)
    inside = (was.codes + asked.floor() >= lowest) & (was.codes + asked.ceil() <= highest)
    assert ((now.codes - was.codes - asked).abs()[inside & (was.codes >= lowest)] < 1).all()


def both_sides(examples, eps):
    """The views of so many examples, each along a direction of its own, at +eps and at -eps."""
    u = [Direction(3, 1, i, Rademacher()) for i in range(examples)]
    return tuple(Move(each, sign * eps) for sign in (1, -1) for each in u)


EACH = st.tuples(st.builds(both_sides, st.integers(1, 4), st.sampled_from([0.3, 1e-2])), st.integers(0, 99))
"""Moves, and a seed for the examples of tokens."""
OFFSET_TYPES = [name for name in EVERY_TYPE if quant(name, 1, 1).has_offset]


def read_per_token(tensor, part, each, tokens):
    """A tensor whose tokens have views of their own."""
    tensor.tune(part)
    moves, seed = each
    tensor.views = Views(moves, torch.randint(len(moves), (tokens,), generator=torch.Generator().manual_seed(seed)))
    return tensor


@settings(deadline=None)
@given(
    st.sampled_from(OFFSET_TYPES), st.integers(1, 70), st.integers(1, 5), st.integers(1, 40), EACH, DTYPES, st.integers(0, 99)
)
def test_shifts_are_added_as_in_the_reference(name, rows, blocks, m, each, dtype, seed):
    tensor = read_per_token(quant(name, rows, blocks, seed), Part.OFFSET, each, m)
    generator = torch.Generator().manual_seed(seed)
    some = torch.randint(rows, (1 + seed % 70,), generator=generator)
    x, y = (torch.randn(m, n, generator=generator).to(dtype) for n in (tensor.columns, len(some)))
    ours, theirs = y.clone(), y.clone()
    cpu.add_shifts(tensor, some, x, ours)
    reference.add_shifts(tensor, some, x, theirs)
    assert torch.allclose(ours.float(), theirs.float(), rtol=2.0**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-4)
    assert dtype is torch.bfloat16 or not torch.equal(ours, y)


@settings(deadline=None)
@given(
    st.sampled_from(EVERY_TYPE), st.sampled_from(VALUE_PARTS), st.integers(1, 40), st.integers(1, 3), st.integers(1, 20), EACH
)
def test_each_token_reads_the_weight_under_its_own_view(name, part, rows, blocks, m, each):
    tensor, x = read_per_token(quant(name, rows, blocks), part, each, m), torch.randn(1, m, blocks * block_type(name).size)
    every = torch.arange(rows)
    y = kernels.linear(tensor, every, x)
    for example, token, got in zip(tensor.views.example_of_token, x[0], y[0], strict=True):
        weight = kernels.dequantize(tensor, every, torch.float32)[example]
        assert torch.allclose(weight @ token, got, rtol=1e-4, atol=1e-4 * float(weight.abs().max() * token.abs().sum()))
    if tensor.has_integers:
        approximate = kernels.linear_int8(tensor, every, x)
        assert torch.allclose(approximate, y, rtol=0, atol=2e-2 * float(x.abs().max() * weight.abs().sum(1).max()))


INTEGER_TYPES = [name for name in EVERY_TYPE if block_type(name).levels is None]
WIDEST = noise.uniform_grid(127)
CODE_VIEWS = views_of(
    st.builds(
        Move,
        st.builds(replace, INTEGER, distribution=st.sampled_from([*INTEGER_DISTRIBUTIONS, WIDEST])),
        st.sampled_from([-1.0, 1.0]),
        st.just(1.0),
    )
)
READ = st.one_of(
    st.tuples(st.none(), st.just(())),
    st.tuples(st.sampled_from(VALUE_PARTS), VIEWS),
    st.tuples(st.just(CODES), CODE_VIEWS),
)
PATHS = [slower for slower in range(8) if cpu.choose_path(slower)]
cpu.choose_path()
SIZES = [0.0, 1e-44, 1e-38, 1e-3, 1.0, 1e30]


def activations(m: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Tokens of very different sizes, with outliers."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor(SIZES)[torch.randint(len(SIZES), (m, 1), generator=generator)]
    return torch.randn(m, columns, generator=generator) ** 3 * size


@settings(deadline=None, max_examples=150)
@given(
    st.sampled_from(INTEGER_TYPES),
    st.integers(1, 40),
    st.integers(1, 5),
    st.integers(0, 40),
    READ,
    st.booleans(),
    st.integers(1, 3),
    DTYPES,
    st.integers(0, 99),
    st.sampled_from(PATHS),
)
def test_linear_int8_has_the_references_bits_on_every_path(name, rows, blocks, m, read, clamp, stride, dtype, seed, slower):
    tensor = quant(name, rows, blocks, seed)
    part, moves = read
    tensor.views = Views(moves)
    # Random bytes hold codes off a short grid, which a clamp brings back.
    tune(tensor, part, stride=1 if clamp else stride, clamp=clamp)
    some = torch.randint(rows, (1 + seed % 40,), generator=torch.Generator().manual_seed(seed))
    views = tensor.views.count
    x = activations(views * m, tensor.columns, seed).view(views, m, tensor.columns).to(dtype)
    cpu.choose_path(slower)
    ours, theirs = (ops.linear_int8(tensor, some, x) for ops in (cpu, reference))
    cpu.choose_path()
    assert ours.dtype is dtype
    assert ours.shape == (views, m, len(some))
    assert torch.equal(ours, theirs)


@settings(max_examples=300)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3))
def test_a_fused_product_and_sum_is_rounded_once(values):
    a, b, c = (torch.tensor([value]) for value in values)
    exact = Fraction(values[0]) * Fraction(values[1]) + Fraction(values[2])
    got = reference.fma(a, b, c)
    if not got.isfinite():
        assert abs(exact) >= Fraction(2) ** 128 - Fraction(2) ** 103
        return
    neighbours = [torch.nextafter(got, torch.tensor([far])) for far in (-torch.inf, torch.inf)]
    away = [abs(Fraction(float(value)) - exact) for value in (got, *neighbours) if value.isfinite()]
    assert away[0] == min(away)
    if away.count(away[0]) > 1:
        assert int(got.view(torch.int32)) % 2 == 0


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(INTEGER_TYPES), st.integers(1, 20), st.integers(1, 4), READ, st.integers(0, 99))
def test_linear_int8_is_the_dense_product_with_quantized_tokens(name, rows, blocks, read, seed):
    """Off by the fp32 roundings alone: those of each weight, and one or a few for every group."""
    tensor = quant(name, rows, blocks, seed)
    part, moves = read
    tensor.views = Views(moves)
    tune(tensor, part)
    order, views = torch.arange(rows), tensor.views.count
    x = Direction(seed, 0).values("x", 0, views * 5 * tensor.columns).view(views, 5, -1)
    s = np.abs(x.numpy()).max(2, keepdims=True) / np.float32(127)
    xq = np.rint(x.numpy() * (np.float32(1) / s))
    assert (np.abs(x.numpy() - s * xq) <= 0.501 * s).all()
    rounded = torch.from_numpy(s.astype(np.float64) * xq)
    exact = rounded @ kernels.dequantize(tensor, order, torch.float32).double().mT
    read_rows = reference._read(tensor, order)
    sizes = [(scale * codes).abs() + (0 if offset is None else offset.abs()) for codes, scale, offset in read_rows]
    size = rounded.abs() @ torch.stack(sizes).view(views, rows, -1).double().mT
    groups = tensor.columns / read_rows[0][0].shape[-1]
    assert ((kernels.linear_int8(tensor, order, x) - exact).abs() <= (groups + 8) * 2.0**-24 * size).all()


@settings(deadline=None, max_examples=80)
@given(st.sampled_from(EVERY_TYPE), st.integers(1, 120), st.integers(1, 5), st.integers(1, 30), READ, st.integers(0, 99))
def test_linear_in_bf16_is_the_product_with_the_unpacked_weight(name, rows, blocks, m, read, seed):
    """Off by the fp32 roundings of a sum and by the result's own rounding alone; no token knows of the others."""
    tensor = quant(name, rows, blocks, seed)
    part, moves = read
    tensor.views = Views(moves)
    tune(tensor, part, clamp=True)
    some = torch.randint(rows, (1 + seed % 70,), generator=torch.Generator().manual_seed(seed))
    views = tensor.views.count
    x = Direction(seed, 0).values("x", 0, views * m * tensor.columns).view(views, m, -1).bfloat16()
    ours = kernels.linear(tensor, some, x)
    weights = reference.dequantize(tensor, some, torch.bfloat16).double()
    exact, size = x.double() @ weights.mT, x.double().abs() @ weights.abs().mT
    assert ours.dtype is torch.bfloat16
    assert ((ours - exact).abs() <= 2.0**-8 * exact.abs() + tensor.columns * 2.0**-23 * size + 1e-30).all()
    if kernels.products()["bf16"] == "AVX512-BF16":
        assert torch.equal(ours[:, :1], kernels.linear(tensor, some, x[:, :1]))


@pytest.mark.parametrize("ops", [cpu, reference], ids=lambda ops: ops.NAME)
def test_codes_beyond_a_byte_are_multiplied_exactly(ops):
    tensor = quant("int8/64", 21, 3)
    tensor.packed[..., 0], tensor.packed[..., 1] = 0, 0x3C  # d = 1
    tensor.tuned, tensor.views = TunedCodes(), Views((Move(Direction(3, 1, 4, WIDEST), -1.0),))
    (codes,) = kernels.dequantize(tensor, torch.arange(21), torch.float32).long()
    assert codes.abs().max() > 200
    x = torch.randint(-127, 128, (17, tensor.columns), generator=torch.Generator().manual_seed(0))
    x[:, 5] = 127  # so that a token's scale is 1
    assert torch.equal(ops.linear_int8(tensor, torch.arange(21), x.float().unsqueeze(0))[0].long(), x @ codes.T)


@pytest.mark.parametrize("ops", [cpu, reference], ids=lambda ops: ops.NAME)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_stays_so_and_spoils_no_other(ops, value):
    tensor = quant("Q4_1", 20, 2)
    x = activations(3, tensor.columns)
    x[1, 7] = value
    finite = ops.linear_int8(tensor, torch.arange(20), x.unsqueeze(0))[0].isfinite()
    assert finite[[0, 2]].all()
    assert not finite[1].any()


@pytest.mark.parametrize("threads", [1, 2])
def test_linear_int8_has_the_same_bits_on_any_number_of_threads(threads):
    before = torch.get_num_threads()
    tensor, rows = quant("Q4_1", 100, 6), torch.arange(100)
    x = activations(50, tensor.columns).unsqueeze(0)
    torch.set_num_threads(threads)
    try:
        assert torch.equal(cpu.linear_int8(tensor, rows, x), reference.linear_int8(tensor, rows, x))
    finally:
        torch.set_num_threads(before)


ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++17", "-O2", "-ffp-contract=off", f"-I{ROOT / 'src/gradless/kernels/cpu'}", "-static"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("emulator", "paths"),
    [
        (["qemu-aarch64"], ["NEON dot product", "portable"]),
        (["qemu-aarch64", "-cpu", "cortex-a53"], ["portable"]),
    ],
    ids=["with dot product", "without"],
)
def test_integer_products_on_arm(emulator, paths, tmp_path):
    """Under an emulator: Debian's g++-aarch64-linux-gnu and qemu-user."""
    compiler = "aarch64-linux-gnu-g++"
    for tool in (compiler, emulator[0]):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    program = tmp_path / "products"
    subprocess.run([compiler, *FLAGS, str(ROOT / "tests/products.cpp"), "-o", str(program)], check=True)
    done = subprocess.run([*emulator, str(program)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.split("\n")) == (0, [*paths, ""])
    native = str(ROOT / "src/gradless/kernels/cpu/native.cpp")
    subprocess.run([compiler, *FLAGS[:-1], "-fopenmp", "-fsyntax-only", native], check=True)
