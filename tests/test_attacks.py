"""Attacks: counts that are exact, perturbations on their grid and in their ball, answers that are paid for once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless import LabelAttack, QueryLog, SignHunter, ZOQOAttack, ZOSignSGDAttack
from gradless.attacks.ball import Ball
from gradless.attacks.criteria import Misclassification, TargetedMisclassification
from gradless.attacks.directions import Chunks
from gradless.errors import GradlessError
from gradless.noise import Direction

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
    criterion = TargetedMisclassification(labels) if targeted else Misclassification(labels)
    more = {"bits": bits, "norm": norm, "pixel_bits": pixel_bits, "seed": seed, "max_queries": 60}
    if method == "chunks" and norm == "l2" and bits == 2:
        with pytest.raises(GradlessError, match="take more bits"):
            METHODS[method](eps, **more).attack(model, x, criterion)
        return
    attack = METHODS[method](eps, **more)
    result = attack.attack(model, x, criterion)
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


@given(seed=st.integers(0, 99), targeted=st.booleans())
def test_a_loss_below_zero_is_an_adversarial_input(seed, targeted):
    generator = torch.Generator().manual_seed(seed)
    scores, classes = torch.randn(9, 5, generator=generator), torch.randint(0, 5, (12,), generator=generator)
    asked = torch.randperm(12, generator=generator)[:9]
    criterion = (TargetedMisclassification if targeted else Misclassification)(classes)
    named = scores.argmax(1)
    adversarial = (named == classes[asked]) if targeted else (named != classes[asked])
    losses, alone = criterion.losses(scores, asked), criterion.losses(named, asked)
    assert torch.equal(losses < 0, adversarial)
    assert torch.equal(alone, torch.where(adversarial, -1.0, 1.0)), "of a class alone the loss is a sign"
    for loss, row, c in zip(losses.tolist(), scores.tolist(), classes[asked].tolist(), strict=True):
        others = max(score for j, score in enumerate(row) if j != c)
        assert loss == pytest.approx(others - row[c] if targeted else row[c] - others)


@pytest.mark.parametrize("criterion", [Misclassification, TargetedMisclassification])
def test_a_criterion_reads_classes_of_any_form(criterion):
    for form in ([2, 0, 1], np.eye(3)[[2, 0, 1]], torch.tensor([[2], [0], [1]])):
        assert criterion(form).classes.tolist() == [2, 0, 1]
    with pytest.raises(GradlessError, match="n images need integers"):
        criterion([0.5, 1.5])
    with pytest.raises(GradlessError, match="n images need integers"):
        criterion(3)


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
@settings(deadline=None, max_examples=25)
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
        ({"criterion": torch.zeros(3, dtype=torch.int64)}, "4 images need integers"),
        ({"criterion": torch.tensor([0, 1, 2, 9])}, "label 9 does not fit a model with 5 classes"),
        ({"criterion": torch.tensor([0.0, 1, 2, 3])}, "labels are torch.float32"),
        ({"criterion": Misclassification(torch.zeros(3, dtype=torch.int64))}, "has 3 classes; 4 images need as many"),
        ({"criterion": TargetedMisclassification([0, 1, 2, 9])}, "label 9 does not fit a model with 5 classes"),
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
    given = {"predict": linear_model(), "images": images(4), "criterion": torch.arange(4)}
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


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, 5)


LABELS = {
    "a column": lambda y: y[:, None],
    "one-hot": one_hot,
    "one-hot, floats": lambda y: one_hot(y).double().numpy(),
    "one-hot, bool": lambda y: one_hot(y).bool(),
    "bytes": lambda y: y.numpy().astype(np.uint8),
    "big-endian": lambda y: y.numpy().astype(">i4"),
    "a big-endian column": lambda y: y.numpy().astype(">i8")[:, None],
    "a list": lambda y: y.tolist(),
    "a list of rows": lambda y: [[each] for each in y.tolist()],
}


@pytest.mark.parametrize("form", LABELS)
def test_labels_of_any_form_are_the_same_classes(form):
    x, model = images(6), linear_model()
    labels = model(x).argmax(1)
    plain = ZOQOAttack(0.05, max_queries=60).attack(model, x, labels)
    result = ZOQOAttack(0.05, max_queries=60).attack(model, x, LABELS[form](labels))
    assert torch.equal(result.queries, plain.queries)
    assert torch.equal(result.images, plain.images)
    assert int(result.queries.max()) == 60, "some are not found"


@pytest.mark.parametrize(
    "labels",
    [
        torch.full((4, 5), 0.2),  # soft
        torch.zeros(4, 5),
        torch.ones(4, 5, dtype=torch.int64),
        torch.arange(4) - 1,
        torch.arange(4) + 0.5,
        torch.arange(4.0)[:, None],
        torch.arange(4) > 1,
        torch.arange(4)[:, None] > 1,
        torch.arange(4)[None],
        torch.arange(4)[:, None, None],
        torch.arange(4) + 2**31,
        np.array(["a", "b", "c", "d"]),
        np.array([0, 1, None, 2]),
        [[0], [1, 2], [3], [1]],
        torch.tensor(3),
        torch.arange(4).to(torch.complex64),
        one_hot(torch.arange(3)),
        {"labels": 3},
    ],
)
def test_labels_that_are_no_classes_are_refused(labels):
    with pytest.raises(GradlessError, match=r"^labels .*4 images need integers from 0 on, \(n,\) or \(n, 1\), or one-hot"):
        ZOQOAttack(0.1).attack(linear_model(), images(4), labels)


class Output(dict):
    """Such as transformers' models return."""

    def __init__(self, **held):
        super().__init__(**held)
        self.__dict__.update(held)


class Array:
    """Such as other libraries' arrays are."""

    def __init__(self, values):
        self.values_, self.shape, self.dtype = values.numpy(), tuple(values.shape), "float32"

    def __array__(self, dtype=None, copy=None):
        return self.values_ if dtype is None else self.values_.astype(dtype)


SCORES = {
    "logits of an output": lambda s: Output(loss=torch.tensor(1.0), logits=s),
    "a mapping": lambda s: {"hidden": torch.zeros(len(s), 7), "scores": s},
    "its one value": lambda s: {"dense_1": s.numpy()},
    "a tuple": lambda s: (s, torch.zeros(len(s), 9)),
    "behind a loss": lambda s: (torch.tensor(0.3), s),
    "behind labels": lambda s: [s.argmax(1), s.numpy()],
    "in a tuple of one": lambda s: (s,),
    "with a gradient": lambda s: s.clone().requires_grad_(),
    "fp64": lambda s: s.double().numpy(),
    "big-endian": lambda s: s.numpy().astype(">f4"),
    "dimensions of one": lambda s: s[:, :, None, None],
    "lists": lambda s: s.tolist(),
    "rows": lambda s: list(s.numpy()),
    "rows of one image": lambda s: [row[None] for row in s],
    "another library's": lambda s: Array(s),
    "sparse": lambda s: s.to_sparse(),
}


@pytest.mark.parametrize("form", SCORES)
@pytest.mark.parametrize("n", [1, 2, 6])
def test_answers_of_any_form_are_the_same_scores(form, n):
    x, model = images(n, 2), linear_model()
    labels = model(x).argmax(1)
    plain = ZOQOAttack(0.08, max_queries=60).attack(model, x, labels)
    result = ZOQOAttack(0.08, max_queries=60).attack(lambda batch: SCORES[form](model(batch)), x, labels)
    assert torch.equal(result.queries, plain.queries)
    assert torch.equal(result.images, plain.images)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_answers_in_half_precision_are_compared_in_fp32(dtype):
    x, model = images(6), linear_model()
    halves = lambda batch: model(batch).to(dtype)  # noqa: E731
    result = ZOQOAttack(0.1, max_queries=200).attack(halves, x, model(x).argmax(1))
    same = ZOQOAttack(0.1, max_queries=200).attack(lambda batch: halves(batch).float(), x, model(x).argmax(1))
    assert torch.equal(result.queries, same.queries)
    assert result.success.any()


CLASSES = {
    "a column": lambda c: c[:, None],
    "named": lambda c: {"label": c.numpy(), "time": 3},
    "a tuple with confidences": lambda c: (c, torch.rand(len(c))),
    "torch's max": lambda c: torch.nn.functional.one_hot(c, 5).float().max(1),
    "torch's topk of one": lambda c: torch.nn.functional.one_hot(c, 5).float().topk(1),
    "a list of scalars": lambda c: list(c.numpy()),
    "bytes": lambda c: c.to(torch.uint8),
}


@pytest.mark.parametrize("form", CLASSES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_classes_of_any_form_are_the_same(form, n):
    x, model = images(n, 2), linear_model()
    labels = model(x).argmax(1)
    attack = LabelAttack(0.2, max_queries=80)
    plain = attack.attack(lambda batch: model(batch).argmax(1), x, labels)
    result = attack.attack(lambda batch: CLASSES[form](model(batch).argmax(1)), x, labels)
    assert torch.equal(result.queries, plain.queries)
    assert torch.equal(result.images, plain.images)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda s: s[:, :1], "of two classes return both scores"),
        (lambda s: s[:, 0].sigmoid(), "of two classes return both scores"),
        (lambda s: s[:, :1, None, None], "of two classes return both scores"),
        (lambda s: s[:, :1] > 0, "integers from 0 on"),
        (lambda s: s[:, 0] > 0, "integers from 0 on"),
        (lambda s: s > 0, "returned an array of shape"),
        (lambda s: s.argmax(1) - 9, "integers from 0 on"),
        (lambda s: s[:, :, None].repeat(1, 1, 2), "returned an array of shape"),
        (lambda s: s.T, "returned an array of shape"),
        (lambda s: s[:, :0], "returned an array of shape"),
        (lambda s: s.sum(), "returned an array of shape"),
        (lambda s: s[0], "returned an array of shape"),
        (lambda s: s.to(torch.complex64), "returned an array of shape"),
        (lambda s: None, "of type NoneType"),  # noqa: ARG005
        (lambda s: "cat", "of type str"),  # noqa: ARG005
        (lambda s: ["cat"] * len(s), "of type list"),
        (lambda s: [[1.0, 2.0], [1.0]], "of type list"),  # noqa: ARG005
        (lambda s: {}, "returned nothing"),  # noqa: ARG005
        (lambda s: {"pooled": s, "last": s}, "none of which is called scores or labels"),
        (lambda s: {"scores": s.argmax(1)}, "returned scores of shape"),
        (lambda s: {"labels": s}, "returned labels of shape"),
        (lambda s: s.topk(3), "returned classes of shape"),
        (lambda s: tuple(s.topk(3)), "alone or so that they can be told"),
        (lambda s: (torch.tensor(1.0), s, s), "alone or so that they can be told"),
        (lambda s: s.index_fill(1, torch.tensor([2]), float("nan")), "a score that is no finite number for image 0"),
    ],
)
def test_answers_that_could_mean_anything_are_refused(answer, says):
    with pytest.raises(GradlessError, match=says):
        ZOQOAttack(0.1).attack(lambda batch: answer(linear_model()(batch)), images(4), torch.arange(4))


def test_a_model_may_write_into_its_batch_and_take_gradients():
    x, model = images(6), linear_model()
    labels = model(x).argmax(1)

    def rude(batch):
        with torch.enable_grad():
            shift = torch.zeros_like(batch, requires_grad=True)
            (gradient,) = torch.autograd.grad(model(batch + shift).square().sum(), shift)
        assert gradient.abs().sum() > 0
        return model(batch.mul_(2)) / 2

    plain = ZOQOAttack(0.05, max_queries=60).attack(lambda batch: model(batch * 2) / 2, x, labels)
    result = ZOQOAttack(0.05, max_queries=60).attack(rude, x, labels)
    assert torch.equal(result.queries, plain.queries)
    assert torch.equal(result.images, plain.images)


class Noisy:
    """A model that adds noise to every answer."""

    def __init__(self, size: float):
        self.size, self.model, self.generator, self.asked = size, linear_model(), torch.Generator().manual_seed(0), 0

    def __call__(self, batch):
        self.asked += len(batch)
        scores = self.model(batch)
        return scores + self.size * torch.randn(scores.shape, generator=self.generator)


@pytest.mark.parametrize("more", [{}, {"max_total_queries": 207}])
def test_repeated_queries_are_counted_and_their_mean_decides(more, tmp_path):
    x, noisy = images(8), Noisy(2.0)
    labels = noisy.model(x).argmax(1)
    attack = ZOQOAttack(0.15, repeat=10, max_queries=205, **more)
    log = QueryLog(tmp_path / "queries.db", {})
    result = attack.attack(noisy, x, labels, log=log)
    log.close()
    assert noisy.asked == int(result.queries.sum()) <= more.get("max_total_queries", 10**9)
    assert int(result.queries.max()) <= 200
    assert bool((result.queries % 10 == 0).all())
    again = attack.attack(None, x, labels, log=QueryLog(tmp_path / "queries.db", {}))
    assert torch.equal(again.queries, result.queries)


def test_the_mean_of_many_answers_finds_what_holds():
    x, noisy = images(12, 4), Noisy(0.5)
    labels = noisy.model(x).argmax(1)
    once = ZOQOAttack(0.02, max_queries=50).attack(noisy, x, labels)
    often = ZOQOAttack(0.02, max_queries=2500, repeat=50).attack(noisy, x, labels)
    wrong = [int((noisy.model(r.images[r.success]).argmax(1) == labels[r.success]).sum()) for r in (once, often)]
    assert wrong[1] < wrong[0]


def test_a_repeat_of_one_and_of_a_steady_model_change_nothing():
    x, model = images(5), linear_model()
    labels = model(x).argmax(1)
    plain = ZOQOAttack(0.05, max_queries=60).attack(model, x, labels)
    thrice = ZOQOAttack(0.05, max_queries=180, repeat=3).attack(model, x, labels)
    assert torch.equal(thrice.queries, 3 * plain.queries)
    with pytest.raises(GradlessError, match="repeat is 0"):
        ZOQOAttack(0.05, repeat=0)
    with pytest.raises(GradlessError, match="max_queries is 5; one step takes 6"):
        ZOQOAttack(0.05, repeat=3, max_queries=5).attack(model, x, labels)


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
