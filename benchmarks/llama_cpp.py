"""llama.cpp's evaluation of a prompt (xllamacpp, a prebuilt wheel) beside our forward of the same file and tokens.

    python benchmarks/llama_cpp.py [MODEL.gguf] [--tokens 512] [--json]

Two processes, one after the other, since each has its own threads. llama.cpp's time is the one that it reports.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from step import default_model
from timing import medians

SAMPLES, THREADS = 7, len(os.sched_getaffinity(0))


def theirs(model: Path, tokens: int) -> float:
    """Tokens a second of a prompt, the median of some."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.n_ctx, parameters.n_parallel, parameters.n_batch, parameters.n_ubatch = tokens + 64, 1, tokens, tokens
    parameters.cpuparams.n_threads = THREADS
    parameters.cpuparams_batch.n_threads = THREADS
    parameters.verbosity = 0
    server = xllamacpp.Server(parameters)
    speeds = []
    for sample in range(SAMPLES):
        prompt = [100 + (17 * i + 31 * sample) % 40_000 for i in range(tokens)]
        request = {"prompt": prompt, "max_tokens": 1, "temperature": 0.0, "cache_prompt": False}
        speeds.append(server.handle_completions(request)["timings"]["prompt_per_second"])
    return statistics.median(speeds)


def ours(model: Path, tokens: int, activations: str) -> float:
    """Tokens a second of a plain forward over one sequence, with the logits of its last token."""
    import torch

    torch.set_num_threads(THREADS)
    from gradless.formats.gguf_model import load_gguf
    from gradless.layers import reading_at, set_activations

    loaded = load_gguf(model).model
    set_activations(loaded, activations)
    ids = torch.tensor([[100 + 17 * i % 40_000 for i in range(tokens)]])
    last = torch.tensor([0]), torch.tensor([tokens - 1])

    @torch.inference_mode()
    def forward():
        with reading_at(loaded.get_output_embeddings(), *last):
            loaded(ids, use_cache=False)

    return tokens / medians({"forward": forward}, samples=SAMPLES)["forward"]["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--tokens", type=int, default=512, help="tokens of the prompt (default: 512)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=("llama.cpp", "bf16", "int8"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        run = theirs if arguments.only == "llama.cpp" else lambda *given: ours(*given, arguments.only)
        print(run(arguments.model, arguments.tokens))
        return
    command = [sys.executable, __file__, str(arguments.model), "--tokens", str(arguments.tokens), "--only"]
    speed = {
        name: float(subprocess.run([*command, name], check=True, capture_output=True, text=True).stdout.split()[-1])
        for name in ("llama.cpp", "bf16", "int8")
    }
    ratios = {f"our {name} forward / llama.cpp, tokens a second": speed[name] / speed["llama.cpp"] for name in ("bf16", "int8")}
    if arguments.json:
        print(json.dumps({"ratios": ratios, "tokens_a_second": speed}))
        return
    for name, value in speed.items():
        print(f"{name:12} {value:8.0f} tokens/s")
    for name, value in ratios.items():
        print(f"{name:48} {value:.3f}")


if __name__ == "__main__":
    main()
