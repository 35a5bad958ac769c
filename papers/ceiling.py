"""How much there is to learn, and where: what bounds NZO, and whatever else stays near the model it begins with.

    python papers/ceiling.py                           # SmolLM2, SST-2, three seeds
    python papers/ceiling.py --task RTE --train-rows 2490 --seeds 1

To first order, tuning adds to the words' scores a linear function of what the tuned weights see. Here such a function is
fitted outright: logistic regression from the untuned scores on, with the ridge penalty that is best on the dev rows. So no
steps and no noise of queries are left in it, and the dev rows chose the penalty: it flatters. What weights may see:

    the answer's token     the inputs of o_proj and down_proj at that token: all that NZO tunes by
    the prompt, pooled     what each attention head gathers there from its layer's inputs: what v_proj could be tuned by
    their gradients        how the answer follows every linear layer's weights, by back-propagation through all tokens, of which
                           random signs sketch 32 x 32 numbers a layer

Features are damped as NZO's are, in so many of their principal directions; every layer and head counts the same. A line a
choice: accuracy and loss on the dev rows, the mean over seeds, which choose the rows of training; and each seed's accuracy.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent))

from worklist import FIRST_ROWS, MODELS, TASKS, WorkList, shuffled

from gradless import objectives
from gradless.formats.load import load
from gradless.methods.nzo.calibration import contrasts, damped
from gradless.tasks.prepare import prepare
from gradless.training.options import RunOptions

Sight = dict[str, dict[str, Tensor]]
"""What is seen of n examples: by kind and by name of the layer, (n, columns); under "answer" their scores and labels."""
Choice = tuple[str, str, int | None]
"""What is seen, of which layers, in how many directions."""
TOKEN, POOLED, GRADIENTS = "the answer's token", "the prompt, pooled", "their gradients"
KINDS: dict[str, tuple[int | None, ...]] = {TOKEN: (24, 48, None), POOLED: (24, 48, None), GRADIENTS: (None,)}
RIDGES = (0.03, 0.1, 0.3, 1.0)
"""Of the mean square of an example's features."""
SKETCH = 32
"""Of the rows and of the columns of a layer's gradient."""


def signs(rows: int, generator: torch.Generator) -> Tensor:
    """A sketch of columns of so many rows that keeps inner products, about: fp32 (rows, SKETCH)."""
    return (torch.randint(0, 2, (rows, SKETCH), generator=generator).float() * 2 - 1) / math.sqrt(SKETCH)


class Sensors:
    """What a dense model's linear layers take in and how the answer follows what they put out."""

    def __init__(self, model: Any) -> None:
        self.model, generator = model, torch.Generator().manual_seed(0)
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.attention: dict[str, Tensor] = {}
        self.sketches: dict[str, tuple[Tensor, Tensor]] = {}
        model.requires_grad_(False).set_attn_implementation("eager")
        for name, module in model.model.layers.named_modules():
            if isinstance(module, torch.nn.Linear):
                self.sketches[name] = signs(module.out_features, generator), signs(module.in_features, generator)
                module.register_forward_hook(self._linear(name))
            elif name.endswith("self_attn"):
                module.register_forward_hook(self._attention(name))

    def _linear(self, name: str) -> Any:
        def hook(_: Any, args: tuple[Tensor, ...], y: Tensor) -> None:
            y.retain_grad()
            self.inputs[name], self.outputs[name] = args[0].detach(), y

        return hook

    def _attention(self, name: str) -> Any:
        def hook(_: Any, _args: Any, found: tuple[Tensor, Tensor]) -> None:
            self.attention[name] = found[1].detach()

        return hook

    def seen(self, examples: list[objectives.TokenizedExample], size: int = 16) -> Sight:
        """Of examples. Those of like length go together, the shorter padded behind, where no token of theirs looks."""
        found: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
        order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
        for start in range(0, len(order), size):
            batch = [examples[i] for i in order[start : start + size]]
            ends = torch.tensor([len(each.prompts[0]) - 1 for each in batch])
            ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each.prompts[0]) for each in batch], batch_first=True)
            at = torch.arange(len(batch)), ends
            inside = torch.arange(ids.shape[1]) <= ends.unsqueeze(1)
            begun = self.model.model.embed_tokens(ids).requires_grad_(True)
            hidden = self.model.model(inputs_embeds=begun, use_cache=False).last_hidden_state[at]
            scores = hidden @ self.model.lm_head.weight[list(batch[0].words or ())].T
            (scores @ contrasts(scores.shape[1]).T).sum().backward()
            found["answer"]["scores"].append(scores.detach())
            found["answer"]["labels"].append(torch.tensor([each.label for each in batch]))
            for name, (left, right) in self.sketches.items():
                x, follows = self.inputs[name], (self.outputs[name].grad * inside.unsqueeze(2)) @ left
                found[GRADIENTS][name].append(torch.einsum("bti,btj->bij", follows, x @ right).flatten(1).half())
                if name.endswith(("o_proj", "down_proj")):
                    found[TOKEN][name].append(x[at])
                elif name.endswith("v_proj"):
                    looks = self.attention[name.rpartition(".")[0]][at[0], :, ends]
                    for head, pooled in enumerate((looks @ x).unbind(1)):
                        found[POOLED][f"{name}.{head}"].append(pooled)
        back = torch.tensor(order).argsort()
        return {kind: {name: torch.cat(each)[back] for name, each in of.items()} for kind, of in found.items()}


def products(train: Sight, dev: Sight, kind: str, counts: Sequence[int | None], half: int) -> dict[Choice, list[Tensor]]:
    """Inner products of features: of training rows, and of dev rows with these; the mean square of a training row's is one."""
    sums: dict[Choice, list[Tensor]] = {}
    for name, seen in train[kind].items():
        directions = damped(seen).float().T
        here, there = seen.float() @ directions, dev[kind][name].float() @ directions
        for count in counts:
            own = here[:, :count]
            added = [own @ own.T, there[:, :count] @ own.T]
            for part in ("last half", "all") if int(name.partition(".")[0]) >= half else ("all",):
                before = sums.get((kind, part, count), (0.0, 0.0))
                sums[kind, part, count] = [x + y for x, y in zip(before, added, strict=True)]
    return {choice: [each / both[0].diagonal().mean() for each in both] for choice, both in sums.items()}


def fitted(products: Tensor, scores: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """By what each example's features, whose inner products are (n, n), enter the words' scores: (n, words)."""
    shares = torch.zeros_like(scores, requires_grad=True)
    optimizer = torch.optim.LBFGS([shares], max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        moved = products @ shares
        loss = F.cross_entropy(scores + moved, labels) + ridge / 2 * (shares * moved).sum() / len(labels)
        loss.backward()
        return loss

    optimizer.step(closure)
    return shares.detach()


def figures(answer: dict[str, Tensor], moved: Tensor) -> tuple[float, float, float]:
    """Accuracy, loss, and the accuracy on the first of the shuffled rows."""
    scores, labels = answer["scores"] + moved, answer["labels"]
    right = (scores.argmax(1) == labels).float()
    first = right[shuffled(len(labels))[:FIRST_ROWS]]
    return float(right.mean()), float(F.cross_entropy(scores, labels)), float(first.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="SmolLM2")
    parser.add_argument("--task", choices=[task for task in TASKS if task not in ("COPA", "SQuAD")], default="SST-2")
    parser.add_argument("--train-rows", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    loaded = load(WorkList(Path(__file__).resolve(), {}, {}).dense_folder(arguments.model))
    rows, dev_rows, how = TASKS[arguments.task]
    torch.set_float32_matmul_precision("medium")
    sensors, options = Sensors(loaded.model.float()), RunOptions(**how)
    dev = sensors.seen(prepare(str(dev_rows), loaded, options, limit=options.eval_rows).examples)
    found: dict[Choice, dict[float, list[tuple[float, float, float]]]] = defaultdict(lambda: defaultdict(list))
    for seed in range(arguments.seeds):
        ours = RunOptions(**how, seed=seed)
        train = sensors.seen(prepare(str(rows), loaded, ours, limit=arguments.train_rows, shuffled=True).examples)
        for kind, counts in KINDS.items():
            print(f"seed {seed}: {kind}", file=sys.stderr, flush=True)
            of_kind = products(train, dev, kind, counts, len(loaded.model.model.layers) // 2)
            for choice, (within, across) in of_kind.items():
                for ridge in RIDGES:
                    shares = fitted(within, train["answer"]["scores"], train["answer"]["labels"], ridge)
                    found[choice][ridge].append(figures(dev["answer"], across @ shares))
    majority = float(dev["answer"]["labels"].bincount().max() / len(dev["answer"]["labels"]))
    print(f"{arguments.task}, {arguments.train_rows} rows, {len(dev['answer']['labels'])} dev rows; majority {majority:.4f}\n")
    print(f"| seen | layers | directions | accuracy | loss | {FIRST_ROWS} rows | ridge | of each seed |\n|{'---|' * 8}")
    for (kind, part, count), of_ridges in found.items():
        ridge, of_seeds = min(of_ridges.items(), key=lambda of: statistics.mean(loss for _, loss, _ in of[1]))
        accuracy, loss, first = (f"{statistics.mean(each):.4f}" for each in zip(*of_seeds, strict=True))
        each = ", ".join(f"{accuracy:.4f}" for accuracy, _, _ in of_seeds)
        print(f"| {kind} | {part} | {count or 'every'} | {accuracy} | {loss} | {first} | {ridge:g} | {each} |")


if __name__ == "__main__":
    main()
