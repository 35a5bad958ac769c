"""The methods on problems whose answer is known."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gradless import QZO, ZOQO, MeZO, QuZO, kernels, noise
from gradless.batch import Closure
from gradless.errors import GradlessError
from gradless.grids import Grid, mid_tread
from gradless.methods.base import Estimate
from gradless.methods.quzo.method import eps_of_share
from gradless.methods.registry import RECIPES
from gradless.methods.zoqo.method import mu_of_share
from gradless.noise import NAMED, Direction, RoundedGaussian, Stream
from gradless.spaces import BlockSpace, CodeSpace, DenseSpace, GridSpace, dense_spaces
from gradless.tensor import Move, Part
from tests.test_kernels import quant


def linear(dtype=torch.float32, n=64) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(n, 1, bias=False).to(dtype).requires_grad_(False)


def test_mezo_follows_its_equation_to_the_bit():
    layer, data = linear(), torch.ones(64)
    before = layer.weight.clone()
    method = MeZO(dense_spaces(layer), lr=0.1, eps=1e-2, weight_decay=0.5)
    estimate = method.step(lambda: layer(data).square().sum())
    u = method.direction(0, 0, method.param_groups[0]).values("weight", 0, 64).view(1, 64)
    (plus, minus), (d,) = estimate.losses[0], estimate.d[0]
    assert d == (plus - minus) / (2 * 1e-2)
    assert torch.equal(layer.weight, before * (1 - 0.1 * 0.5) + u * torch.tensor(-0.1 * d, dtype=torch.float32))


@pytest.mark.parametrize("distribution", NAMED)
def test_the_estimate_is_unbiased(distribution):
    """E[d u] = g for a linear loss: the mean over many seeds, within five standard errors."""
    layer = linear(n=16)
    g = torch.linspace(-1, 1, 16)
    estimates = []
    for seed in range(3000):
        method = MeZO(dense_spaces(layer), eps=0.5, seed=seed, distribution=distribution)
        (d,) = method.estimate([method.measure(Closure(lambda: layer(g)))]).d[0]
        estimates.append(d * method.direction(0, 0, method.param_groups[0]).values("weight", 0, 16))
    mean, error = torch.stack(estimates).mean(0), torch.stack(estimates).std(0) / 3000**0.5
    assert ((mean - g).abs() < 5 * error).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_exact_after_queries_and_after_an_exception(dtype):
    layer = linear(dtype)
    parameter, before = layer.weight, layer.weight.clone()
    method = MeZO(dense_spaces(layer), eps=1e-3)
    seen = []
    for _ in range(20):
        method.measure(Closure(lambda: seen.append(layer(torch.ones(64, dtype=dtype))) or seen[-1].sum()))
    assert layer.weight is parameter
    assert torch.equal(layer.weight, before)
    assert len({float(y) for y in seen}) > 1
    with pytest.raises(RuntimeError):
        method.measure(Closure(lambda: layer(torch.ones(3, dtype=dtype))))
    assert layer.weight is parameter
    assert torch.equal(layer(torch.eye(64, dtype=dtype)).T, before)


def test_tied_weights_share_one_direction():
    table = nn.Embedding(8, 4)
    head = nn.Linear(4, 8, bias=False)
    head.weight = table.weight
    model = nn.ModuleDict({"table": table, "head": head}).requires_grad_(False)
    spaces = dense_spaces(model, lambda _name, _module: True)
    assert [space.name for space in spaces] == ["table.weight"]
    method = MeZO(spaces, eps=0.1)
    with method.perturbed(0, 1):
        assert torch.equal(table(torch.arange(8)), head(torch.eye(4)).T)


def test_norms_are_seen_moved_too():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)).requires_grad_(False)
    before = [p.clone() for p in model.parameters()]
    method = MeZO(dense_spaces(model, lambda *_: True), eps=0.1)
    with method.perturbed(0, 1):
        assert not torch.equal(model[1].weight, before[2])
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_an_fp32_master_keeps_what_bf16_would_lose():
    layer = linear(torch.bfloat16)
    method = MeZO(dense_spaces(layer, master=True), lr=1e-5, eps=1e-3)
    for _ in range(3):
        method.step(lambda: layer(torch.ones(64, dtype=torch.bfloat16)).sum())
    (space,) = method.spaces
    assert space.values.dtype is torch.float32
    assert torch.equal(layer.weight, space.values.bfloat16())


def test_fp16_parameters_are_refused():
    with pytest.raises(GradlessError, match="bfloat16 or float32"):
        dense_spaces(linear(torch.float16))


def test_qzo_clips_the_derivative():
    method = QZO([BlockSpace(quant("Q4_1", 4, 2), Part.SCALE)], eps=1e-3, clip=2.0)
    estimate = method.estimate_of([(5.0, 1.0)])
    assert estimate.d == ((2.0,),)
    assert method.estimate_of([(1.0, 5.0)]).d == ((-2.0,),)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.2, 3.0))
def test_clipping_shrinks_a_linear_losss_gradient_by_the_share_that_is_not_clipped(c):
    """QZO calls clip(d) z unbiased; for L = g.x it is P(|d| < C) g."""
    z = torch.randn(400_000, 2, generator=torch.Generator().manual_seed(0))
    g = torch.tensor([0.6, 0.8])
    d = z @ g
    estimate = (d.clamp(-c, c)[:, None] * z).mean(0)
    shrinkage = (d.abs() < c).float().mean()
    assert torch.allclose(estimate, shrinkage * g, atol=1e-2)


def test_qzo_descends_a_quadratic_in_the_scales():
    tensor = quant("Q4_1", 8, 4)
    space = BlockSpace(tensor, Part.BOTH)
    rows = torch.arange(8)
    target = kernels.dequantize(tensor, rows, torch.float32) * 1.1
    method = QZO([space], lr=2e-2, eps=1e-2, q=4)

    def loss():
        return (kernels.dequantize(tensor, rows, torch.float32) - target).square().mean() * 1e4

    first = float(loss())
    for _ in range(300):
        method.step(loss)
    assert float(loss()) < 0.5 * first


def test_two_queries_a_step_average_and_weight_decay_is_applied_once():
    layer = linear()
    before = layer.weight.clone()
    method = MeZO(dense_spaces(layer), lr=0.1, eps=1e-2, weight_decay=1.0, q=2)
    estimate = method.step(lambda: layer(torch.ones(64)).sum())
    u = [method.direction(0, query, method.param_groups[0]).values("weight", 0, 64) for query in range(method.q)]
    expected = before * (1 - 0.1) - 0.1 / 2 * sum(d * v for d, v in zip(estimate.d[0], u, strict=True))
    assert torch.allclose(layer.weight, expected, atol=1e-6)


def test_a_loss_that_is_not_finite_moves_nothing():
    layer = linear()
    before = layer.weight.clone()
    method = MeZO(dense_spaces(layer))
    estimate = method.step(lambda: float("nan"))
    assert not estimate.finite
    assert torch.equal(layer.weight, before)
    assert method.t == 1


def test_groups_have_their_own_step_and_perturbation():
    scales, norm = BlockSpace(quant("Q4_1", 4, 2), Part.SCALE), DenseSpace("norm", torch.ones(8))
    method = QZO([{"spaces": [scales], "lr": 1e-3, "eps": 1e-2}, {"spaces": [norm], "lr": 1e-2, "eps": 1e-1}], clip=1e9)
    estimate = method.estimate_of([(1.2, 1.0)])
    assert estimate.d == (((1.2 - 1.0) / 0.02,), ((1.2 - 1.0) / 0.2,))
    assert estimate.lr == (1e-3, 1e-2)


def test_torchs_schedulers_drive_lr():
    method = MeZO(dense_spaces(linear()), lr=1.0)
    scheduler = torch.optim.lr_scheduler.LinearLR(method, 1.0, 0.0, total_iters=4)
    rates = []
    for _ in range(4):
        rates.append(method.step(lambda: 0.0).lr[0])
        scheduler.step()
    assert rates == pytest.approx([1.0, 0.75, 0.5, 0.25])


def test_the_optimizers_state_can_be_saved_and_loaded_without_losing_its_spaces():
    layer = linear()
    method = MeZO(dense_spaces(layer), lr=0.1)
    method.load_state_dict(method.state_dict())
    before = layer.weight.clone()
    method.apply(Estimate(0, ((1.0, 0.0),), ((1.0,),), (0.1,)))
    assert not torch.equal(layer.weight, before)


def test_a_step_without_a_closure_needs_a_pending_estimate():
    with pytest.raises(RuntimeError, match="needs a closure"):
        MeZO(dense_spaces(linear())).step()


def codes(name="Q4_1", rows=4, blocks=2, seed=0) -> CodeSpace:
    return CodeSpace(quant(name, rows, blocks, seed))


def held(space: CodeSpace) -> torch.Tensor:
    """The codes themselves: fp32, (codes,)."""
    return space.weight.block.unpack(space.weight.packed.flatten(0, 1)).codes.flatten()


def seen(space: CodeSpace) -> torch.Tensor:
    """The codes as a forward reads them: the weights over the scales, offsets left out."""
    block, packed = space.weight.block, space.weight.packed
    scale = block.field(packed, block.scale_at).unsqueeze(-1)
    offset = 0.0 if block.offset_at is None else block.field(packed, block.offset_at).unsqueeze(-1)
    weight = kernels.dequantize(space.weight, torch.arange(space.weight.rows), torch.float32)
    return ((weight.view(*packed.shape[:2], -1) - offset) / scale).flatten()


@pytest.mark.parametrize("roundings", [1, 2])
def test_quzo_follows_its_equations_to_the_code(roundings):
    space = codes()
    before = held(space)
    method = QuZO([space], lr=0.02, eps=0.4, roundings=roundings, seed=3)
    g = torch.linspace(-1, 1, before.numel())
    estimate = method.step(lambda: float((g * seen(space)).sum()))
    first, second = (
        Direction(3, 0, 0, RoundedGaussian(0.4, stream)).values("w", 0, before.numel())
        for stream in (Stream.FIRST, Stream.SECOND)
    )
    if roundings == 1:
        first = second = Direction(3, 0, 0, noise.rounded_gaussian(0.4)).values("w", 0, before.numel())
    mu = float((g * first).sum()) / 0.4
    assert estimate.d[0][0] == pytest.approx(mu / 0.4, rel=1e-4)
    asked = second * torch.tensor(-0.02 * estimate.d[0][0])
    words = Direction(3, 0).words("w", Stream.ROUNDING)
    expected = (before + noise.stochastic_round(asked, words)).clamp(0, 15)
    assert torch.equal(held(space), expected)
    assert method.moved == (expected != before).sum() / before.numel()


@pytest.mark.parametrize("distribution", ["gaussian", "uniform"])
@pytest.mark.parametrize("q", [1, 3])
def test_zoqo_moves_by_whole_steps_against_the_signs(distribution, q):
    space = codes("Q8_0")
    before = held(space)
    method = ZOQO([space], lr=2.7, eps=2.2, whole_steps=True, q=q, seed=5, distribution=distribution)
    g = torch.linspace(-1, 1, before.numel())
    estimate = method.step(lambda: float((g * seen(space)).sum()))
    u = [method.direction(0, query, method.param_groups[0]).values("w", 0, before.numel()) for query in range(q)]
    assert max(abs(v).max() for v in u) <= 2
    total = sum(v * torch.tensor(plus - minus) for v, (plus, minus) in zip(u, estimate.losses, strict=True))
    assert torch.equal(held(space), torch.where(total == 0, before, (before - 2 * total.sign()).clamp(-127, 127)))


def test_losses_that_tie_move_no_code():
    space = codes()
    before = space.weight.packed.clone()
    for method in (ZOQO([space], lr=1.0, whole_steps=True), QuZO([space], lr=1.0)):
        method.step(lambda: 1.0)
        assert method.moved == 0
    assert torch.equal(space.weight.packed, before)


def test_held_steps_move_only_where_a_side_is_lower():
    space = codes()
    before = space.weight.packed.clone()
    method = ZOQO([space], lr=1.0, hold=True)
    losses = iter([2.0, 3.0, 1.0, 2.0, 3.0, 2.5])
    assert method.step(lambda: next(losses)).losses == ((1.0, 1.0),)
    assert torch.equal(space.weight.packed, before)
    assert method.step(lambda: next(losses)).losses == ((2.0, 3.0),)
    assert not torch.equal(space.weight.packed, before)
    assert method.moved > 0


@pytest.mark.parametrize("pair", [(float("nan"), 1.0), (1.0, float("nan"))])
def test_holding_does_not_hide_a_nan(pair):
    method = ZOQO([codes()], lr=1.0, hold=True)
    method.moved = 0.5
    losses = iter([*pair, 0.5])
    assert not method.step(lambda: next(losses)).finite
    assert method.moved == 0


def best(grid: Grid, s: float, target: torch.Tensor) -> torch.Tensor:
    return grid.values(grid.nearest(target / s)) * s


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize(
    ("make", "options"), [(ZOQO, {"whole_steps": True, "hold": True, "eps": 0.5, "lr": 1.0}), (QuZO, {"eps": 0.3})]
)
def test_a_quadratic_over_a_grid_is_solved_to_its_neighbourhood(bits, make, options):
    grid, s = mid_tread(bits, -1.0, 1.0)
    n, steps = 8, 600
    target = torch.linspace(-0.83, 0.71, n)
    space = GridSpace("x", torch.zeros(n, dtype=torch.int16), grid, s)
    method = make([space], **{"lr": 0.1 / s**2 / n, **options})
    start = method.param_groups[0]["lr"]
    for step in range(steps):
        method.param_groups[0]["lr"] = start * (1 - step / steps)
        method.step(lambda: float((space.shown() - target).square().sum() / 2))
        assert space.values.min() >= grid.lowest
        assert space.values.max() <= grid.highest
    distance = (space.shown() - target).norm() / n**0.5
    assert distance < (best(grid, s, target) - target).norm() / n**0.5 + s


def test_zoqo_learns_from_comparisons_alone():
    """Nobody says how good an answer is, only which of two is nearer to what was asked for."""
    grid, s = mid_tread(4, -1.0, 1.0)
    target = torch.linspace(-0.8, 0.7, 8)
    space = GridSpace("x", torch.zeros(8, dtype=torch.int16), grid, s)

    def worse(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first - target).norm() - (second - target).norm())

    method = ZOQO([space], lr=1.0, eps=0.5, compare=worse)
    for step in range(600):
        method.param_groups[0]["lr"] = 1 - step / 600
        assert set(method.step(space.shown).losses[0]) <= {-0.5, 0.0, 0.5}
    assert (space.shown() - target).norm() / 8**0.5 < 2 * s
    with pytest.raises(GradlessError, match="hold needs losses"):
        ZOQO([space], hold=True, compare=worse)


def test_rge2_is_unbiased_and_rge1_is_longer_by_the_roundings_variance():
    """On a linear loss over codes: E = g for two roundings, f g for one, f = 1 + v / eps^2, v being the rounding's variance;
    and against the square of its mean Q-RGE2's variance is f^2 times Q-RGE1's."""
    n, eps, trials = 64, 0.5, 4000
    g = torch.linspace(-1, 1, n)
    table = noise.rounded_gaussian(eps)
    edges = torch.tensor([0, *table.edges, 2**16], dtype=torch.float64)
    second_moment = float((edges.diff() / 2**16 * torch.arange(-table.m, table.m + 1).square()).sum())
    variance = {}
    for roundings, factor in ((2, 1.0), (1, second_moment / eps**2)):
        estimates = []
        for seed in range(trials):
            method = QuZO([codes(rows=1)], eps=eps, roundings=roundings, seed=seed)
            group = method.param_groups[0]
            u = method.direction(0, 0, group).values("w", 0, n)
            d = method.derivative(float(g @ u), -float(g @ u), group)
            (move,) = method.moves(0, (d,), 1.0, group)
            estimates.append(-move.coefficient * move.direction.values("w", 0, n))
        each = torch.stack(estimates)
        error = each.std(0) / trials**0.5
        assert ((each.mean(0) - factor * g).abs() < 5 * error).all()
        # Along g itself the statistical bound is far tighter than coordinate by coordinate.
        along = each @ g / (g @ g)
        assert abs(along.mean() - factor) < 5 * along.std() / trials**0.5
        variance[roundings] = float(each.var(0).sum()) / factor**2
    assert variance[2] / variance[1] == pytest.approx((second_moment / eps**2) ** 2, rel=0.1)


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from(["Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"]),
    st.sampled_from(["quzo", "zoqo"]),
    st.integers(0, 2**32),
    st.floats(0.3, 4.0),
    st.booleans(),
    st.booleans(),
    st.integers(1, 3),
)
def test_codes_are_on_their_grid_after_every_step(name, method_name, seed, eps, clamp, residual, stride):
    space = CodeSpace(quant(name, 4, 2, seed % 1000), clamp=clamp, residual=residual, stride=stride)
    untuned = torch.arange(4).repeat_interleave(space.weight.columns) % stride != 0
    lowest, highest = space.weight.block.codes
    start = held(space)
    method = RECIPES[method_name].method()([space], lr=1.5, eps=eps, seed=seed)
    read = []
    for _ in range(3):
        method.step(lambda: read.append(seen(space)) or float(read[-1].square().sum()))
        now = held(space)
        assert torch.equal(now, now.round())
        assert ((now >= lowest) & (now <= highest) | (now == start)).all()
        assert torch.equal(now[untuned], start[untuned])
        assert torch.equal(read[-1][untuned], read[0][untuned])
    if clamp and stride == 1 and name in ("Q4_0", "Q4_1", "Q8_0"):
        assert all((x >= lowest - 1e-2).all() and (x <= highest + 1e-2).all() for x in read if start.min() >= lowest)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32), st.lists(st.floats(-3, 3), min_size=1, max_size=6))
def test_a_residual_loses_nothing(seed, coefficients):
    """What codes moved by, and what they are owed, is the sum of all updates, each rounded to 1/256 of a step."""
    n, residual = 300, kernels.on("cpu").dither("w", torch.Size((300,)))
    first, moved, asked = residual.clone().int(), torch.zeros(300), torch.zeros(300)
    for step, coefficient in enumerate(coefficients):
        move = Move(Direction(seed, step, 0, noise.rounded_gaussian(1.5)), coefficient)
        moved += kernels.on("cpu").whole_steps("w", move, n, residual.device, residual)
        u = move.direction.values("w", 0, n) * (torch.tensor(coefficient, dtype=torch.float32) * 256)
        asked += noise.stochastic_round(u, move.direction.words("w", Stream.ROUNDING))
    assert torch.equal(256 * moved + residual.int() - first, asked)


def test_a_small_update_moves_a_small_share_of_the_codes_at_once():
    residual = kernels.on("cpu").dither("w", torch.Size((200_000,)))
    move = Move(Direction(1, 0, 0, NAMED["rademacher"]), 0.01)
    moved = kernels.on("cpu").whole_steps("w", move, residual.numel(), residual.device, residual)
    assert moved.abs().mean() == pytest.approx(0.01, rel=0.1)
    assert residual.float().mean().abs() < 1


def test_shares_say_how_many_codes_a_query_moves():
    for share in (0.001, 0.02, 0.4):
        assert noise.rounded_gaussian(eps_of_share(share)).share == pytest.approx(share, abs=1e-4)
        assert noise.discretized_gaussian(1, mu_of_share(share)).share == pytest.approx(share, abs=1e-4)


def test_perturbation_bits_cut_a_query():
    whole, cut = (QuZO([codes()], eps=3.0, perturbation_bits=bits) for bits in (None, 3))
    u, v = (method.direction(0, 0, method.param_groups[0]).values("w", 0, 4000) for method in (whole, cut))
    assert u.abs().max() > 3
    assert torch.equal(v, u.clamp(-3, 3))
    for wrong in ({"perturbation_bits": 1}, {"perturbation_bits": 4, "roundings": 2}):
        with pytest.raises(GradlessError, match="perturbation_bits"):
            QuZO([codes()], **wrong)


@pytest.mark.parametrize("make", [QuZO, ZOQO])
def test_code_methods_refuse_what_cannot_be(make):
    for wrong in ({"distribution": "rademacher"}, {"weight_decay": 0.1}):
        with pytest.raises(GradlessError, match="weight_decay"):
            make([codes()], **wrong)
    for eps in (1e-9, 1e3):
        with pytest.raises(GradlessError, match="grid steps"):
            make([codes()], eps=eps).step(lambda: 0.0)
