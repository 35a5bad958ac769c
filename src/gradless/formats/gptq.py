"""GPTQ's checkpoints (AutoGPTQ, GPTQModel, AutoRound): 2, 3, 4 and 8 bits, symmetric or not, in act-order or not.

Codes lie along the columns: word k of a row holds columns 32 k / bits and on. The first version of the format holds zero points
minus one. The subtraction is done on whole words, except for 3 bits, whose codes cross from word to word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.words import Words, check_settings, formats_named, pack_words, unpack_words
from gradless.readers.json import whole
from gradless.tensor import BlockWeight

BITS = (2, 3, 4, 8)
FORMATS = ("gptq", "gptq_v2")
USED = ("desc_act", "is_marlin_format")


@dataclass(frozen=True)
class GPTQ(Words):
    """A layer's tensors as GPTQ's tools write them.

    Attributes:
        less_one: whether the file holds zero points minus one.
        symmetric: whether every zero point is the middle of the codes; None if the settings do not say.
        act_order: whether a layer must say to which group each column belongs.
    """

    less_one: bool = True
    symmetric: bool | None = None
    act_order: bool = False

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """From `quantization_config`.

        Raises:
            GradlessError: it has other bits or another format than are supported, or bits that differ between layers, or a
                setting that gradless does not know.
        """
        check_settings(config, "GPTQ", USED)
        bits, group = config.get("bits"), whole(config, "group_size", "GPTQ", least=-1, most=1 << 20, default=128)
        forms = formats_named(config, "checkpoint_format", "format") or {"gptq"}
        if config.get("is_marlin_format"):
            forms = {"marlin"}
        if len(forms) > 1 or not forms <= set(FORMATS):
            raise GradlessError(f"GPTQ in the format {' and '.join(sorted(forms))}; supported are {', '.join(FORMATS)}.")
        if not isinstance(bits, int) or bits not in BITS:
            raise GradlessError(f"GPTQ of {bits} bits; supported are {', '.join(map(str, BITS))}.")
        symmetric = config.get("sym")
        return cls(
            bits,
            None if group == -1 else group,
            less_one=forms == {"gptq"},
            symmetric=None if symmetric is None else bool(symmetric),
            act_order=bool(config.get("desc_act")),
        )

    def read(self, name: str, parts: Mapping[str, Tensor]) -> BlockWeight:
        if self.act_order and "g_idx" not in parts:
            raise GradlessError(f"{name} is in act-order (desc_act), but has no g_idx, which would say what that order is.")
        return super().read(name, parts)

    def codes(self, words: Tensor) -> Tensor:
        return unpack_words(words, self.bits)

    def zeros(self, words: Tensor) -> Tensor:
        """Zero points; see `Words.zeros`. All zero points of a symmetric file are the middle of the codes, and the file holds
        either that or one less, in every version of the format.

        Raises:
            GradlessError: a symmetric file has other zero points.
        """
        middle = 1 << (self.bits - 1)
        stored = unpack_words(words.T.contiguous(), self.bits).to(torch.int16).T
        if self.symmetric is not False and any((stored == value).all() for value in (middle, middle - 1)):
            return torch.full_like(stored, middle)
        if self.symmetric:
            raise GradlessError(
                f"symmetric GPTQ (sym) with zero points of {int(stored.min())} to {int(stored.max())}, "
                f"where all should be {middle}, or {middle - 1}; its settings and its tensors contradict each other."
            )
        if not self.less_one:
            return stored
        if self.bits == 3:
            return (stored + 1) % 8
        words = words + pack_words(torch.ones(32 // self.bits, 1, dtype=torch.uint8), self.bits)
        return unpack_words(words.T.contiguous(), self.bits).to(torch.int16).T

    def words(self, codes: Tensor) -> Tensor:
        return pack_words(codes, self.bits)
