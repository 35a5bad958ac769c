"""Steps of 7-billion-parameter models on a GPU: time, time against two forwards of the same model, and peak memory.

Each method at its defaults. Weights are random, int4 in groups of 64; `quzo, int8` multiplies their codes with activations
of 8 bits.

    python benchmarks/gpu.py [--batch 1 16] [--length 256] [--json]
    python benchmarks/gpu.py --device cpu --models tiny      # that it runs

QZO's paper has 5.0, 6.3 and 4.8 GB at batch 1 for the three models, in groups of 128.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from random_model import linear_weights, random_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from gradless import QZO, ZOQO, MeZO, QuZO
from gradless.layers import reading_at, set_activations
from gradless.memory import resident_bytes
from gradless.methods.codes import DEFAULT_SPAN, DEFAULT_STRIDE, CodeRecipe
from gradless.methods.qzo.recipe import CENTRED
from gradless.methods.recipe import Defaults
from gradless.methods.registry import recipe
from gradless.spaces import BlockSpace, CodeSpace, dense_spaces
from gradless.tensor import Part
from gradless.training.batches import PAIR_TOKENS

WIDE = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MODELS = {
    "Llama-2-7B": LlamaConfig(vocab_size=32_000, intermediate_size=11_008, **WIDE),
    "Llama-3.1-8B": LlamaConfig(vocab_size=128_256, intermediate_size=14_336, num_key_value_heads=8, **WIDE),
    "OPT-6.7B": OPTConfig(vocab_size=50_272, ffn_dim=16_384, word_embed_proj_dim=4096, **WIDE),
    "tiny": LlamaConfig(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2),
}
METHODS = ("qzo", "quzo", "quzo, int8", "zoqo", "mezo")
STEPS = 5


def few_levels(method: str) -> Defaults:
    """A method's step and perturbation on grids of few levels."""
    chosen = recipe(method)
    assert isinstance(chosen, CodeRecipe)
    return chosen.few_levels


def optimizer_of(method: str, model: Any) -> Any:
    """A method at its defaults."""
    if method == "mezo":
        return MeZO(dense_spaces(model), lr=1e-9)
    weights = linear_weights(model)
    method = method.partition(",")[0]
    if method == "qzo":
        lr, eps, _ = CENTRED
        return QZO([BlockSpace(weight, Part.SCALE) for weight in weights], lr=lr, eps=eps)
    lr, eps, _ = few_levels(method)
    spaces = [CodeSpace(weight, stride=DEFAULT_STRIDE, residual=True) for weight in weights]
    return {"quzo": QuZO, "zoqo": ZOQO}[method](spaces, lr=lr, eps=eps, span=DEFAULT_SPAN)


def measured(method: str, config: Any, batch: int, length: int, device: str) -> dict[str, float]:
    """Seconds a step and a forward, the best of some, tokens a second, and the peak of memory in GB."""
    if method == "mezo":
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    else:
        model = random_model(config, "int4/64", device)
        set_activations(model, "int8" if method.endswith("int8") else "bf16")
    optimizer, head = optimizer_of(method, model), model.get_output_embeddings()
    ids = torch.randint(config.vocab_size, (batch, length), device=device)

    def losses(copies: int) -> torch.Tensor:
        """Of a batch and its copies, on the last token of each sequence."""
        every = ids.repeat(copies, 1)
        with reading_at(head, torch.arange(len(every)), torch.full((len(every),), length - 1)):
            logits = model(every, use_cache=False).logits[0].float()
        return nn.functional.cross_entropy(logits, every[:, 0], reduction="none").view(copies, -1).mean(1)

    pairs = config.model_type == "llama" and ids.numel() <= PAIR_TOKENS
    seconds = [
        _timed(lambda: optimizer.step(lambda: losses(1), (lambda: losses(2)) if pairs else None), device) for _ in range(STEPS)
    ]
    forward = min(_timed(lambda: losses(1), device) for _ in range(STEPS))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes()
    found = {"seconds": min(seconds), "tokens_a_second": batch * length / min(seconds), "peak_gb": peak / 1e9}
    return {**found, "forward_seconds": forward}


def _timed(run: Callable[[], object], device: str) -> float:
    began = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=[name for name in MODELS if name != "tiny"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16], help="sequences a batch (default: 1 and 16)")
    parser.add_argument("--length", type=int, default=256, help="tokens a sequence (default: 256)")
    parser.add_argument("--device", default="cuda", help="where to run (default: cuda)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; `--device cpu --models tiny` shows that this runs.")
    machine = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    rows = []
    if not arguments.json:
        print(f"{machine}, sequences of {arguments.length} tokens\n")
        print("| model | method | batch | ms a step | a step / two forwards | tokens/s | peak GB |\n" + "|---" * 7 + "|")
    for name, batch, method in product(arguments.models, arguments.batch, METHODS):
        gc.collect()  # hooks on a model's layers hold it
        if arguments.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row = {"model": name, "method": method, "batch": batch}
        row |= measured(method, MODELS[name], batch, arguments.length, arguments.device)
        rows.append(row)
        if not arguments.json:
            ratio = row["seconds"] / (2 * row["forward_seconds"])
            figures = f"{1000 * row['seconds']:.0f} | {ratio:.2f} | {row['tokens_a_second']:.0f} | {row['peak_gb']:.2f}"
            print(f"| {name} | {method} | {batch} | {figures} |", flush=True)
    if arguments.json:
        print(json.dumps({"machine": machine, "length": arguments.length, "rows": rows}))


if __name__ == "__main__":
    main()
