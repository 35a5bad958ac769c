"""noise.py: the counter function's known answers, statistics, independence, and any slice alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import ndtri

from gradless import noise
from gradless.noise import Direction, Rademacher, Stream
from tests.strategies import DISTRIBUTIONS

GOLDEN_WORDS = [357509250, 3404456500, 66012780, 3126929546]
GOLDEN_VALUES = [-0.2152099609375, 0.607666015625, -0.64599609375, -0.0863037109375]
GOLDEN_ORDER = [7, 3, 0, 4, 6, 1, 2, 5]

SEEDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [  # published with Random123 (kat_vectors, philox4x32 with 10 rounds)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, answer):
    words = noise.philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(int(w) for w in words) == answer


def test_a_direction_keeps_its_bits_for_ever():
    """A journal written today must replay in ten years: these values may never change."""
    direction = Direction(seed=1, step=2, query=3)
    assert direction.words("blk.0.ffn_up.weight")(0, 4).tolist() == GOLDEN_WORDS
    assert direction.values("blk.0.ffn_up.weight", 1000, 4).tolist() == GOLDEN_VALUES
    assert noise.permutation(0, 1, 8).tolist() == GOLDEN_ORDER


@settings(deadline=None, max_examples=40)
@given(SEEDS, st.integers(0, 5000), st.integers(1, 700), st.sampled_from(DISTRIBUTIONS), st.sampled_from([1, 5, 32]))
def test_any_slice_alone_has_the_same_bits(seed, start, count, distribution, span):
    direction = Direction(seed, 5, 1, distribution, span)
    whole = direction.values("w", 0, start + count)
    assert torch.equal(direction.values("w", start, count), whole[start:])


def test_offsets_beyond_32_bits_differ_from_those_below():
    words = Direction(0, 0).words("w")
    assert not torch.equal(words(2**34, 64), words(0, 64))


def test_gaussian_moments_and_shape():
    z = Direction(11, 0).values("w", 0, 1_000_000).double()
    assert abs(z.mean()) < 4e-3
    assert abs(z.var() - 1) < 6e-3
    assert abs((z**3).mean()) < 1.6e-2
    assert abs((z**4).mean() - 3) < 5e-2
    assert stats.kstest(z[:100_000].numpy(), "norm").pvalue > 1e-3


def test_the_normal_table_is_what_it_says():
    quantiles = ndtri(0.5 + (np.arange(32768) + 0.5) / 65536)
    assert np.array_equal(noise.normal_table(), np.round(quantiles * 2**13).astype(np.uint16))


def test_rademacher_is_balanced():
    z = Direction(11, 0, 0, Rademacher()).values("w", 0, 1_000_000)
    assert set(z.unique().tolist()) == {-1.0, 1.0}
    assert abs(z.mean()) < 4e-3


def _counts(distribution: noise.Integers) -> np.ndarray:
    k = Direction(5, 0, 0, distribution).values("w", 0, 200_000).long()
    return torch.bincount(k + distribution.m, minlength=2 * distribution.m + 1).numpy()


@pytest.mark.parametrize("m", [1, 2, 7])
def test_uniform_grid_is_uniform(m):
    assert stats.chisquare(_counts(noise.uniform_grid(m))).pvalue > 1e-4


@pytest.mark.parametrize(("m", "spread"), [(1, 0.3), (3, 1.0), (7, 2.5)])
def test_discretized_gaussian_has_its_stated_probabilities(m, spread):
    counts = _counts(noise.discretized_gaussian(m, spread))
    expected = np.exp(-0.5 * (np.arange(-m, m + 1) / spread) ** 2)
    assert stats.chisquare(counts, expected / expected.sum() * counts.sum()).pvalue > 1e-4


@pytest.mark.parametrize("eps", [0.01, 0.3, 1.7])
def test_rounded_gaussian_is_what_rounding_a_gaussian_gives(eps):
    one_table = noise.rounded_gaussian(eps)
    direct = Direction(6, 0, 0, noise.RoundedGaussian(eps)).values("w", 0, 200_000).long().clamp(-one_table.m, one_table.m)
    counts = torch.bincount(direct + one_table.m, minlength=2 * one_table.m + 1).numpy()
    edges = np.array([0, *one_table.edges, 2**16])
    expected = np.diff(edges) / 2**16 * counts.sum()
    common = expected > 5
    assert stats.chisquare(counts[common], expected[common] * counts[common].sum() / expected[common].sum()).pvalue > 1e-4
    assert abs(one_table.share - counts[np.arange(len(counts)) != one_table.m].sum() / 200_000) < 6e-3


def test_two_roundings_of_one_u_are_unbiased_and_independent_given_u():
    """E[u_1 u_2 | u] = (eps u)^2, which their separate streams are for; one rounding used twice gives eps |u| instead."""
    eps, n = 0.1, 400_000
    first, second = (
        Direction(6, 0, 0, noise.RoundedGaussian(eps, stream)).values("w", 0, n) for stream in (Stream.FIRST, Stream.SECOND)
    )
    expected, spread = eps**2, (0.8 * eps / n) ** 0.5
    assert abs((first * second).mean() - expected) < 5 * spread
    assert abs((first * first).mean() - 0.8 * eps) < 5 * spread


def _correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_tensors_steps_queries_seeds_and_streams_are_independent():
    n = 200_000
    base = Direction(1, 1, 1).values("a", 0, n)
    others = [Direction(1, 1, 1).values("b", 0, n), Direction(1, 2, 1).values("a", 0, n)]
    others += [Direction(1, 1, 2).values("a", 0, n), Direction(2, 1, 1).values("a", 0, n)]
    others.append(2 * noise.uniform(Direction(1, 1, 1).words("a", Stream.ROUNDING), 0, n) - 1)
    others.append(base.roll(1))
    assert max(abs(_correlation(base, other)) for other in others) < 5 / n**0.5


def test_stochastic_rounding_is_unbiased_and_lands_on_neighbours():
    x = torch.full((200_000,), 2.3)
    rounded = noise.stochastic_round(x, Direction(4, 0).words("w", Stream.ROUNDING))
    assert set(rounded.unique().tolist()) == {2.0, 3.0}
    assert abs(rounded.mean() - 2.3) < 5 * (0.3 * 0.7 / len(x)) ** 0.5
    whole = torch.tensor([-2.0, 0.0, 5.0])
    assert torch.equal(noise.stochastic_round(whole, Direction(4, 0).words("w", Stream.ROUNDING)), whole)


def test_an_order_is_a_permutation_that_follows_from_seed_and_epoch():
    order = noise.permutation(3, 0, 1000)
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert torch.equal(order, noise.permutation(3, 0, 1000))
    assert not torch.equal(order, noise.permutation(3, 1, 1000))
    assert not torch.equal(order, noise.permutation(4, 0, 1000))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_cuda_has_the_same_bits(distribution):
    direction = Direction(1, 2, 3, distribution)
    assert torch.equal(direction.values("w", 77, 10_000, "cuda").cpu(), direction.values("w", 77, 10_000))


def test_nothing_global_is_touched():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Direction(1, 0).values("w", 0, 100)
    noise.permutation(0, 0, 10)
    assert torch.equal(before, torch.get_rng_state())
