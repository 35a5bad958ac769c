"""EZO: its equation, what its estimate is on average, and how far it scatters."""

import json

import pytest
import torch

from gradless import EZO, QZO, kernels
from gradless.batch import Closure
from gradless.errors import GradlessError
from gradless.methods.base import REMEMBERED
from gradless.spaces import BlockSpace, CodeSpace
from gradless.tensor import Part
from tests.test_kernels import quant

ROWS, BLOCKS, EXAMPLES = 3, 2, 4
OWNERS = torch.tensor([0, 0, 1, 2, 2, 3])
"""Of six tokens."""


def space(part=Part.OFFSET):
    return BlockSpace(quant("Q4_1", ROWS, BLOCKS), part)


def inputs(*, agree: bool, seed=0):
    """Six tokens; of examples that agree, the last token of each is the same one."""
    x = torch.randn(6, BLOCKS * 32, generator=torch.Generator().manual_seed(seed))
    if agree:
        x[[1, 2, 4, 5]] = x[0].clone()
    return x


def losses(tensor, x):
    """Of each example the sum of its last token's outputs: linear in every offset."""
    y = kernels.linear(tensor, torch.arange(ROWS), x.unsqueeze(0))[0]
    return y.sum(1)[[1, 2, 4, 5]]


def estimated(method, closure, pair=None):
    return method.estimate([method.measure(Closure(closure, pair, example_of_token=OWNERS))])


def gradient(tensor, x):
    """Of each example's loss, relative to the offsets' units: (examples, rows * blocks)."""
    pooled = x[[1, 2, 4, 5]].view(EXAMPLES, 1, BLOCKS, 32).sum(-1)
    return (pooled * tensor.unit()).flatten(1)


@pytest.mark.parametrize("part", [Part.OFFSET, Part.SCALE])
def test_ezo_follows_its_equation(part):
    searched, x = space(part), inputs(agree=False)
    before, unit = searched.values.clone(), searched.weight.unit()
    method = EZO([searched], lr=0.1, eps=1e-2, auto=False, weight_decay=0.5)
    estimate = estimated(method, lambda: losses(searched.weight, x))
    assert torch.equal(searched.values, before)
    assert searched.weight.views.example_of_token is None
    assert searched.weight.views.moves == ()
    every = torch.arange(ROWS)
    z = [method.direction(0, i, method.param_groups[0]).values("w", 0, ROWS * BLOCKS).view(ROWS, BLOCKS) for i in range(4)]
    for i, (pair, d) in enumerate(zip(estimate.losses, estimate.d[0], strict=True)):
        for loss, sign in zip(pair, (1, -1), strict=True):
            searched.values.copy_(before + sign * 1e-2 * z[i] * unit)
            expected = losses(searched.weight, x)[i]
            assert loss == pytest.approx(float(expected), rel=1e-4, abs=1e-4)
        assert d == pytest.approx((pair[0] - pair[1]) / 2e-2, rel=1e-6)
    searched.values.copy_(before)
    method.apply(estimate)
    expected = before * (1 - 0.1 * 0.5) - sum(0.1 / 4 * d * z_i for d, z_i in zip(estimate.d[0], z, strict=True)) * unit
    assert torch.allclose(searched.values, expected, rtol=1e-5, atol=1e-6)
    assert kernels.linear(searched.weight, every, x.unsqueeze(0)).isfinite().all()


def test_both_losses_come_from_a_batch_and_its_copy():
    searched, x = space(), inputs(agree=False)
    method = EZO([searched], eps=1e-2)
    apart = estimated(method, lambda: losses(searched.weight, x))

    def pair():
        y = kernels.linear(searched.weight, torch.arange(ROWS), torch.cat([x, x]).unsqueeze(0))[0].sum(1)
        return y.view(2, 6)[:, [1, 2, 4, 5]]

    together = estimated(method, lambda: None, pair)
    assert torch.allclose(torch.tensor(apart.losses), torch.tensor(together.losses), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("agree", [False, True])
def test_the_estimate_is_unbiased_and_scatters_as_derived(agree):
    """Over 2000 seeds: the mean within five standard errors, and both methods' variances within a tenth of the docstring's."""
    searched, x = space(), inputs(agree=agree)
    g = gradient(searched.weight, x)
    n, found = g.shape[1], {EZO: [], QZO: []}
    for seed in range(2000):
        each = EZO([searched], eps=1e-2, seed=seed)
        shared = QZO([searched], eps=1e-2, seed=seed, distribution="rademacher", clip=float("inf"))
        estimates = {
            EZO: estimated(each, lambda: losses(searched.weight, x)),
            QZO: estimated(shared, lambda: losses(searched.weight, x).mean()),
        }
        for method in (each, shared):
            d = estimates[type(method)].d[0]
            u = [method.direction(0, i, method.param_groups[0]).values("w", 0, n) for i in range(len(d))]
            found[type(method)].append(sum(d_i * u_i for d_i, u_i in zip(d, u, strict=True)) / len(d))
    of_each, of_one = (torch.stack(found[kind]) for kind in (EZO, QZO))
    error = of_each.std(0) / 2000**0.5
    assert ((of_each.mean(0) - g.mean(0)).abs() < 5 * error + 1e-3).all()
    scatter = [float((estimates - g.mean(0)).square().sum(1).mean()) for estimates in (of_each, of_one)]
    squares, square = float(g.square().sum(1).mean()), float(g.mean(0).square().sum())
    assert scatter[0] == pytest.approx((n - 1) / EXAMPLES * squares, rel=0.1)
    assert scatter[1] == pytest.approx((n - 1) * square, rel=0.1)
    if agree:
        assert scatter[0] == pytest.approx(scatter[1] / EXAMPLES, rel=0.15)


def test_the_step_follows_the_size_of_the_last_estimates():
    method = QZO([space()], lr=0.2, eps=1e-2, auto=True)
    powers = []
    for step in range(2 * REMEMBERED):
        estimate = method.estimate_of([(1.0 + 0.01 * (step % 7), 1.0)])
        powers.append(estimate.d[0][0] ** 2)
        rms = (sum(powers[-REMEMBERED:]) / len(powers[-REMEMBERED:])) ** 0.5
        assert estimate.lr[0] == pytest.approx(0.2 * 1e-2 / rms if rms else 0.0)
        method.apply(estimate)


def test_estimates_that_are_all_ties_move_nothing():
    searched = space()
    method, before = QZO([searched], auto=True), searched.values.clone()
    method.step(lambda: 1.0)
    assert torch.equal(searched.values, before)


def test_a_journal_of_1000_steps_is_below_a_megabyte():
    method = EZO([space()])
    x = inputs(agree=False)
    estimate = estimated(method, lambda: losses(method.spaces[0].weight, x).repeat(4))
    again = json.loads(json.dumps([estimate.losses, estimate.d]))
    assert torch.tensor(again[0]).equal(torch.tensor(estimate.losses))
    assert len(estimate.losses) == 16
    assert 1000 * len(json.dumps([estimate.losses, estimate.d])) < 800_000


def test_what_ezo_cannot_do_is_refused():
    with pytest.raises(GradlessError, match="w is CodeSpace"):
        EZO([CodeSpace(quant("Q4_1", 2, 2))])
    with pytest.raises(GradlessError, match="must be below 1"):
        EZO([space()], eps=1.0)
