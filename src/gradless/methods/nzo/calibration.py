"""NZO's calibration of each layer, by a few forwards before the run."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TypedDict

import torch
from torch import Tensor

from gradless import kernels
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.methods.nzo.layer_outputs import LayerOutputs
from gradless.noise import Direction, Rademacher

FINEST = 7
"""Largest absolute value in a direction of features, which holds whole numbers."""
FEATURES = 24
"""Number of principal directions of a layer's inputs in which updates lie."""
DAMPING = 0.01
"""lambda in `damped`, as a share of the inputs' mean square length."""
LEAST_QUERIES = 8
"""Smallest number of queries behind the size of a layer's shifts."""
PROBE = 0.5
"""Size of a calibration's shift, as a share of the root mean square of the layer's outputs."""


class Stored(TypedDict):
    """A `Calibration` as plain values: `unit` is its shift, `gains` are exponents of 2."""

    features: str
    gains: list[int]
    unit: float
    slope: float


@dataclass(frozen=True)
class Calibration:
    """Calibration of one layer: its inputs at answer tokens, and how strongly the answers react to its outputs.

    Attributes:
        features: int8 (features, columns), B: a token's features are gains * (B x).
        gains: fp32 (features,), powers of two, so that sums over features are exact.
        shift: a: random signs of this size, added to the outputs, change the contrasts by a root mean square of 1.
        slope: mean square change of a weight for a move of its tuned value by one unit.
    """

    features: Tensor
    gains: Tensor
    shift: float
    slope: float

    @classmethod
    def of(cls, inputs: Tensor, shift: float, slope: float) -> Calibration:
        """The features are the first of the `damped` directions of inputs, (n, columns)."""
        scaled = damped(inputs)[:FEATURES]
        exponents = (scaled.abs().amax(1) / FINEST).log2().ceil()
        features = (scaled * (-exponents).exp2().unsqueeze(1)).round().to(torch.int8)
        return cls(features, exponents.exp2().float(), shift, slope)

    def to_json(self) -> Stored:
        """As plain values."""
        text = base64.b85encode(zlib.compress(self.features.numpy().tobytes(), 9)).decode()
        gains = [int(gain) for gain in self.gains.log2()]
        return {"features": text, "gains": gains, "unit": self.shift, "slope": self.slope}

    @classmethod
    def from_json(cls, values: Stored) -> Calibration:
        """The inverse of `to_json`."""
        raw = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(values["features"]))), dtype=torch.int8)
        gains = torch.tensor(values["gains"], dtype=torch.float32).exp2()
        return cls(raw.view(len(gains), -1), gains, values["unit"], values["slope"])


def damped(inputs: Tensor) -> Tensor:
    """Directions that turn inputs, (n, columns), into features: fp64 (min(n, columns), columns), largest v_k first.

        u_k / sqrt(v (1 + v_k / (lambda v)))

    u_k are the uncentred principal directions of the inputs, v_k is the mean square along u_k, v the mean square length. The
    damping keeps a direction in which all inputs are long from outweighing the others.
    """
    _, spread, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    along, length = spread.square() / len(inputs), spread.square().sum() / len(inputs)
    scaled: Tensor = directions / (length * (1 + along / (DAMPING * length))).sqrt().unsqueeze(1)
    return scaled


def contrasts(words: int) -> Tensor:
    """Helmert's contrasts, orthonormal and orthogonal to (1, .., 1): fp32 (words - 1, words)."""
    rows = []
    for k in range(1, words):
        size = math.sqrt(k * (k + 1))
        rows.append([1 / size] * k + [-k / size] + [0.0] * (words - k - 1))
    return torch.tensor(rows)


def draw(direction: Direction, name: str, count: int, rows: int) -> Tensor:
    """Coordinates of a direction, `count` times `rows` of them: fp32 (count, rows)."""
    return kernels.on("cpu").coordinates(direction, name, count * rows, torch.device("cpu")).view(count, rows)


def calibrate(batches: Sequence[Batch], slopes: Mapping[str, float], q: int, seed: int) -> dict[str, Calibration]:
    """Shift one layer at a time at copies of the answer tokens, and read its inputs.

    Args:
        batches: micro-batches, each with 2 q copies of its answer tokens; repeated until every layer has had `LEAST_QUERIES`
            queries.
        slopes: the slope of each layer; see `Calibration`.
        q: number of queries an example; each shifts one layer, in turn.
        seed: the run's seed.

    Raises:
        GradlessError: the answers do not react to a layer.
    """
    names = list(slopes)
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    reactions: dict[str, list[Tensor]] = {name: [] for name in names}
    outputs, tokens = LayerOutputs(batches[0].layers(names)), batches[0].answer_tokens
    with outputs.read(tokens[:, 0]) as seen:
        batches[0].answer_scores()
    sizes = {name: PROBE * float(y.square().mean().sqrt()) for name, (_, y) in seen.items()}
    asked = 0
    for step, batch in enumerate(cycle(batches)):
        if step >= len(batches) and asked >= LEAST_QUERIES * len(names):
            break
        tokens = batch.answer_tokens
        mine = (torch.arange(len(tokens) * q) + asked).view(-1, q) % len(names)
        asked += mine.numel()

        def shift(name: str, n: int = len(tokens), mine: Tensor = mine, step: int = step) -> Tensor:
            rows = seen[name][1].shape[1]
            xi = draw(Direction(seed, step, 1, Rademacher()), name, n * q, rows).view(n, q, -1)
            xi = xi * (mine == names.index(name)).unsqueeze(2)
            return (sizes[name] * torch.cat([xi, -xi], 1)).flatten(0, 1).to(seen[name][1].device)

        with outputs.read(tokens[:, 0]) as here, outputs.shifted(tokens[:, 1:].flatten(), shift):
            _, plus, minus = torch.split(batch.answer_scores().cpu(), [1, q, q], 1)
        responses = (plus - minus) @ contrasts(plus.shape[2]).T / 2
        for number, name in enumerate(names):
            reactions[name].append(responses[mine == number])
            if step < len(batches):
                inputs[name].append(here[name][0].cpu())
    found = {}
    for name, slope in slopes.items():
        response = float(torch.cat(reactions[name]).square().mean().sqrt())
        if not 0 < response < math.inf:
            raise GradlessError(
                f"the answers {'are not finite' if response else 'stay as they are'} when the outputs of {name} are shifted; "
                "leave it out with --exclude-modules."
            )
        found[name] = Calibration.of(torch.cat(inputs[name]), sizes[name] / response, slope)
    return found
