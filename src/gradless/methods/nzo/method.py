"""NZO: zeroth-order optimization by node perturbation at the answer's token; ours, after Widrow's rule for single units
(Madaline III, 1990) and Lansdell et al. (2020, arXiv 1906.00889), who learn a backward path from perturbed nodes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from gradless.batch import Batch, Loss
from gradless.errors import GradlessError
from gradless.methods.base import Estimate, Group, Measurement, ZerothOrderOptimizer, mean_losses
from gradless.methods.nzo.calibration import Calibration, Stored, contrasts, draw
from gradless.methods.nzo.layer_outputs import LayerOutputs
from gradless.noise import Rademacher
from gradless.spaces import BlockSpace, Space
from gradless.tensor import Part

MOST = 7
"""Largest absolute value of the whole numbers that a step keeps; each takes about three bits in the journal."""
RESOLUTION = 2.5
"""Number of quantization steps of a stored response in one eps."""
REMEMBERED = 8
"""Approximate number of steps whose queries determine the sensitivity."""


@dataclass(frozen=True)
class NodeMeasurement(Measurement):
    """The forward of one micro-batch of B examples, in T contrasts of the words' scores.

    Attributes:
        losses: one pair: the mean loss at the +eps of all queries, and at their -eps.
        responses: fp32 (B q, T), half the difference between a query's two sides.
        errors: fp32 (B, T), minus the gradient of the loss: contrasts of onehot(label) - softmax(scores).
        features: fp32 (N, B, features), for each layer.
    """

    responses: Tensor
    errors: Tensor
    features: Tensor


class NZO(ZerothOrderOptimizer):
    """Zeroth-order optimization by node perturbation.

    Linear layer n has the outputs y_n = W_n x_n at the token where the answer is given. The answer is one of C words, and the
    loss depends on T = C - 1 orthonormal contrasts t of the words' scores. The gradient of a weight is

        dL / dW_n = - J_n^T e x_n^T,        J_n = dt / dy_n,    e = contrasts of ([right word] - softmax)

    A forward shows x_n and e, so only J_n is searched: one number for each contrast and output, however many inputs the layer
    has. J_n is nearly the same for all examples in a model's last layers, and similar in neighbouring layers that add to one
    residual stream. Each example's token is passed 2 q more times, each copy seen by itself alone. This is the whole cost of q
    queries:

        xi_ik ~ {-1, +1}^D                             D: the outputs of all N layers together
        d_ik = [t_i(y + eps a / sqrt(N) xi_ik) - t_i(y - eps a / sqrt(N) xi_ik)] / 2
        S <- S + sum_ik (d_ik - S xi_ik) (C xi_ik)^T / (D + min(t, 8) B q c),      C_nm = exp(-|n - m| / N)

    a_n makes all layers count the same (`Calibration.shift`), so that d has a root mean square of eps; t is the step, from 1
    on, and c = max_n sum_m C_nm. S tends to the mean of J eps a / sqrt(N). It learns from the surprise, the part of a response
    that it did not predict. Then

        W_n <- W_n + eta a_n S_n^T (1/B sum_i e_i phi_n(x_i)^T) phi_n,        phi_n: the layer's features, see `Calibration`

    projected on the tuned values (`BlockSpace.move_along_outer_product`). lr is the intended root mean square change of the
    batch's contrasts by a step; eta follows from lr, S and the features. So eps and lr are both in units of the words' scores.

    A step keeps its surprises and features as small whole numbers. So the journal stays small, and sums are exact in any order.

    Args:
        spaces: block values, relative, of layers with the same number of outputs, in the order of the model.
        lr: see above.
        eps: see above.
        words: C.
        looks: the `Calibration` of each tensor, as plain values.
        q: number of queries an example.
        seed: the run's seed.

    Raises:
        GradlessError: a space that has no block values, or has codebooks, or layers of different widths.
    """

    def __init__(
        self,
        spaces: Iterable[Space] | Iterable[Group],
        lr: float = 0.6,
        eps: float = 0.25,
        *,
        words: int,
        looks: Mapping[str, Stored],
        q: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__(spaces, {"lr": lr, "eps": eps}, q=q, seed=seed, distribution=Rademacher())
        self.layers: list[BlockSpace] = []
        for space in self.spaces:
            if not isinstance(space, BlockSpace):
                raise GradlessError(f"nzo tunes values of blocks; {space.name} is {type(space).__name__}.")
            if space.weight.rows != self.spaces[0].values.shape[0]:
                raise GradlessError(
                    f"nzo tunes layers that write into one residual stream, of one width; {space.name} has {space.weight.rows} "
                    "outputs: choose others with --target-modules."
                )
            if space.weight.part is Part.CODEBOOK:
                raise GradlessError(f"nzo tunes values that belong to one row; entries of {space.name}'s codebooks do not.")
            self.layers.append(space)
        self.calibrations = {space.name: Calibration.from_json(looks[space.name]) for space in self.layers}
        self.contrasts = contrasts(words)
        self.copies = 2 * q
        layers = range(len(self.calibrations))
        self.agreement = [[math.exp(-abs(n - m) / len(layers)) for m in layers] for n in layers]
        self.sensitivity = torch.zeros(len(layers), words - 1, self.layers[0].weight.rows)

    @property
    def arguments(self) -> dict[str, object]:
        looks = {name: each.to_json() for name, each in self.calibrations.items()}
        return {"seed": self.seed, "q": self.q, "words": len(self.contrasts) + 1, "looks": looks}

    def derivative(self, plus: Loss, minus: Loss, group: Group) -> Loss:
        del plus, minus, group
        raise GradlessError("a step of nzo follows from scores and layer outputs, not from losses alone.")

    @property
    def response_unit(self) -> float:
        """The quantization step of a stored response: eps / 2.5."""
        return float(self.param_groups[0]["eps"]) / RESOLUTION

    def signs(self, step: int, first: int, count: int) -> Tensor:
        """xi of queries [first, first + count) of a step: fp32 (N, count, rows), rows in the file's order."""
        direction, rows = self.direction(step, 0, self.param_groups[0]), self.sensitivity.shape[2]
        return torch.stack([draw(direction, name, first + count, rows)[first:] for name in self.calibrations])

    @torch.no_grad()
    def measure(self, batch: Batch) -> NodeMeasurement:
        """Query a micro-batch whose answer tokens have 2 q copies each."""
        labels, tokens = batch.labels.cpu(), batch.answer_tokens
        outputs = LayerOutputs(batch.layers(list(self.calibrations)))
        n, size = len(labels), self.param_groups[0]["eps"] / math.sqrt(len(self.layers))
        of_file = zip(self.layers, self.signs(self.t, batch.first * self.q, n * self.q), strict=True)
        signs = {space.name: xi[:, space.weight.file_rows.cpu()] for space, xi in of_file}

        def shift(name: str) -> Tensor:
            xi = signs[name].view(n, self.q, -1)
            both: Tensor = size * self.calibrations[name].shift * torch.cat([xi, -xi], 1)
            return both.flatten(0, 1).to(tokens.device)

        with outputs.read(tokens[:, 0]) as seen, outputs.shifted(tokens[:, 1:].flatten(), shift):
            scores = batch.answer_scores().cpu()
        plain, plus, minus = torch.split(scores, [1, self.q, self.q], 1)
        up, down = (
            float(F.cross_entropy(side.transpose(1, 2), labels.unsqueeze(1).expand(-1, self.q))) for side in (plus, minus)
        )
        errors = F.one_hot(labels, scores.shape[2]) - plain.squeeze(1).softmax(1)
        features = [each.gains * (seen[name][0].cpu() @ each.features.T.float()) for name, each in self.calibrations.items()]
        responses = ((plus - minus) @ self.contrasts.T / 2).flatten(0, 1)
        return NodeMeasurement(((up, down),), n, responses, errors @ self.contrasts.T, torch.stack(features))

    def estimate(self, measurements: Sequence[Measurement]) -> Estimate:
        """The estimate that follows from a step's micro-batches. Its d are whole numbers: the surprise of each query and
        contrast, then the sum of e_i phi_n(x_i) for each layer, contrast and feature."""
        nodes = [each for each in measurements if isinstance(each, NodeMeasurement)]
        ((up, down),) = mean_losses(nodes)
        if not math.isfinite(up + down):
            return Estimate(self.t, ((up, down),), ((),), (0.0,))
        errors, responses = (torch.cat(each) for each in zip(*((m.errors, m.responses) for m in nodes), strict=True))
        features = torch.cat([each.features for each in nodes], 1)
        signs = self.signs(self.t, 0, len(responses))
        foreseen = torch.einsum("nkr,ntr->kt", signs, self.sensitivity)
        surprise = ((responses - foreseen) / self.response_unit).round().clamp(-MOST, MOST)
        followed = torch.einsum("bt,nbf->ntf", errors, features) / len(errors)
        whole = (followed / followed.abs().max().clamp(min=1e-30) * MOST).round()
        learned = self._learned(self.t, surprise, signs)
        change = torch.einsum("nbf,ntf,ntr,nur->bu", features, whole, learned, learned)
        size = float(change.square().mean().sqrt()) / self.param_groups[0]["eps"] * math.sqrt(len(self.calibrations))
        eta = self.backoff.factor * self.param_groups[0]["lr"] / size if size > 0 else 0.0
        d = (*surprise.flatten().int().tolist(), *whole.flatten().int().tolist())
        return Estimate(self.t, ((up, down),), (d,), (eta,))

    def _learned(self, step: int, surprise: Tensor, signs: Tensor) -> Tensor:
        """S after a step whose queries, along `signs`, had these surprises: whole numbers, (queries, T)."""
        own = [surprise.T @ of_layer for of_layer in signs]  # exact in any order
        seen = min(step + 1, REMEMBERED) * len(surprise)
        alpha = self.response_unit / (self.sensitivity.shape[2] * len(own) + seen * max(map(sum, self.agreement)))
        learned = []
        for of_layer, agreement in zip(self.sensitivity, self.agreement, strict=True):
            total = torch.zeros_like(of_layer)
            for share, each in zip(agreement, own, strict=True):
                total = total + share * each
            learned.append(of_layer + alpha * total)
        return torch.stack(learned)

    @torch.no_grad()
    def apply(self, *estimates: Estimate) -> None:
        """Update S, and the weights by it; see the class."""
        for estimate in estimates:
            if estimate.finite:
                self._apply(estimate)
                self.backoff.observe(float(estimate.loss))
        self.t = estimates[-1].step + 1

    def _apply(self, estimate: Estimate) -> None:
        t = len(self.contrasts)
        sizes = [t * len(each.features) for each in self.calibrations.values()]
        numbers = torch.tensor(estimate.d[0], dtype=torch.float32)
        surprise, *whole = torch.split(numbers, [len(numbers) - sum(sizes), *sizes])
        surprise = surprise.view(-1, t)
        self.sensitivity = self._learned(estimate.step, surprise, self.signs(estimate.step, 0, len(surprise)))
        for space, of_layer, c in zip(self.layers, self.sensitivity, whole, strict=True):
            calibration = self.calibrations[space.name]
            columns = (calibration.gains * c.view(t, -1)) @ calibration.features.float()  # exact in any order
            space.move_along_outer_product(of_layer, columns, estimate.lr[0] * calibration.shift / calibration.slope)
