"""What gradless uses of others' objects: of transformers' models, configurations and tokenizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, Self

import torch
from torch import Tensor, nn


class Modules(Protocol):
    """A tree of modules: every `nn.Module`, and every `LanguageModel`."""

    training: bool
    _buffers: dict[str, Tensor | None]
    _non_persistent_buffers_set: set[str]

    def modules(self) -> Iterator[nn.Module]: ...

    def children(self) -> Iterator[nn.Module]: ...

    def named_modules(self) -> Iterator[tuple[str, nn.Module]]: ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...

    def named_buffers(self, *, recurse: bool = True) -> Iterator[tuple[str, Tensor]]: ...

    def get_submodule(self, target: str) -> nn.Module: ...

    def set_submodule(self, target: str, module: nn.Module) -> None: ...

    def get_parameter(self, target: str) -> nn.Parameter: ...

    def state_dict(self, *, keep_vars: bool = False) -> dict[str, Tensor]: ...

    def train(self, mode: bool = True) -> Self: ...

    def eval(self) -> Self: ...

    def requires_grad_(self, requires_grad: bool = True) -> Self: ...


class Config(Protocol):
    """A model's configuration; other settings differ from architecture to architecture."""

    model_type: str
    name_or_path: str
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    _attn_implementation: str | None

    def get_text_config(self, decoder: bool = False) -> Config: ...

    def to_dict(self) -> dict[str, object]: ...

    def save_pretrained(self, save_directory: Path) -> None: ...


class Scored(Protocol):
    """What a forward returns."""

    @property
    def logits(self) -> Tensor: ...


class GenerationConfig(Protocol):
    """How a model generates."""

    def save_pretrained(self, save_directory: Path) -> None: ...


class LanguageModel(Modules, Protocol):
    """A causal language model of transformers."""

    config: Config
    generation_config: GenerationConfig
    base_model_prefix: str

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def forward(self) -> Callable[..., Scored]: ...

    def __call__(self, *, use_cache: bool, **inputs: Tensor) -> Scored: ...

    def generate(self, *, input_ids: Tensor, **options: object) -> Tensor: ...

    def can_generate(self) -> bool: ...

    def get_decoder(self) -> nn.Module: ...

    def get_input_embeddings(self) -> nn.Embedding: ...

    def get_output_embeddings(self) -> nn.Module | None: ...

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None: ...

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> Mapping[str, str]: ...

    def tie_weights(self) -> None: ...

    def set_attn_implementation(self, attn_implementation: str) -> None: ...

    def save_pretrained(self, save_directory: Path) -> None: ...

    @classmethod
    def _from_config(cls, config: Config, *, dtype: torch.dtype) -> Self: ...

    def _init_weights(self, module: Modules) -> None: ...

    def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]: ...


class Tokens(Protocol):
    """What a tokenizer returns; places only where they are asked for."""

    input_ids: list[int]
    offset_mapping: list[tuple[int, int]]


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    chat_template: str | dict[str, str] | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    @property
    def special_tokens_map(self) -> dict[str, str]: ...

    def __call__(self, text: str, *, add_special_tokens: bool, return_offsets_mapping: bool = False) -> Tokens: ...

    def get_chat_template(self, *, tools: Sequence[Mapping[str, object]] | None = None) -> str: ...

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, object]],
        tools: Sequence[Mapping[str, object]] | None,
        *,
        tokenize: bool,
        **variables: object,
    ) -> str: ...

    def decode(self, token_ids: Sequence[int] | Tensor, skip_special_tokens: bool = False) -> str: ...

    def save_pretrained(self, save_directory: Path) -> object: ...
