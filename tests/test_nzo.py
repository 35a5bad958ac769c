"""NZO: what copies of a token see, what is learned of a layer's sensitivity, and what follows from it."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from gradless import NZO, objectives
from gradless.batch import Batch
from gradless.errors import GradlessError
from gradless.formats.gguf_model import load_gguf
from gradless.journal import _packed, _unpacked
from gradless.methods.nzo.calibration import FEATURES, Calibration, calibrate, contrasts
from gradless.methods.nzo.method import MOST, NodeMeasurement
from gradless.objectives import TokenizedExample, collate
from gradless.spaces import BlockSpace, CodeSpace
from gradless.tensor import Part
from gradless.training.options import RunOptions
from tests.test_kernels import quant as unnamed
from tests.tiny import tiny_gguf

ROWS, BLOCKS, EXAMPLES, QUERIES, WORDS = 32, 8, 6, 4, 3
NAMES = ("one", "two")
PARTS = [("Q4_1", Part.SCALE), ("Q4_1", Part.OFFSET), ("Q4_1", Part.BOTH), ("Q6_K", Part.SCALE), ("uint4/64+zero", Part.SCALE)]
PARTS += [("nf4/32", Part.SCALE), ("Q8_0", Part.SCALE)]


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3"])
@torch.inference_mode()
def test_copies_answer_as_the_token_itself_and_are_seen_by_none(tmp_path, architecture):
    model = load_gguf(tiny_gguf(tmp_path / "tiny.gguf", architecture), dtype=torch.float32).model
    examples = [TokenizedExample((tuple(range(5, 8 + 9 * i)),) * 2, ((20,), (30,)), i % 2) for i in range(4)]
    alone = torch.stack(objectives.scores(model, collate(examples)))
    asked = objectives.asked(model, collate(examples, copies=3))
    assert asked.shape == (4, 4, 2)
    assert torch.allclose(asked, alone.unsqueeze(1).expand_as(asked), atol=1e-4)


def quant(block, rows, blocks, name="w"):
    tensor = unnamed(block, rows, blocks)
    tensor.name = name
    return tensor


class Toy(Batch):
    """Two layers at whose outputs the words' scores are linear, and six examples."""

    def __init__(self, lr=0.1, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.spaces = [BlockSpace(quant("Q4_1", ROWS, BLOCKS, name), Part.BOTH) for name in NAMES]
        self.modules = {space.name: nn.Linear(BLOCKS * 32, ROWS, bias=False) for space in self.spaces}
        self.read_off = [torch.randn(WORDS, ROWS, generator=generator) for _ in NAMES]
        self.x = torch.randn(EXAMPLES, BLOCKS * 32, generator=generator)
        self.show()
        self.slopes = {space.name: space.mean_square_slope() for space in self.spaces}
        self.looks = {name: each.to_json() for name, each in calibrate([self] * 4, self.slopes, QUERIES, seed).items()}
        self.method = NZO(self.spaces, lr=lr, words=WORDS, looks=self.looks, q=QUERIES, seed=seed)

    @property
    def size(self):
        return len(self.x)

    @property
    def labels(self):
        return torch.arange(self.first, self.first + self.size) % WORDS

    @property
    def answer_tokens(self):
        return torch.arange(self.size * (1 + 2 * QUERIES)).view(self.size, -1)

    def layers(self, names):
        return {name: self.modules[name] for name in names}

    def show(self):
        """The weights that the layers multiply are those of the spaces."""
        from gradless import kernels

        for space in self.spaces:
            weight = kernels.dequantize(space.weight, torch.arange(ROWS), torch.float32)[0]
            self.modules[space.name].weight.data = weight

    def answer_scores(self):
        x = self.x.unsqueeze(1).expand(-1, 1 + 2 * QUERIES, -1)
        y = [layer(x) for layer in self.modules.values()]
        return sum(each @ off.T for each, off in zip(y, self.read_off, strict=True)).detach()

    def contrasts(self):
        self.show()
        return self.answer_scores()[:, 0] @ contrasts(WORDS).T

    def sensitivities(self):
        """J eps a / sqrt(N), (N, T, rows)."""
        size = self.method.param_groups[0]["eps"] / math.sqrt(len(NAMES))
        units = [each.shift for each in self.method.calibrations.values()]
        return torch.stack([size * a * (contrasts(WORDS) @ off) for a, off in zip(units, self.read_off, strict=True)])

    def step(self):
        with torch.inference_mode():
            measurement = self.method.measure(self)
        estimate = self.method.estimate([measurement])
        self.method.apply(estimate)
        self.show()
        return measurement, estimate


def test_a_query_s_response_is_the_sensitivity_along_its_signs():
    toy = Toy()
    measurement = toy.method.measure(toy)
    signs = toy.method.signs(0, 0, EXAMPLES * QUERIES)
    assert torch.allclose(measurement.responses, torch.einsum("nkr,ntr->kt", signs, toy.sensitivities()), atol=1e-4)
    assert float(measurement.responses.square().mean().sqrt()) == pytest.approx(0.25, rel=0.3)  # what the units are for
    scores = toy.answer_scores()[:, 0]
    expected = (F.one_hot(toy.labels, WORDS) - scores.softmax(1)) @ contrasts(WORDS).T
    assert torch.allclose(measurement.errors, expected, atol=1e-5)


def test_what_is_learned_tends_to_the_sensitivities():
    toy = Toy(lr=1e-6)
    for _ in range(400):
        toy.step()
    assert torch.allclose(toy.method.sensitivity, toy.sensitivities(), atol=0.02)


def test_a_step_changes_the_answers_as_far_as_asked_and_lowers_the_loss():
    toy = Toy(lr=0.05)
    for _ in range(15):
        toy.step()
    before = toy.contrasts()
    loss = F.cross_entropy(toy.answer_scores()[:, 0], toy.labels)
    toy.step()
    change = (toy.contrasts() - before).square().mean().sqrt()
    assert float(change) == pytest.approx(0.05, rel=0.6)  # a projection on block values keeps a change on average only
    assert F.cross_entropy(toy.answer_scores()[:, 0], toy.labels) < loss


def test_micro_batches_are_one_batch():
    toy = Toy()
    whole, x, halves = toy.method.measure(toy), toy.x, []
    for first in (0, 3):
        toy.x, toy.first = x[first : first + 3], first
        halves.append(toy.method.measure(toy))
    one, two = toy.method.estimate([whole]), toy.method.estimate(halves)
    assert torch.allclose(whole.responses, torch.cat([half.responses for half in halves]), atol=1e-5)
    assert one.losses[0] == pytest.approx(two.losses[0], rel=1e-5)
    assert max(abs(a - b) for a, b in zip(one.d[0], two.d[0], strict=True)) <= 1


def test_recorded_steps_repeat_to_the_bit():
    toy = Toy()
    estimates = [toy.step()[1] for _ in range(5)]
    recorded = [[_unpacked(json.loads(json.dumps(_packed(d)))) for d in estimate.d] for estimate in estimates]
    assert recorded == [list(estimate.d) for estimate in estimates]
    again = Toy()
    for _ in again.method.replay(estimates):
        pass
    for mine, theirs in zip(toy.spaces, again.spaces, strict=True):
        assert torch.equal(mine.values, theirs.values)
    assert torch.equal(toy.method.sensitivity, again.method.sensitivity)


@pytest.mark.parametrize(("block", "part"), PARTS)
@pytest.mark.parametrize("orders", [False, True])
def test_following_is_a_step_along_the_gradient(block, part, orders):
    """x moves by unit * dW/dx . G, whatever the block, and what a forward reads moves with it."""
    from gradless import kernels

    tensor = quant(block, ROWS, BLOCKS)
    generator = torch.Generator().manual_seed(1)
    if orders:
        tensor.row_order = torch.randperm(ROWS, generator=generator)
        tensor.column_order = torch.randperm(tensor.columns, generator=generator)
    space = BlockSpace(tensor, part)
    rows, columns = torch.randn(2, ROWS, generator=generator), torch.randn(2, tensor.columns, generator=generator)
    before, base = weights(tensor, kernels), space.values.clone()
    by = 1e-3 / float((rows.T @ columns).abs().max())
    space.move_along_outer_product(rows, columns, by)
    moved, g = weights(tensor, kernels) - before, rows.T @ columns
    step = (space.values - base) / tensor.unit().clamp(min=1e-30)
    expected = by * float((gradients(space, g) ** 2).sum())
    assert float((moved * g[tensor.file_rows]).sum()) == pytest.approx(expected, rel=1e-2)
    assert float(step.abs().max()) > 0


def weights(tensor, kernels):
    """In the model's order."""
    packed = kernels.dequantize(tensor, tensor.file_rows, torch.float32)[0].double()
    return packed if tensor.column_order is None else torch.empty_like(packed).index_copy_(1, tensor.column_order, packed)


def gradients(space, g):
    """unit * dW/dx . G by definition, in file order."""
    tensor, found = space.weight, torch.zeros(space.weight.rows, space.weight.values_per_row, dtype=torch.float64)
    packed = g if tensor.column_order is None else g[:, tensor.column_order]
    for these, slopes in space.slopes():
        each = (slopes.double() * packed[these].double()).view(len(these), tensor.values_per_row, -1)
        found[these] = each.sum(2)
    return found


def test_features_weigh_directions_by_what_they_tell_apart():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 40, generator=generator) * torch.logspace(0, -3, 40)
    x[:, 0] += 30  # one direction in which all inputs are long
    one = Calibration.of(x, 1.0, 1.0)
    features = one.gains * (x @ one.features.T.float())
    sizes = features.square().mean(0)
    assert float(sizes[0]) < 1.5 * 0.01  # lambda, however long
    again = Calibration.from_json(json.loads(json.dumps(one.to_json())))
    assert again.features.equal(one.features)
    assert again.gains.equal(one.gains)


def test_a_journal_of_1000_steps_is_below_a_megabyte():
    """30 layers of SmolLM2's widths, 16 examples, 8 queries each, two words; inputs and numbers as long-tailed as there."""
    inputs = (torch.randn(256, columns) * (torch.randn(columns) / 2).exp() for columns in [576, 1536] * 15)
    header = len(json.dumps([Calibration.of(x, 10.0, 0.2).to_json() for x in inputs]))
    numbers = (torch.randn(16 * 8 + 30 * FEATURES) * 2.2).round().clamp(-MOST, MOST).int().tolist()
    assert header + 1000 * (len(json.dumps(_packed(numbers))) + 200) < 950_000


def test_answers_that_are_not_finite_are_a_skipped_step():
    toy = Toy()
    before = toy.spaces[0].values.clone()
    broken = NodeMeasurement(((math.nan, 1.0),), 1, torch.zeros(4, 2), torch.zeros(1, 2), torch.zeros(2, 1, FEATURES))
    estimate = toy.method.estimate([broken])
    assert not estimate.finite
    toy.method.apply(estimate)
    assert torch.equal(toy.spaces[0].values, before)
    assert toy.method.t == 1


def test_a_calibration_on_few_rows_shifts_every_layer():
    toy = Toy()
    toy.x = toy.x[:1]
    found = calibrate([toy], dict.fromkeys(NAMES, 1.0), QUERIES, 0)
    assert all(0 < each.shift < math.inf and len(each.features) == 1 for each in found.values())


def test_a_layer_that_answers_do_not_follow_is_refused():
    toy = Toy()
    toy.read_off[1].zero_()
    with pytest.raises(GradlessError, match="the answers stay as they are when the outputs of two are shifted"):
        calibrate([toy], dict.fromkeys(NAMES, 1.0), QUERIES, 0)
    toy.read_off[0].fill_(math.nan)
    with pytest.raises(GradlessError, match="the answers are not finite when the outputs of one are shifted"):
        calibrate([toy], dict.fromkeys(NAMES, 1.0), QUERIES, 0)


def test_what_nzo_cannot_do_is_refused():
    with pytest.raises(GradlessError, match="a codebook's entries do not"):
        RunOptions(method="nzo", part="codebook")
    assert RunOptions(part="codebook").chosen(quantized=True, one_word=True).method == "qzo"
    assert RunOptions(target_modules="q_proj").chosen(quantized=True, one_word=True).method == "qzo"
    assert RunOptions().chosen(quantized=False, one_word=True).method == "mezo"
    with pytest.raises(GradlessError, match="w is CodeSpace"):
        NZO([CodeSpace(quant("Q4_1", 2, 2))], words=2, looks={})
    with pytest.raises(GradlessError, match="v has 4 outputs"):
        NZO([BlockSpace(quant("Q4_1", 2, 2)), BlockSpace(quant("Q4_1", 4, 2, "v"))], words=2, looks={})
