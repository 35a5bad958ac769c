"""Steps become shorter when the loss rises, and a run that this saves."""

import pytest
import torch

from gradless import QZO, kernels
from gradless.methods.backoff import WINDOW, Backoff
from gradless.spaces import BlockSpace
from tests.test_kernels import quant


def seen(losses):
    backoff = Backoff()
    for loss in losses:
        backoff.observe(float(loss))
    return backoff


@pytest.mark.parametrize("seed", range(10))
def test_losses_that_fall_or_only_scatter_halve_nothing(seed):
    noise = 0.2 * torch.randn(1000, generator=torch.Generator().manual_seed(seed))
    assert seen(0.7 + noise).factor == 1.0
    assert seen(torch.linspace(1.0, 0.3, 1000) + noise).factor == 1.0


def test_losses_that_stay_up_halve_once_a_window():
    noise = 0.2 * torch.randn(5 * WINDOW, generator=torch.Generator().manual_seed(0))
    losses = noise + torch.tensor([0.7] * 2 * WINDOW + [3.0] * 3 * WINDOW)
    assert seen(losses).factor == pytest.approx(0.125)


def far_from_its_best(backing_off):
    """The estimates of a run on a quadratic that begins at its optimum, with steps that are far too long."""
    space, every = BlockSpace(quant("Q4_1", 8, 4)), torch.arange(8)
    method, best = QZO([space], lr=10.0, eps=1e-2, auto=True), kernels.dequantize(space.weight, every, torch.float32)[0]
    if not backing_off:
        method.backoff.observe = lambda _: None
    away = lambda: float((kernels.dequantize(space.weight, every, torch.float32)[0] - best).square().sum())  # noqa: E731
    return [method.step(away) for _ in range(400)]


def test_a_run_with_steps_far_too_long_is_held_back():
    watched, free = far_from_its_best(True), far_from_its_best(False)
    assert watched[-1].loss < free[-1].loss / 10
    again = BlockSpace(quant("Q4_1", 8, 4))
    method = QZO([again], lr=10.0, eps=1e-2, auto=True)
    for _ in method.replay(watched[:-1]):
        pass
    assert method.estimate_of(watched[-1].losses).lr == watched[-1].lr
