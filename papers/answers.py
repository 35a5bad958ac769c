"""Asking where the answer is given: many directions an example, each for the price of one token. A sketch on a dense model.

    python papers/answers.py                                   # from the base: the bias first, then what lies behind it
    python papers/answers.py --damped 0                        # inputs as they are
    python papers/answers.py --layers 0 29 --parts _proj       # all layers, not only the last third's down_proj
    python papers/answers.py --first-order                     # AdamW on the same weights, through the answer's token alone

A prompt is read once a step, unperturbed. Its last token, where the answer is read off, is then passed again 2 q times over the
keys and values of the rest, each time with other shifts of the weights' blocks (of 32 columns j in block g, W_rj + s_r v_rg):

    v = eps xi (x) zeta,   xi ~ {-1, 1}^rows,   zeta = P zeta',  zeta' ~ {-1, 1}^blocks
    d = [L(+v) - L(-v)] / (2 eps),   v_rg <- v_rg - lr / (B q) sum d xi_r zeta_g

P damps the `--damped` principal directions (uncentred) of the layer's inputs at that token, pooled over blocks, to a share of
`--left`: along them all examples' gradients are large and cancel between labels, so they mostly add noise once the bias is
learned. A step has a root mean square of `--ratio` eps, falling linearly. The same partial gradient is what `--first-order`
follows.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

sys.path.insert(0, str(Path(__file__).parent))

from agreement import GROUP
from worklist import BATCH, DATA, TRAIN_ROWS, WEAK, model_path

from gradless import noise, objectives, run
from gradless.formats.quantized import dequantized
from gradless.objectives import TokenizedExample
from gradless.training.options import RunOptions

WATCHED = 64
"""Examples from whose inputs the principal directions are taken."""
REMEMBERED = 50
"""Steps whose estimates decide how long the next one is."""
Hook = Callable[[str, Tensor, Tensor], Tensor | None]


@dataclass
class Answers:
    """A model whose prompts are read once and whose answers are asked for many times."""

    model: nn.Module
    words: Tensor
    layers: dict[str, nn.Linear]

    def __post_init__(self) -> None:
        self.hook: Hook | None = None
        for name, layer in self.layers.items():
            layer.register_forward_hook(lambda _, x, y, name=name: None if self.hook is None else self.hook(name, x[0], y))

    def read(self, examples: Sequence[TokenizedExample]) -> dict[str, Any]:
        """A batch, padded at its left, whose prompts are read up to the last token."""
        prompts = [example.prompts[0] for example in examples]
        length = max(map(len, prompts))
        ids = torch.tensor([(0,) * (length - len(ids)) + ids for ids in prompts])
        mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
        places, cache = (mask.cumsum(1) - 1).clamp(min=0), DynamicCache(config=self.model.config)
        with torch.no_grad():
            self.model.model(ids[:, :-1], mask[:, :-1], places[:, :-1], cache)
        labels = torch.tensor([example.label for example in examples])
        return {"ids": ids[:, -1:], "mask": mask, "places": places[:, -1:], "labels": labels, "cache": cache}

    def ask(self, batch: dict[str, Any], times: int = 1) -> Tensor:
        """The answers' losses, (examples, times)."""
        if times > 1:
            batch["cache"].batch_repeat_interleave(times)
        ids, mask, places, labels = (batch[name].repeat_interleave(times, 0) for name in ("ids", "mask", "places", "labels"))
        hidden = self.model.model(ids, mask, places, batch["cache"]).last_hidden_state[:, -1]
        scores = hidden @ self.model.lm_head.weight[self.words].T
        return F.cross_entropy(scores, labels, reduction="none").view(-1, times)

    def projections(self, examples: Sequence[TokenizedExample], damped: int, left: float) -> dict[str, Tensor]:
        """P of each layer, (blocks, blocks)."""
        moments: dict[str, Tensor] = {}

        def watch(name: str, x: Tensor, _: Tensor) -> None:
            pooled = _pooled(x).flatten(0, -2)
            moments[name] = moments.get(name, 0) + pooled.T @ pooled

        for start in range(0, WATCHED, BATCH):
            batch = self.read(examples[start : start + BATCH])
            self.hook = watch
            self.ask(batch)
            self.hook = None
        found = {}
        for name, moment in moments.items():
            directions = torch.linalg.eigh(moment)[1][:, len(moment) - damped :]
            found[name] = torch.eye(len(moment)) - (1 - left) * directions @ directions.T
        return found


def _pooled(x: Tensor) -> Tensor:
    """Sums over blocks: (.., columns) -> (.., blocks)."""
    return x.unflatten(-1, (-1, GROUP)).sum(-1)


def step_sizes(weight: Tensor) -> Tensor:
    """Of each row, the mean step of a 4-bit grid over its blocks: the unit of its shifts, (rows,)."""
    blocks = weight.detach().unflatten(1, (-1, GROUP))
    return ((blocks.amax(2) - blocks.amin(2)) / 15).mean(1)


def zeroth_order(
    answers: Answers, batch: dict[str, Any], units: dict[str, Tensor], p: dict[str, Tensor], q: int, eps: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """One step's d, (examples, q), and of each layer the mean of d s_r xi_r zeta_g, (rows, blocks)."""
    n, drawn = len(batch["ids"]), {}
    for name, layer in answers.layers.items():
        xi, zeta = (torch.randint(2, (n, q, size)) * 2.0 - 1 for size in (layer.out_features, layer.in_features // GROUP))
        drawn[name] = (xi * units[name], zeta @ p[name] if p else zeta)
    signs = torch.tensor([eps, -eps]).view(1, 2, 1, 1)

    def shift(name: str, x: Tensor, y: Tensor) -> Tensor:
        xi, zeta = drawn[name]
        along = (_pooled(x).view(n, 2, q, -1) * zeta.unsqueeze(1)).sum(-1, keepdim=True)
        return (y.view(n, 2, q, -1) + signs * along * xi.unsqueeze(1)).view_as(y)

    answers.hook = shift
    losses = answers.ask(batch, 2 * q).view(n, 2, q)
    answers.hook = None
    d = (losses[:, 0] - losses[:, 1]) / (2 * eps)
    return d, {name: torch.einsum("bq,bqr,bqg->rg", d, *of_layer) / d.numel() for name, of_layer in drawn.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a GGUF file (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--layers", nargs=2, type=int, default=(20, 29), metavar=("FIRST", "LAST"))
    parser.add_argument("--parts", default="down_proj", help="a pattern of the layers' names")
    parser.add_argument("--damped", type=int, default=4, help="principal directions of the inputs that are damped")
    parser.add_argument("--left", type=float, default=0.25, help="what is left of them")
    parser.add_argument("--plain", type=int, default=10, help="first steps, in which none is damped")
    parser.add_argument("--q", type=int, default=16)
    parser.add_argument("--eps", type=float, default=0.3)
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument("--lr", type=float, default=2e-5, help="of --first-order")
    parser.add_argument("--steps", type=int, default=75)
    parser.add_argument("--every", type=int, default=15, help="steps between measurements")
    parser.add_argument("--eval-rows", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first-order", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    loaded, how = run.load_model(arguments.model or model_path()), RunOptions(**WEAK, seed=arguments.seed)
    train = run.prepare(str(DATA / "train.tsv"), loaded, how, limit=TRAIN_ROWS, shuffled=True).examples
    dev = run.prepare(str(DATA / "dev.tsv"), loaded, how, limit=arguments.eval_rows).examples
    model, (first, last) = dequantized(loaded).float().eval(), arguments.layers
    chosen = {}
    for name, module in model.named_modules():
        place = re.search(r"layers\.(\d+)\.", name)
        if place and first <= int(place[1]) <= last and isinstance(module, nn.Linear) and re.search(arguments.parts, name):
            chosen[name] = module
    if not chosen:
        parser.error("no linear layer of this model is in --layers and matches --parts")
    answers, units = Answers(model, torch.tensor(train[0].words), chosen), {n: step_sizes(m.weight) for n, m in chosen.items()}
    print(objectives.evaluate(model, dev, loaded.tokenizer), flush=True)
    with torch.no_grad():
        projections = answers.projections(train, arguments.damped, arguments.left) if arguments.damped else {}
    weights = [layer.weight.requires_grad_(arguments.first_order) for layer in chosen.values()]
    optimizer = torch.optim.AdamW(weights, lr=arguments.lr, weight_decay=0.0)
    squares: list[float] = []
    order, began = noise.permutation(arguments.seed, 0, len(train)).tolist(), time.perf_counter()
    for step in range(arguments.steps):
        start = step * BATCH % (len(order) - BATCH)
        batch = answers.read([train[i] for i in order[start : start + BATCH]])
        if arguments.first_order:
            optimizer.zero_grad()
            answers.ask(batch).mean().backward()
            optimizer.step()
        else:
            with torch.no_grad():
                p = projections if step >= arguments.plain else {}
                d, estimates = zeroth_order(answers, batch, units, p, arguments.q, arguments.eps)
                squares.append(float(d.square().mean()) / d.numel())
                length = arguments.ratio * arguments.eps * (1 - step / arguments.steps)
                lr = length / statistics.mean(squares[-REMEMBERED:]) ** 0.5
                for name, layer in chosen.items():
                    layer.weight.unflatten(1, (-1, GROUP)).sub_(lr * estimates[name].unsqueeze(-1))
        if (step + 1) % arguments.every == 0:
            figures = objectives.evaluate(model, dev, loaded.tokenizer)
            print({"step": step + 1, "seconds": round(time.perf_counter() - began), **figures}, flush=True)


if __name__ == "__main__":
    main()
