"""AWQ's checkpoints in gemm order: 4 bits, one zero point for each group.

Codes lie along the rows: a word holds rows 8 k to 8 k + 7 of one column, in the order in which AWQ's kernel unpacks them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.words import Words, check_settings, formats_named, pack_words, unpack_words
from gradless.readers.json import whole

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The row, 0 to 7, in each nibble of a word, from the lowest nibble on."""

USED = ("w_bit", "q_group_size", "version", "desc_act")


class AWQ(Words):
    """A layer's tensors as AWQ's tools write them."""

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Self:
        """The layout that a `quantization_config` describes.

        Raises:
            GradlessError: its order is not gemm's, its bits are not 4, or it has a setting that gradless does not know.
        """
        check_settings(config, "AWQ", USED)
        orders = formats_named(config, "version", "format", "checkpoint_format") or {"gemm"}
        if str(config.get("backend")) == "llm-awq":
            orders = {"llm-awq"}
        bits = config.get("bits", config.get("w_bit", 4))
        if orders != {"gemm"} or bits != 4:
            raise GradlessError(f"AWQ in {' and '.join(sorted(orders))} order with {bits} bits; supported is gemm with 4.")
        if config.get("desc_act"):
            raise GradlessError("AWQ in act-order (desc_act) is not supported.")
        name = "group_size" if "group_size" in config else "q_group_size"
        group = whole(config, name, "AWQ", least=-1, most=1 << 20, default=128)
        return cls(4, None if group == -1 else group)

    def codes(self, words: Tensor) -> Tensor:
        rows = unpack_words(words.mT.contiguous(), self.bits).view(-1, len(ORDER), len(words))
        return torch.empty_like(rows).index_copy_(1, torch.tensor(ORDER), rows).flatten(0, 1).T

    def zeros(self, words: Tensor) -> Tensor:
        return self.codes(words).to(torch.int16)

    def words(self, codes: Tensor) -> Tensor:
        rows = codes.T.reshape(-1, len(ORDER), len(codes))[:, torch.tensor(ORDER)].flatten(0, 1)
        return pack_words(rows, self.bits).T
