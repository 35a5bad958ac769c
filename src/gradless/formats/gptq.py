"""GPTQ's checkpoints (AutoGPTQ, GPTQModel, AutoRound): 2, 3, 4 and 8 bits, symmetric or not, in act-order or not.

Codes lie along the columns: word k of a row holds columns 32 k / bits and on. The first version of the format holds zero points
less one: the subtraction is done on whole words, but for 3 bits, whose codes cross from word to word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.words import Words, pack_words, unpack_words

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")


@dataclass(frozen=True)
class GPTQ(Words):
    """A layer's tensors as GPTQ's tools write them.

    Attributes:
        less_one: whether zero points are held less one.
    """

    less_one: bool = True

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        """From `quantization_config`.

        Raises:
            GradlessError: it has other bits or another format than are supported, or bits that differ between layers.
        """
        bits, group, form = config.get("bits"), config.get("group_size", 128), config.get("checkpoint_format", "gptq")
        if form not in FORMATS:
            raise GradlessError(f"GPTQ in the format {form}; supported are {', '.join(FORMATS)}.")
        if any(not pattern.startswith("-:") for pattern in config.get("dynamic") or {}):
            raise GradlessError("GPTQ with settings that differ between layers (`dynamic`) is not supported.")
        if bits not in BITS:
            raise GradlessError(f"GPTQ of {bits} bits; supported are {', '.join(map(str, BITS))}.")
        return cls(bits, None if group == -1 else group, form == "gptq")

    def codes(self, words: Tensor) -> Tensor:
        return unpack_words(words, self.bits)

    def zeros(self, words: Tensor) -> Tensor:
        if self.less_one and self.bits != 3:
            words = words + pack_words(torch.ones(32 // self.bits, 1, dtype=torch.uint8), self.bits)
        zeros = unpack_words(words.T.contiguous(), self.bits).to(torch.int16)
        if self.less_one and self.bits == 3:
            zeros = (zeros + 1) % 8
        return zeros.T

    def words(self, codes: Tensor) -> Tensor:
        return pack_words(codes, self.bits)
