"""The probe that chooses eps, on losses whose errors are known."""

import pytest
import torch

from gradless.methods.probe import FACTORS, best_factor


def derivatives(sigma, c, directions=64):
    generator = torch.Generator().manual_seed(0)
    slopes = torch.randn(directions, generator=generator)
    return lambda f: slopes + sigma / f * torch.randn(directions, generator=generator) + c * f**2


@pytest.mark.parametrize(("sigma", "c"), [(0.1, 1e-4), (0.01, 0.01), (0.01, 0.3), (0.001, 3.0)])
def test_the_factor_balances_rounding_and_curvature(sigma, c):
    best = (sigma**2 / (2 * c**2)) ** (1 / 6)  # where sigma^2 / f^2 + c^2 f^4 is least
    assert best_factor(derivatives(sigma, c)) == pytest.approx(min(max(best, FACTORS[0]), FACTORS[-1]), rel=0.6)


def test_losses_that_do_not_follow_leave_the_default():
    assert best_factor(lambda _: torch.zeros(3)) == 1.0
    assert best_factor(lambda _: torch.full((3,), torch.nan)) == 1.0


def test_a_factor_whose_losses_are_not_finite_is_not_chosen():
    finite = derivatives(0.1, 1e-4)
    assert best_factor(lambda f: finite(f) if f < 2 else torch.full((64,), torch.inf)) == 0.5**0.5
