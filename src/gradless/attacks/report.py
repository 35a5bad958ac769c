"""The report of an attack: one HTML file, pictures included."""

from __future__ import annotations

import base64
import html
import io
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gradless.attacks.base import AttackResult
from gradless.files import write_text

SHOWN = 24
"""Most images in the grid: spread evenly from the fewest queries to the most, failures last."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .3rem .8rem; text-align: left; border-bottom: 1px solid #ddd; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .6rem; border: 1px solid #ddd; border-radius: .4rem; }
figure img { width: 31%; image-rendering: pixelated; } figcaption { font-size: .85rem; } .failed { color: #b00; }
"""


def write_report(path: Path, about: dict[str, object], images: Tensor, labels: Tensor, result: AttackResult) -> None:
    """Write the figures, a curve of success against the budget, and a grid of original, perturbation and adversarial images.

    Args:
        path: the file.
        about: the attack's options, as plain values.
        images: fp32 (n, ...), the originals: (height, width), (channels, height, width) or (height, width, channels). Other
            shapes are drawn as one row.
        labels: int64 (n,), the criterion's classes.
        result: the attack's result.
    """
    summary = {name: "–" if value is None else value for name, value in result.summary().items()}
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(_short(value))}</td></tr>" for name, value in summary.items()
    )
    how = ", ".join(
        f"{name} {_short(value)}" for name, value in about.items() if value not in (None, False) and name != "images"
    )
    cards = "".join(_card(i, images, labels, result) for i in _chosen(result))
    write_text(
        path,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>gradless attack</title>'
        f"<style>{STYLE}</style></head>"
        f"<body><h1>{result.within(int(result.queries.max())):.1%} of {len(labels)} images have an adversarial twin</h1>"
        f"<p>{html.escape(how)}</p><table>{rows}</table><h2>Success against the budget</h2>"
        f'<img id="curve" alt="share of images found against queries" src="{_curve(result)}">'
        f"<h2>Original, perturbation, adversarial image</h2>"
        f'<p>No change is drawn grey, the largest of an image black or white.</p><div class="grid">{cards}</div>'
        "</body></html>\n",
    )


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _chosen(result: AttackResult) -> list[int]:
    cost = result.queries + (~result.success) * 2**32
    order: list[int] = cost.argsort(stable=True).tolist()
    return [order[i] for i in np.unique(np.linspace(0, len(order) - 1, min(SHOWN, len(order))).round().astype(int))]


def _card(i: int, images: Tensor, labels: Tensor, result: AttackResult) -> str:
    change = result.perturbations[i]
    shown = (images[i], 0.5 + change / (2 * max(float(change.abs().max()), 1e-9)), result.images[i])
    names = ("original", "perturbation", "adversarial image")
    pictures = " ".join(f'<img alt="{name}" src="{_picture(image.numpy())}">' for name, image in zip(names, shown, strict=True))
    if bool(result.success[i]):
        says = f"image {i}: label {int(labels[i])}, taken for {int(result.classes[i])}, queries: {int(result.queries[i])}"
    else:
        says = f'<span class="failed">image {i}: label {int(labels[i])}, not found, queries: {int(result.queries[i])}</span>'
    return f"<figure>{pictures}<figcaption>{says}</figcaption></figure>"


def _picture(image: NDArray[np.float32]) -> str:
    from PIL import Image

    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[:, :, 0]
    if image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        image = image.reshape(1, -1)
    low, high = min(0.0, float(image.min())), max(1.0, float(image.max()))
    file = io.BytesIO()
    Image.fromarray(np.round((image - low) / (high - low) * 255).astype(np.uint8)).save(file, format="PNG")
    return _data(file)


def _curve(result: AttackResult) -> str:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    spent = np.sort(result.queries[result.success].numpy())
    figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
    axis.step(spent, np.arange(1, len(spent) + 1) / len(result.success), where="post")
    axis.set(xlabel="budget, queries an image", ylabel="share of images found", xscale="symlog", ylim=(0, 1.02))
    axis.grid(alpha=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    plt.close(figure)
    return _data(file)


def _data(file: io.BytesIO) -> str:
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
