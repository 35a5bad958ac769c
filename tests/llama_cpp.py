"""llama.cpp as the judge of a GGUF file's forward: the log-probabilities that it gives every next token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

WRITTEN = ord("a")
"""The token that is let follow: an answer that ends within a character of several bytes has no probabilities."""


class LlamaCpp:
    """A GGUF file in llama.cpp, through xllamacpp: one thread, keys and values in fp32.

    It starts in .03 s and answers in 5 ms for a tiny file. Quantized weights are multiplied with activations in 8 bits there:
    files whose tensors are F32 agree with an fp32 model to 1e-5, those in F16 to .001, in Q4_1 to about .02.
    """

    def __init__(self, path: Path, *, context: int = 256) -> None:
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.fit_params = False
        parameters.verbosity = 0
        parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        for threads in (parameters.cpuparams, parameters.cpuparams_batch):
            threads.n_threads = 1
        self.server = xllamacpp.Server(parameters)

    def log_probabilities(self, ids: Sequence[int], vocabulary: int) -> Tensor:
        """Of every token after a prompt of token ids: fp32, (vocabulary,)."""
        request = {
            "prompt": list(ids),
            "max_tokens": 1,
            "logprobs": vocabulary,
            "logit_bias": [[WRITTEN, 1000.0]],  # after the probabilities are taken
            "cache_prompt": False,
        }
        answer = self.server.handle_completions(request)
        assert answer["usage"]["prompt_tokens"] == len(ids)
        found = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        values = torch.full((vocabulary,), torch.nan)
        values[[entry["id"] for entry in found]] = torch.tensor([entry["logprob"] for entry in found])
        assert not values.isnan().any()
        return values


def distance(model: Any, path: Path, ids: Sequence[int], ends: Sequence[int] = (), *, context: int = 256) -> float:
    """The largest difference of any token's log-probability between a model and llama.cpp, after each prefix of `ids`.

    Args:
        ends: the prefixes' lengths; by default the whole alone.
    """
    judge = LlamaCpp(path, context=context)
    with torch.inference_mode():
        logits = model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()
    ours = logits.log_softmax(-1)
    return max(
        float((ours[end - 1] - judge.log_probabilities(ids[:end], logits.shape[-1])).abs().max()) for end in ends or (len(ids),)
    )
