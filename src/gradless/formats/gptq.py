"""GPTQ's checkpoints (AutoGPTQ, GPTQModel, AutoRound): 2, 3, 4 and 8 bits, symmetric or not, in act-order or not.

Codes lie along the columns: word k of a row holds columns 32 k / bits and on. The first version of the format holds zero points
less one, the subtraction done on whole words.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.words import Words, pack_words, unpack_words

BITS = (2, 3, 4, 8)


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
            GradlessError: it has other bits than are supported.
        """
        bits, group = config.get("bits"), config.get("group_size", 128)
        if bits not in BITS:
            raise GradlessError(f"GPTQ of {bits} bits; supported are {', '.join(map(str, BITS))}.")
        return cls(bits, None if group == -1 else group, config.get("checkpoint_format", "gptq") != "gptq_v2")

    def codes(self, words: Tensor) -> Tensor:
        return unpack_words(words, self.bits)

    def zeros(self, words: Tensor) -> Tensor:
        packed = words.T.contiguous()
        if self.less_one:
            ones = pack_words(torch.ones(32, 1, dtype=torch.uint8), self.bits)
            packed = packed + ones.repeat(-(-len(packed) // len(ones)), 1)[: len(packed)]
        return unpack_words(packed, self.bits).to(torch.int16).T

    def words(self, codes: Tensor) -> Tensor:
        return pack_words(codes, self.bits)
