"""Integer codes in 32-bit words, with a scale and a zero point for each group of a row: w = scale * (code - zero).

This is how GPTQ's and AWQ's checkpoints hold a layer, as columns by rows: `qweight` (the codes), `qzeros` and `scales` (groups
by rows), and in GPTQ's also `g_idx` (the group of each column). They differ in the order of codes in words.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gradless.blocks import assemble, dividing_size, grid_block
from gradless.errors import GradlessError
from gradless.formats.account import understood
from gradless.formats.checkpoint import Layout, finite, rounded
from gradless.grids import integers
from gradless.readers.json import mapping
from gradless.tensor import BlockWeight, TunedCodes

USED = ("bits", "group_size", "sym", "format", "checkpoint_format", "dynamic", "pack_dtype", "method", "data_type", "act_bits")
NEUTRAL = (
    # How GPTQModel, AutoGPTQ, optimum and AutoRound found the codes: the tensors hold the result.
    *(
        "damp_percent",
        "damp_auto_increment",
        "act_group_aware",
        "hyb_act",
        "true_sequential",
        "static_groups",
        "mse",
        "dataset",
    ),
    *(
        "batch_size",
        "model_seqlen",
        "max_input_length",
        "pad_token_id",
        "cache_block_outputs",
        "meta",
        "tokenizer",
        "v2",
        "v2_alpha",
    ),
    *(
        "block_name_to_quantize",
        "to_quant_block_names",
        "module_name_preceding_first_block",
        "quant_block_list",
        "supported_types",
    ),
    *(
        "amp",
        "enable_minmax_tuning",
        "enable_norm_bias_tuning",
        "enable_quanted_input",
        "gradient_accumulate_steps",
        "iters",
        "lr",
    ),
    *("low_gpu_mem_usage", "minmax_lr", "nsamples", "seqlen", "scale_dtype", "autoround_version", "provider", "zero_point"),
    *("act_group_size", "act_sym", "act_dynamic", "act_data_type", "static_kv_granularity", "static_attention_granularity"),
    # Which layers are packed: the tensors' names say so.
    *("lm_head", "quant_lm_head", "modules_in_block_to_quantize", "modules_to_not_convert", "regex_config"),
    # The kernels that would run it.
    *("backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "do_fuse", "fuse_max_seq_len"),
    *("modules_to_fuse", "model_name_or_path", "model_file_base_name"),
)
FLOAT_BITS = 16
"""The least number of bits with which activations, or a layer's weights, count as not quantized."""


@dataclass(frozen=True)
class Words(Layout[BlockWeight]):
    """A layout of codes in words.

    Attributes:
        bits: bits of a code.
        group_size: columns of a group; None for a whole row.
    """

    parts: ClassVar[tuple[str, ...]] = ("qweight", "qzeros", "scales", "g_idx")
    optional = frozenset({"g_idx"})

    bits: int
    group_size: int | None

    @property
    def title(self) -> str:
        groups = "a group a row" if self.group_size is None else f"groups of {self.group_size}"
        return f"{type(self).__name__}, {self.bits} bits, {groups}"

    @abstractmethod
    def codes(self, words: Tensor) -> Tensor:
        """`qweight` int32 -> uint8 (columns, rows)."""

    @abstractmethod
    def zeros(self, words: Tensor) -> Tensor:
        """`qzeros` int32 -> int16 (groups, rows)."""

    @abstractmethod
    def words(self, codes: Tensor) -> Tensor:
        """uint8 (columns, rows) -> `qweight` int32."""

    def read(self, name: str, parts: Mapping[str, Tensor]) -> BlockWeight:
        for part in ("qweight", "qzeros"):
            if parts[part].dtype is not torch.int32:
                raise GradlessError(f"{name} has its {part} in {parts[part].dtype}; {self.title} lies in 32-bit words.")
        codes, zeros, scales = self.codes(parts["qweight"]), self.zeros(parts["qzeros"]), parts["scales"]
        columns, rows = codes.shape
        group = self.group_size or columns
        groups = -(-columns // group)
        for part, tensor in (("qzeros", zeros), ("scales", scales)):
            if tensor.shape != (groups, rows):
                raise GradlessError(
                    f"{name} has {columns} columns in groups of {group} and {rows} rows, "
                    f"but its {part} are for {' x '.join(map(str, tensor.shape))}, not {groups} x {rows}."
                )
        finite(name, scales)
        if not torch.equal(scales.half().to(scales.dtype), scales):
            raise GradlessError(f"{name} has {scales.dtype} scales that fp16 cannot hold; such files are not supported yet.")
        size = dividing_size(group, columns)
        if size is None:
            raise GradlessError(f"{name} has groups of {group} in rows of {columns}; multiples of 32 are supported.")
        order = None if "g_idx" not in parts else column_order(name, parts["g_idx"], columns, group)
        block = grid_block(integers(self.bits, symmetric=False), size, "zero")
        lowest, blocks_per_value = block.codes[0], group // size
        codes = (codes if order is None else codes[order]).T.reshape(rows, -1, size)
        scale, zero = (x.T.repeat_interleave(blocks_per_value, 1)[:, : columns // size] for x in (scales, zeros))
        packed = assemble(block, codes.to(torch.int16) + lowest, scale, zero=zero + lowest)
        return BlockWeight(name, block, packed, column_order=order, blocks_per_value=blocks_per_value)

    def write(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not isinstance(weight.tuned, TunedCodes):
            return {"scales": rounded(weight.tuned_values.values.T.cpu(), parts["scales"].dtype)}
        raw = weight.block.unpack(weight.packed.flatten(0, 1).cpu()).codes - weight.block.codes[0]
        codes = raw.to(torch.uint8).view(weight.rows, weight.columns).T
        if weight.column_order is not None:
            codes = torch.empty_like(codes).index_copy_(0, weight.column_order.cpu(), codes)
        return {"qweight": self.words(codes)}

    def saved(self, weight: BlockWeight, parts: Mapping[str, Tensor]) -> Tensor:
        return self.write(weight, parts)["scales"].T.float()


def check_settings(config: Mapping[str, object], what: str, used: tuple[str, ...]) -> None:
    """Check the settings of `quantization_config` that GPTQ's tools and AWQ's have in common.

    Args:
        config: the settings.
        what: the quantizer.
        used: the names of settings that its own layout reads.

    Raises:
        GradlessError: layers differ from each other, words are not of 32 bits, codes are no integers, activations are quantized
            too, or a setting is not known.
    """
    if any(not pattern.startswith("-:") for pattern in mapping(config, "dynamic", what)):
        raise GradlessError(f"{what} with settings that differ between layers (`dynamic`) is not supported.")
    plain = {"pack_dtype": "int32", "data_type": "int", "method": what.lower()}
    for name, value in plain.items():
        if str(config.get(name) or value).removeprefix("torch.") != value:
            raise GradlessError(f"{what} with {name} = {config[name]!r}; supported is {value}.")
    if is_narrow(config.get("act_bits")):
        raise GradlessError(f"{what} with activations of {config['act_bits']} bits; those of weights alone are supported.")
    understood(config, what, (*USED, *used), NEUTRAL)


def is_narrow(bits: object) -> bool:
    """Whether a setting, if it is given, asks for fewer bits than a float's."""
    return bool(bits) and (not isinstance(bits, int | float) or bits < FLOAT_BITS)


def formats_named(config: Mapping[str, object], *names: str) -> set[str]:
    """The names that these settings give the format, in small letters."""
    return {str(config[name]).lower() for name in names if config.get(name)}


def column_order(name: str, g_idx: Tensor, columns: int, group: int) -> Tensor | None:
    """The model's column of each packed column, if groups are to lie together: int64 (columns,); None if they do already.

    Raises:
        GradlessError: a group is out of range, or is not as long as the others.
    """
    groups = torch.arange(columns) // group
    if g_idx.shape != (columns,) or g_idx.min() < 0 or g_idx.max() > groups[-1]:
        raise GradlessError(
            f"{name}: g_idx names groups beyond 0 .. {groups[-1]}, or is not one for each of {columns} columns."
        )
    order = g_idx.argsort(stable=True)
    if not torch.equal(g_idx[order].long(), groups):
        raise GradlessError(f"{name}: g_idx makes groups that are not of {group} columns each.")
    return None if torch.equal(g_idx.long(), groups) else order


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Codes that follow each other in int32 words, lowest bits first: (n, m) -> uint8 (32 n / bits, m)."""
    together = _words_together(bits)
    mask, taken = (1 << bits) - 1, []
    for first in range(0, 32 * together, bits):
        word, low = divmod(first, 32)
        code = words[word::together] >> low & mask
        if low + bits > 32:
            code = code & ((1 << (32 - low)) - 1) | (words[word + 1 :: together] << (32 - low) & mask)
        taken.append(code.to(torch.uint8))
    return torch.stack(taken, 1).flatten(0, 1)


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack_words`: uint8 (n, m) -> int32 (n * bits / 32, m)."""
    together = _words_together(bits)
    each = 32 * together // bits
    words = torch.zeros(len(codes) // each * together, codes.shape[1], dtype=torch.int32)
    for i in range(each):
        word, low = divmod(i * bits, 32)
        code = codes[i::each].to(torch.int32)
        words[word::together] |= code << low
        if low + bits > 32:
            words[word + 1 :: together] |= code >> (32 - low)
    return words


def _words_together(bits: int) -> int:
    """The least number of words that hold whole codes."""
    return 3 if bits == 3 else 1
