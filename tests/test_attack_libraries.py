"""Our attacks inside ART and Foolbox, with the real libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from gradless import ZOQOAttack
from gradless.errors import GradlessError


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 4)).eval()


@pytest.fixture
def images():
    return torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def test_art(net, images):
    art = pytest.importorskip("art.estimators.classification")
    from gradless.attacks.art import BlackBoxEvasion

    with torch.inference_mode():
        labels = net(images).argmax(1).numpy()
    classifier = art.PyTorchClassifier(net, nn.CrossEntropyLoss(), (3, 4, 4), 4, clip_values=(0.0, 1.0))
    attack = BlackBoxEvasion(classifier, ZOQOAttack(0.3, max_queries=300))
    for y in (None, labels, labels[:, None], np.eye(4)[labels]):
        adversarial = attack.generate(images.numpy(), y)
        assert np.array_equal(classifier.predict(adversarial).argmax(1) != labels, attack.result.success.numpy())
        assert attack.result.failure_rate < 1
        assert np.abs(adversarial - images.numpy()).max() <= 0.3 + 1e-6
    with pytest.raises(GradlessError, match="not one-hot"):
        attack.generate(images.numpy(), np.full((6, 4), 0.25))
    targeted, wanted = BlackBoxEvasion(classifier, ZOQOAttack(0.3), targeted=True), (labels + 1) % 4
    with pytest.raises(ValueError, match="needs y"):
        targeted.generate(images.numpy())
    reached = classifier.predict(targeted.generate(images.numpy(), np.eye(4)[wanted])).argmax(1)
    assert np.array_equal(reached == wanted, targeted.result.success.numpy())
    assert targeted.result.success.any()


def test_foolbox(net, images):
    foolbox = pytest.importorskip("foolbox")
    from gradless.attacks.foolbox import FoolboxAttack

    model = foolbox.PyTorchModel(net, bounds=(0, 1), device="cpu")
    labels = model(images).argmax(1)
    attack = FoolboxAttack(lambda eps: ZOQOAttack(eps, max_queries=300))
    raw, clipped, success = attack(model, images, labels, epsilons=0.3)
    assert torch.equal(success, model(clipped).argmax(1) != labels)
    assert torch.equal(raw, clipped)
    assert foolbox.utils.accuracy(model, clipped, labels) == pytest.approx(1 - float(success.float().mean()))
    raws, _, by_eps = attack(model, images, foolbox.criteria.Misclassification(labels), epsilons=[0.01, 0.3])
    assert torch.equal(by_eps[1], success)
    assert len(raws) == len(attack.results) == 2
    wanted = foolbox.criteria.TargetedMisclassification((labels + 1) % 4)
    reached = attack(model, images, wanted, epsilons=0.3)
    assert torch.equal(reached[2], model(reached[1]).argmax(1) == (labels + 1) % 4)
    wide = foolbox.PyTorchModel(net, bounds=(0, 255), device="cpu")
    assert torch.equal(
        attack(model, images, labels, epsilons=np.array([0.3]))[2], attack(model, images, labels, epsilons=[0.3])[2]
    )
    with pytest.raises(GradlessError, match="bounds are"):
        attack(wide, images, labels, epsilons=0.3)
    with pytest.raises(GradlessError, match="the criterion is a str; pass labels"):
        attack(model, images, "wrong", epsilons=0.3)
