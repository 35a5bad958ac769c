"""NZO: zeroth-order optimization by node perturbation, where the answer is given; ours, after Widrow's rule for single units
(Madaline III, 1990) and Lansdell et al. (2020, arXiv 1906.00889), who learn a backward path from perturbed nodes."""

from __future__ import annotations

import base64
import math
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gradless import kernels
from gradless.errors import GradlessError
from gradless.methods.base import Estimate, Group, ZerothOrderOptimizer
from gradless.nodes import Nodes
from gradless.noise import Direction, Rademacher
from gradless.spaces import BlockSpace, Space
from gradless.tensor import Part

MOST = 7
"""Largest of a step's whole numbers: some three bits each in the journal."""
RESOLUTION = 2.5
"""Units of those of them that are responses to one eps."""
FINEST = 7
"""Largest of the whole numbers that features are made with."""
FEATURES = 24
"""Principal directions of a layer's inputs in which updates lie."""
REMEMBERED = 8
"""Steps whose queries the sensitivity rests on, about."""
DAMPING = 0.01
"""lambda: of the inputs' mean square length."""
LOOKS = 8
"""Queries that the size of a layer's shifts rests on, at least."""
PROBE = 0.5
"""By how much of its outputs' root mean square a layer is shifted before the run, to see how far the answers follow."""


@dataclass(frozen=True)
class Look:
    """What a layer takes in where answers are given, and how far they follow what it puts out, as seen before the run.

    Attributes:
        features: int8 (features, columns), B: a token's features are gains * (B x).
        gains: fp32 (features,), powers of two, so that sums over features are exact.
        unit: a: random signs of this size, added to the outputs, change the contrasts by a root mean square of 1.
        slope: mean square of what a weight changes by, where its tuned value moves by one unit.
    """

    features: Tensor
    gains: Tensor
    unit: float
    slope: float

    @classmethod
    def of(cls, inputs: Tensor, unit: float, slope: float) -> Look:
        """From inputs (n, columns), in the first of their directions as `damped` gives them."""
        scaled = damped(inputs)[:FEATURES]
        exponents = (scaled.abs().amax(1) / FINEST).log2().ceil()
        features = (scaled * (-exponents).exp2().unsqueeze(1)).round().to(torch.int8)
        return cls(features, exponents.exp2().float(), unit, slope)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        text = base64.b85encode(zlib.compress(self.features.numpy().tobytes(), 9)).decode()
        gains = [int(gain) for gain in self.gains.log2()]
        return {"features": text, "gains": gains, "unit": self.unit, "slope": self.slope}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Look:
        """What `to_json` made."""
        raw = torch.frombuffer(bytearray(zlib.decompress(base64.b85decode(values["features"]))), dtype=torch.int8)
        gains = torch.tensor(values["gains"], dtype=torch.float32).exp2()
        return cls(raw.view(len(gains), -1), gains, values["unit"], values["slope"])


@dataclass(frozen=True)
class Answers:
    """What the forward of one micro-batch of B examples said, in T contrasts of the words' scores.

    Attributes:
        losses: mean loss at the queries' +eps, and at their -eps, times B.
        responses: (B q, T), half of what a query's two sides differ by.
        errors: (B, T), what the contrasts of the loss's gradient lack: those of [right word] - softmax(scores).
        features: (N, B, features), of each layer.
    """

    losses: tuple[float, float]
    responses: Tensor
    errors: Tensor
    features: Tensor


def damped(inputs: Tensor) -> Tensor:
    """Directions that make features of inputs (n, columns): fp64 (min(n, columns), columns), those of the longest inputs first.

    With u_k the inputs' principal directions, uncentred, v_k the mean square along one of them and v that of their length, they
    are

        u_k / sqrt(v (1 + v_k / (lambda v)))

    so that one direction in which all inputs are long has no more to say than the others.
    """
    _, spread, directions = torch.linalg.svd(inputs.double(), full_matrices=False)
    along, length = spread.square() / len(inputs), spread.square().sum() / len(inputs)
    scaled: Tensor = directions / (length * (1 + along / (DAMPING * length))).sqrt().unsqueeze(1)
    return scaled


class NZO(ZerothOrderOptimizer):
    """Zeroth-order optimization by node perturbation.

    A linear layer n puts out y_n = W_n x_n at the token where the answer is given; the answer is one of C words. Of the words'
    scores only T = C - 1 orthonormal contrasts t count. A weight's gradient is

        dL / dW_n = - J_n^T e x_n^T,        J_n = dt / dy_n,    e = contrasts of ([right word] - softmax)

    of which a forward shows x_n and e. What is searched is J_n alone: a number for each contrast and output, whatever the
    layer's inputs, nearly the same for all examples in a model's last layers, and much alike in neighbours that add to one
    residual stream. Each example's token is passed again 2 q times, seen by none but itself, which is all that q queries cost:

        xi_ik ~ {-1, +1}^D                             D: the outputs of all N layers together
        d_ik = [t_i(y + eps a / sqrt(N) xi_ik) - t_i(y - eps a / sqrt(N) xi_ik)] / 2
        S <- S + sum_ik (d_ik - S xi_ik) (C xi_ik)^T / (D + min(t, 8) B q c),      C_nm = exp(-|n - m| / N)

    with a_n what makes all layers count the same (see `Look`), so that d has a root mean square of eps, t the step, from 1 on,
    and c = max_n sum_m C_nm. S tends to the mean of J eps a / sqrt(N), and only what it did not foresee is learned. Then

        W_n <- W_n + eta a_n S_n^T (1/B sum_i e_i phi_n(x_i)^T) phi_n,        phi_n: the layer's features, see `Look`

    projected on what is tuned (`BlockSpace.follow`). lr is the root mean square by which a step is to change the batch's
    contrasts; eta follows from it, S and the features. So eps and lr are both in units of the words' scores.

    A step's surprises and features are small whole numbers: a journal stays small, and sums over them are exact in any order.

    Args:
        spaces: block values, relative, of layers with the same outputs; from the first such layer of the model to the last.
        lr: see above.
        eps: see above.
        words: C.
        looks: of each tensor its `Look`, as plain values.
        q: queries an example.
        seed: of the run.

    Raises:
        GradlessError: a space that holds no block values, or codebooks, or layers of different widths.
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 0.6,
        eps: float = 0.25,
        *,
        words: int,
        looks: Mapping[str, Mapping[str, Any]],
        q: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(spaces, {"lr": lr, "eps": eps}, q=q, seed=seed, distribution=Rademacher())
        self.followed: list[BlockSpace] = []
        for space in self.spaces:
            if not isinstance(space, BlockSpace):
                raise GradlessError(f"nzo tunes values of blocks; {space.name} is {type(space).__name__}.")
            if space.weight.rows != self.spaces[0].values.shape[0]:
                raise GradlessError(
                    f"nzo tunes layers that write into one residual stream, of one width; {space.name} has {space.weight.rows} "
                    "outputs: choose others with --target-modules."
                )
            if space.weight.part is Part.CODEBOOK:
                raise GradlessError(f"nzo tunes what belongs to one row; an entry of {space.name}'s codebooks does not.")
            self.followed.append(space)
        self.looks = {space.name: Look.from_json(looks[space.name]) for space in self.followed}
        self.contrasts = contrasts(words)
        layers = range(len(self.looks))
        self.agreement = [[math.exp(-abs(n - m) / len(layers)) for m in layers] for n in layers]
        self.sensitivity = torch.zeros(len(layers), words - 1, self.followed[0].weight.rows)
        self.nodes: Nodes | None = None

    def derivative(self, plus: Any, minus: Any, group: Group) -> Any:
        raise NotImplementedError("a step of nzo follows from answers, not from losses: see estimate_of_answers")

    @property
    def unit(self) -> float:
        """Of the responses in the journal."""
        return float(self.param_groups[0]["eps"]) / RESOLUTION

    def signs(self, step: int, first: int, count: int) -> Tensor:
        """xi of queries [first, first + count) of a step: fp32 (N, count, rows), rows in the file's order."""
        direction, rows = self.direction(step, 0, self.param_groups[0]), self.sensitivity.shape[2]
        return torch.stack([_drawn(direction, name, first + count, rows)[first:] for name in self.looks])

    @torch.no_grad()
    def ask(self, scores: Callable[[], Tensor], labels: Tensor, tokens: Tensor, first: int = 0) -> Answers:
        """Query a micro-batch of B examples.

        Args:
            scores: runs the model and returns the words' scores at every token of `tokens`: fp32 (B, 1 + 2 q, C).
            labels: int64 (B,), the right words.
            tokens: int64 (B, 1 + 2 q), which tokens of the batch, flattened, are each example's last and its copies.
            first: the number of the first query within the step.
        """
        assert self.nodes is not None
        n, size = len(labels), self.param_groups[0]["eps"] / math.sqrt(len(self.looks))
        of_file = zip(self.followed, self.signs(self.t, first, n * self.q), strict=True)
        signs = {space.name: xi[:, space.weight.file_rows.cpu()] for space, xi in of_file}

        def shift(name: str) -> Tensor:
            xi = signs[name].view(n, self.q, -1)
            both: Tensor = size * self.looks[name].unit * torch.cat([xi, -xi], 1)
            return both.flatten(0, 1).to(tokens.device)

        with self.nodes.read(tokens[:, 0]) as seen, self.nodes.shifted(tokens[:, 1:].flatten(), shift):
            answered = scores().cpu()
        labels = labels.cpu()
        plain, plus, minus = torch.split(answered, [1, self.q, self.q], 1)
        up, down = (
            n * float(F.cross_entropy(side.transpose(1, 2), labels.unsqueeze(1).expand(-1, self.q))) for side in (plus, minus)
        )
        lacking = F.one_hot(labels, answered.shape[2]) - plain.squeeze(1).softmax(1)
        features = [look.gains * (seen[name][0].cpu() @ look.features.T.float()) for name, look in self.looks.items()]
        responses = ((plus - minus) @ self.contrasts.T / 2).flatten(0, 1)
        return Answers((up, down), responses, lacking @ self.contrasts.T, torch.stack(features))

    def estimate_of_answers(self, answers: Sequence[Answers]) -> Estimate:
        """The estimate that follows from a step's micro-batches. Its d are whole numbers: of every query, contrast by contrast,
        what S did not foresee; then of every layer, contrast by contrast, the features to follow."""
        errors = torch.cat([each.errors for each in answers])
        up, down = (sum(each.losses[side] for each in answers) / len(errors) for side in (0, 1))
        if not math.isfinite(up + down):
            return Estimate(self.t, ((up, down),), ((),), (0.0,))
        responses = torch.cat([each.responses for each in answers])
        features = torch.cat([each.features for each in answers], 1)
        signs = self.signs(self.t, 0, len(responses))
        foreseen = torch.einsum("nkr,ntr->kt", signs, self.sensitivity)
        surprise = ((responses - foreseen) / self.unit).round().clamp(-MOST, MOST)
        followed = torch.einsum("bt,nbf->ntf", errors, features) / len(errors)
        whole = (followed / followed.abs().max().clamp(min=1e-30) * MOST).round()
        learned = self._learned(self.t, surprise, signs)
        change = torch.einsum("nbf,ntf,ntr,nur->bu", features, whole, learned, learned)
        size = float(change.square().mean().sqrt()) / self.param_groups[0]["eps"] * math.sqrt(len(self.looks))
        eta = self.watch.factor * self.param_groups[0]["lr"] / size if size > 0 else 0.0
        d = (*surprise.flatten().int().tolist(), *whole.flatten().int().tolist())
        return Estimate(self.t, ((up, down),), (d,), (eta,))

    def _learned(self, step: int, surprise: Tensor, signs: Tensor) -> Tensor:
        """S after a step, whose queries, along `signs`, brought these surprises: whole numbers, (queries, T)."""
        own = [surprise.T @ of_layer for of_layer in signs]  # exact in any order
        seen = min(step + 1, REMEMBERED) * len(surprise)
        alpha = self.unit / (self.sensitivity.shape[2] * len(own) + seen * max(map(sum, self.agreement)))
        learned = []
        for of_layer, agreement in zip(self.sensitivity, self.agreement, strict=True):
            total = torch.zeros_like(of_layer)
            for share, each in zip(agreement, own, strict=True):
                total = total + share * each
            learned.append(of_layer + alpha * total)
        return torch.stack(learned)

    @torch.no_grad()
    def apply(self, *estimates: Estimate) -> None:
        """Learn S, and follow it: see the class."""
        for estimate in estimates:
            if estimate.finite:
                self._apply(estimate)
                self.watch.see(estimate.loss)
        self.t = estimates[-1].step + 1

    def _apply(self, estimate: Estimate) -> None:
        t = len(self.contrasts)
        sizes = [t * len(look.features) for look in self.looks.values()]
        numbers = torch.tensor(estimate.d[0], dtype=torch.float32)
        surprise, *whole = torch.split(numbers, [len(numbers) - sum(sizes), *sizes])
        surprise = surprise.view(-1, t)
        self.sensitivity = self._learned(estimate.step, surprise, self.signs(estimate.step, 0, len(surprise)))
        for space, of_layer, c in zip(self.followed, self.sensitivity, whole, strict=True):
            look = self.looks[space.name]
            columns = (look.gains * c.view(t, -1)) @ look.features.float()  # exact in any order
            space.move_along_outer_product(of_layer, columns, estimate.lr[0] * look.unit / look.slope)


def contrasts(words: int) -> Tensor:
    """Helmert's: orthonormal and orthogonal to (1, .., 1), fp32 (words - 1, words)."""
    rows = []
    for k in range(1, words):
        size = math.sqrt(k * (k + 1))
        rows.append([1 / size] * k + [-k / size] + [0.0] * (words - k - 1))
    return torch.tensor(rows)


def _drawn(direction: Direction, name: str, count: int, rows: int) -> Tensor:
    return kernels.on("cpu").coordinates(direction, name, count * rows, torch.device("cpu")).view(count, rows)


def looked_at(
    nodes: Nodes,
    slopes: Mapping[str, float],
    batches: Sequence[tuple[Callable[[], Tensor], Tensor]],
    q: int,
    seed: int,
) -> dict[str, Look]:
    """A run's first look: a `Look` of every layer.

    Args:
        nodes: the layers.
        slopes: mean squares, see `Look`.
        batches: of each of some micro-batches the `scores` and the `tokens` of `NZO.ask`; gone through again until every layer
            has been asked `LOOKS` times.
        q: queries an example; each shifts one layer only, in turn.
        seed: of the run.

    Raises:
        GradlessError: the answers do not follow a layer.
    """
    inputs: dict[str, list[Tensor]] = {name: [] for name in slopes}
    followed: dict[str, list[Tensor]] = {name: [] for name in slopes}
    scores, tokens = batches[0]
    with nodes.read(tokens[:, 0]) as seen:
        scores()
    sizes = {name: PROBE * float(y.square().mean().sqrt()) for name, (_, y) in seen.items()}
    asked = 0
    for step, (scores, tokens) in enumerate(cycle(batches)):
        if step >= len(batches) and asked >= LOOKS * len(slopes):
            break
        mine = (torch.arange(len(tokens) * q) + asked).view(-1, q) % len(slopes)
        asked += mine.numel()

        def shift(name: str, n: int = len(tokens), mine: Tensor = mine, step: int = step) -> Tensor:
            rows = seen[name][1].shape[1]
            xi = _drawn(Direction(seed, step, 1, Rademacher()), name, n * q, rows).view(n, q, -1)
            xi = xi * (mine == list(slopes).index(name)).unsqueeze(2)
            return (sizes[name] * torch.cat([xi, -xi], 1)).flatten(0, 1).to(seen[name][1].device)

        with nodes.read(tokens[:, 0]) as here, nodes.shifted(tokens[:, 1:].flatten(), shift):
            _, plus, minus = torch.split(scores().cpu(), [1, q, q], 1)
        responses = (plus - minus) @ contrasts(plus.shape[2]).T / 2
        for number, name in enumerate(slopes):
            followed[name].append(responses[mine == number])
            if step < len(batches):
                inputs[name].append(here[name][0].cpu())
    looks = {}
    for name, slope in slopes.items():
        response = float(torch.cat(followed[name]).square().mean().sqrt())
        if not 0 < response < math.inf:
            raise GradlessError(
                f"the answers {'are not finite' if response else 'stay as they are'} where the outputs of {name} are shifted; "
                "leave it out with --exclude-modules."
            )
        looks[name] = Look.of(torch.cat(inputs[name]), sizes[name] / response, slope)
    return looks
