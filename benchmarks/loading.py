"""Seconds from the start of a process to its first batch, by phase: python benchmarks/loading.py MODEL.gguf

Each figure is processor time of the process (user and system); the last line also says the time on the clock. The first start
after an installation tries the kernels, which takes about two seconds more: run it twice.
"""

from __future__ import annotations

import gc
import sys
import time

gc.set_threshold(100_000)  # as the command line does it
began, at = time.perf_counter(), time.process_time()


def done(phase: str) -> None:
    global at
    print(f"{phase:32s} {time.process_time() - at:5.2f}")
    at = time.process_time()


def main(model: str) -> None:
    import torch

    done("torch")
    import transformers

    transformers.logging.set_verbosity_error()
    done("transformers")
    from gradless import kernels, run

    done("gradless")
    kernels.name()
    done("kernels, tried or remembered")
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    done("transformers' models")
    from gradless.readers.gguf import read_header

    metadata = read_header(run.Path(model)).metadata
    done("header")
    from gradless.formats.gguf_tokenizer import build_tokenizer

    tokenizer = build_tokenizer(metadata, model)
    done("tokenizer")
    from gradless.formats.gguf_model import load_gguf

    loaded = load_gguf(model, tokenizer=tokenizer)
    done("model")
    with torch.inference_mode():
        loaded.model(input_ids=torch.tensor([tokenizer("a first batch").input_ids]), use_cache=False)
    done("first forward")
    print(f"{'all':32s} {time.process_time():5.2f}, {time.perf_counter() - began:.2f} on the clock")


if __name__ == "__main__":
    main(sys.argv[1])
