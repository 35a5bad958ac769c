"""Attacks: counts that are exact, perturbations on their grid and in their ball, answers that are paid for once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless import LabelAttack, QueryLog, SignHunter, ZOQOAttack, ZOSignSGDAttack
from gradless.ball import Ball
from gradless.errors import GradlessError
from gradless.noise import Chunks, Direction

SHAPE = (2, 4, 4)


def images(n: int, seed: int = 0, bits: int = 8) -> torch.Tensor:
    levels = 2**bits - 1
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels + 1, (n, *SHAPE), generator=generator).float() / levels


def linear_model(seed: int = 0, classes: int = 5):
    weight = torch.randn(classes, int(np.prod(SHAPE)), generator=torch.Generator().manual_seed(seed))
    return lambda batch: batch.flatten(1) @ weight.T


class Counted:
    """A model that keeps every input it was given."""

    def __init__(self, model):
        self.model, self.inputs = model, []

    def __call__(self, batch):
        self.inputs += [image.numpy().tobytes() for image in batch]
        return self.model(batch)


METHODS = {
    "chunks": lambda eps, **more: ZOQOAttack(eps, **more),
    "random": lambda eps, **more: ZOQOAttack(eps, directions="random", **more),
    "signhunter": lambda eps, **more: SignHunter(eps, **{k: v for k, v in more.items() if k != "bits"}),
    "zo_signsgd": lambda eps, **more: ZOSignSGDAttack(eps, q=3, **more),
}


@pytest.mark.parametrize("method", METHODS)
@given(
    bits=st.sampled_from([None, 2, 4, 8]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.sampled_from([0.02, 0.1, 0.3]),
    pixel_bits=st.sampled_from([None, 8]),
    targeted=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None)
def test_every_promise_of_a_result(method, bits, norm, eps, pixel_bits, targeted, seed):
    x, model = images(6, seed), Counted(linear_model(seed))
    clean = model.model(x).argmax(1)
    labels = (clean + 1) % 5 if targeted else clean
    more = {"bits": bits, "norm": norm, "pixel_bits": pixel_bits, "targeted": targeted, "seed": seed, "max_queries": 60}
    if method == "chunks" and norm == "l2" and bits == 2:
        with pytest.raises(GradlessError, match="take more bits"):
            METHODS[method](eps, **more).attack(model, x, labels)
        return
    attack = METHODS[method](eps, **more)
    result = attack.attack(model, x, labels)
    assert len(model.inputs) == int(result.queries.sum()), "every call is counted"
    assert int(result.queries.max()) <= 60
    after = model.model(result.images).argmax(1)
    assert torch.equal(result.success, after == labels if targeted else after != labels)
    assert float(result.images.min()) >= 0
    assert float(result.images.max()) <= 1
    change = (result.images - x).flatten(1)
    for moved in (change, result.perturbations.flatten(1)):
        size = moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)
        assert float(size.max()) <= eps * (1 + 1e-5)
    if attack.ball.bits is not None:
        steps = result.perturbations / attack.ball.unit
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    if pixel_bits is None:
        assert torch.allclose(x + result.perturbations, result.images, atol=1e-6)
    else:
        assert torch.allclose(result.images * 255, (result.images * 255).round(), atol=1e-3)
    assert torch.equal(result.images[~result.success], x[~result.success])


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact_image_by_image(method):
    x, model = images(8, 3), linear_model(3)
    labels, counted = model(x).argmax(1), Counted(model)
    result = METHODS[method](0.05, bits=8, max_queries=80).attack(counted, x, labels)
    inputs = torch.stack([torch.frombuffer(bytearray(each), dtype=torch.float32) for each in counted.inputs])
    whose = torch.cdist(inputs, x.flatten(1), p=float("inf")).argmin(1)
    assert torch.equal(whose.bincount(minlength=8), result.queries)
    assert len(set(counted.inputs)) == len(counted.inputs), "no input is paid for twice"
    assert result.within(int(result.queries.max())) == 1 - result.failure_rate


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_changes_no_image(method):
    x, model = images(7, 1), linear_model(1)
    labels = model(x).argmax(1)
    whole, parts = (METHODS[method](0.05, bits=8, max_queries=50, batch_size=size).attack(model, x, labels) for size in (7, 2))
    assert torch.equal(whole.queries, parts.queries)
    assert torch.equal(whole.images, parts.images)


def test_zoqo_with_chunks_is_signhunter_at_any_bits():
    x, model = (images(20, 5) * 0.5 + 0.25), linear_model(5)  # no pixel near the range's ends
    labels = model(x).argmax(1)
    hunter = SignHunter(0.1).attack(model, x, labels)
    for bits in (2, 4, 8):
        ours = ZOQOAttack(0.1, bits=bits).attack(model, x, labels)
        assert torch.equal(ours.queries, hunter.queries)
        assert torch.allclose(ours.images, hunter.images, atol=1e-6)


@given(size=st.integers(1, 70), m=st.integers(1, 5))
def test_chunks_are_halved_down_to_single_coordinates(size, m):
    chunks = Chunks(size, m)
    drawn = torch.stack([Direction(0, step, 0, chunks).values("w", 0, size) for step in range(chunks.steps)])
    assert set(drawn.unique().tolist()) <= {0.0, float(m)}
    assert torch.equal(drawn[0], torch.full((size,), float(m)))
    assert bool((drawn[-size:].sum(0) >= m).all()), "the last level has every coordinate"
    again = Direction(0, chunks.steps, 0, chunks).values("w", 0, size)
    assert torch.equal(again, drawn[0])


@given(seed=st.integers(0, 199), method=st.sampled_from([SignHunter, ZOQOAttack]))
@settings(deadline=None)
def test_chunks_go_on_until_no_flip_of_one_lowers_the_margin(seed, method):
    pixels = 6
    margins = torch.rand(2**pixels, generator=torch.Generator().manual_seed(seed)) + 0.1  # never adversarial
    asked = set()

    def model(batch):
        up = (batch.flatten(1) > 0.5).long() @ 2 ** torch.arange(pixels)
        asked.update(up.tolist())
        return torch.stack([margins[up], torch.zeros(len(up))], 1)

    result = method(0.1, max_queries=1000).attack(model, torch.full((1, 1, pixels), 0.5), [0])
    assert not result.success.any()
    best = min(asked, key=lambda up: float(margins[up]))
    chunks = [Chunks(pixels).chunk(step) for step in range(Chunks(pixels).steps)]
    assert {best ^ (2 ** min(last, pixels) - 2**first) for first, last in chunks} <= asked


class Broken(Exception):
    pass


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_fails_half_way_costs_nothing_twice(tmp_path, method):
    x, model = images(5, 2), linear_model(2)
    labels = model(x).argmax(1)
    whole = METHODS[method](0.04, bits=8, max_queries=60, batch_size=2).attack(model, x, labels)
    asked = 0

    def failing(batch):
        nonlocal asked
        if asked > 40:
            raise Broken
        asked += len(batch)
        return model(batch)

    attack = METHODS[method](0.04, bits=8, max_queries=60, batch_size=2)
    log = QueryLog(tmp_path / "queries.db", {"seed": 0})
    with pytest.raises(Broken):
        attack.attack(failing, x, labels, log=log)
    log.close()
    rest = Counted(model)
    again = attack.attack(rest, x, labels, log=QueryLog(tmp_path / "queries.db", {"seed": 0}))
    assert asked + len(rest.inputs) == int(whole.queries.sum())
    assert torch.equal(again.queries, whole.queries)
    assert torch.equal(again.images, whole.images)
    with pytest.raises(GradlessError, match="an attack whose seed is 0, not 1"):
        QueryLog(tmp_path / "queries.db", {"seed": 1})


@pytest.mark.parametrize("method", METHODS)
def test_the_budget_of_all_images_can_be_raised_later(tmp_path, method):
    x, model = images(6, 4), Counted(linear_model(4))
    labels = model.model(x).argmax(1)
    for total in (7, 30, 31, None):
        attack = METHODS[method](0.04, bits=8, max_queries=40, max_total_queries=total)
        log = QueryLog(tmp_path / "queries.db", {})
        result = attack.attack(model, x, labels, log=log)
        log.close()
        assert int(result.queries.sum()) == len(model.inputs)
        assert total is None or len(model.inputs) <= total
    whole = METHODS[method](0.04, bits=8, max_queries=40).attack(model.model, x, labels)
    assert torch.equal(result.queries, whole.queries)
    assert torch.equal(result.images, whole.images)


@pytest.mark.parametrize(("bits", "norm", "eps"), [(8, "linf", 0.15), (4, "linf", 0.2), (2, "linf", 0.3), (8, "l2", 1.0)])
def test_labels_are_enough(bits, norm, eps):
    x, scores = images(12, 6) * 0.5 + 0.25, linear_model(6)
    labels, model = scores(x).argmax(1), Counted(lambda batch: scores(batch).argmax(1))
    result = LabelAttack(eps, bits=bits, norm=norm, max_queries=600).attack(model, x, labels)
    assert int(result.queries.sum()) == len(model.inputs) == len(set(model.inputs))
    assert torch.equal(scores(result.images).argmax(1) != labels, result.success)
    change = (result.images - x).flatten(1)
    assert float((change.abs().amax(1) if norm == "linf" else change.norm(dim=1)).max()) <= eps * (1 + 1e-5)
    steps = result.perturbations / (eps / (2 ** (bits - 1) - 1))
    assert torch.allclose(steps, steps.round(), atol=1e-3)
    with_scores = ZOQOAttack(eps, bits=bits, norm=norm, max_queries=600).attack(scores, x, labels)
    assert result.failure_rate <= with_scores.failure_rate + 0.2
    assert result.failure_rate < 1


def nan_once(batch):
    scores = linear_model()(batch)
    scores[-1, 2] = float("nan")
    return scores


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"predict": nan_once}, "a score that is no finite number for image 3"),
        ({"predict": lambda _: torch.zeros(1, 5)}, "was given 4 images and returned"),
        ({"predict": lambda batch: torch.zeros(len(batch))}, "one float an image"),
        ({"images": images(4) * 2}, r"pixels must lie in \[0, 1\]"),
        ({"images": images(4) * float("nan")}, "pixels must lie in"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "4 images need integers"),
        ({"labels": torch.tensor([0, 1, 2, 9])}, "label 9 does not fit a model with 5 classes"),
        ({"labels": torch.tensor([0.0, 1, 2, 3])}, "labels are torch.float32"),
        ({"max_queries": 1}, "max_queries is 1; one step takes 2"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"bits": 9}, "bits is 9"),
        ({"norm": "l1"}, "it can be linf or l2"),
        ({"directions": "up"}, "it can be|they can be"),
        ({"pixel_bits": 4}, "pixels are not of 4 bits"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"directions": "random", "share": 0.0}, "share is 0.0"),
        ({"directions": "random", "share": 1e-6}, "no code would ever move"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(change, says):
    given = {"predict": linear_model(), "images": images(4), "labels": torch.arange(4)}
    options = {"eps": 0.1} | {name: value for name, value in change.items() if name not in given}
    given |= {name: value for name, value in change.items() if name in given}
    with pytest.raises(GradlessError, match=says):
        ZOQOAttack(**options).attack(**given)


@pytest.mark.parametrize("dtype", [np.uint16, np.uint64, np.int8])
def test_labels_and_scores_are_of_any_integers(dtype):
    x, model = images(4), linear_model()
    labels = model(x).argmax(1)
    result = ZOQOAttack(0.2).attack(lambda batch: (10 * model(batch)).to(torch.int8), x, labels.numpy().astype(dtype))
    assert result.success.any()


def test_chunks_ask_once_a_step_whatever_q():
    ZOQOAttack(0.2, q=5, max_queries=6).attack(linear_model(), images(2), torch.zeros(2, dtype=torch.int64))


def test_a_radius_inside_the_ball_counts_though_its_image_was_shown_before():
    """Pixels of 8 bits: radii from 8/255 on show what a larger radius has shown already."""
    x = torch.full((1, *SHAPE), 128 / 255)
    wrong = lambda batch: ((batch - x).abs().flatten(1).amax(1) >= 7.5 / 255).long()  # noqa: E731
    for pixel_bits in (None, 8):
        result = LabelAttack(8 / 255, pixel_bits=pixel_bits, max_queries=60).attack(wrong, x, torch.zeros(1, dtype=torch.int64))
        assert result.success.all(), pixel_bits


def test_a_result_is_saved_whole(tmp_path):
    x, model = images(5), linear_model()
    result = ZOQOAttack(0.2).attack(model, x, model(x).argmax(1))
    result.save(tmp_path / "out" / "result.npz")
    with np.load(tmp_path / "out" / "result.npz") as saved:
        assert np.array_equal(saved["queries"], result.queries.numpy())
        assert np.array_equal(saved["images"], result.images.numpy())
    assert result.queries_to(0.5) <= result.queries_to(1.0)


@given(
    bits=st.sampled_from([None, 2, 3, 8]),
    norm=st.sampled_from(["linf", "l2"]),
    eps=st.floats(0.01, 2),
    seed=st.integers(0, 99),
)
def test_projection_is_inside_and_stays(bits, norm, eps, seed):
    generator = torch.Generator().manual_seed(seed)
    ball, x0 = Ball(eps, norm, bits), torch.rand(3, 12, generator=generator)
    x = ball.project(torch.randn(3, 12, generator=generator) * ball.levels, ball.bounds(x0))
    assert torch.allclose(ball.project(x, ball.bounds(x0)), x, atol=1e-4 if bits is None else 0)
    shown = ball.shown(x, x0)
    change = shown - x0
    size = change.abs().amax(1) if norm == "linf" else change.norm(dim=1)
    assert float(size.max()) <= eps * (1 + 1e-5) + 1e-6
