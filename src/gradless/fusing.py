"""The passes between a model's linear layers, each fused into one: normalization, the gate of an MLP, attention. Also dense
bf16 layers on processors that cannot multiply bf16.

A module keeps its place, its class and its parameters; only its forward is replaced. The new forward calls the old one if it
does not apply: on a GPU, without compiled kernels, if gradients are wanted, or with a key-value cache.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.kernels.reference import products, widens_bf16
from gradless.types import LanguageModel, Modules

ATTENTION = "gradless"
ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3_text")
"""The architectures that were checked by hand. Others may clamp, group or mask in ways that random inputs do not reveal."""
CLOSE = 2.0**-6
"""The largest difference between a module and its fused form, as a share of the largest output; both are rounded to bf16."""


Form = Callable[..., Tensor]
"""A fused forward: (module, x) -> y."""


class _Norm(Modules, Protocol):
    weight: Tensor
    eps: float
    variance_epsilon: float

    def forward(self, x: Tensor) -> Tensor: ...


class _MLP(Modules, Protocol):
    gate_proj: Callable[[Tensor], Tensor]
    up_proj: Callable[[Tensor], Tensor]
    down_proj: Callable[[Tensor], Tensor]

    def forward(self, x: Tensor) -> Tensor: ...


def fuse(model: LanguageModel) -> None:
    """Fuse the recognized modules of a transformers model; one module of each class is tried on random inputs first."""
    if kernels.name(model.device) != "cpu" or model.dtype is not torch.bfloat16 or model.config.model_type not in ARCHITECTURES:
        return
    verdicts: dict[type, Form | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in verdicts:
            nearest = min(((_error(module, form), i, form) for i, form in enumerate(_forms(module))), default=None)
            verdicts[kind] = nearest[2] if nearest and nearest[0] <= CLOSE else None
        form = verdicts[kind]
        if form is not None:
            vars(module)["forward"] = partial(form, module)
    _register_attention()
    if model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(ATTENTION)


def _forms(module: nn.Module) -> list[Form]:
    """The fused forwards that a module may have, judged by its class and attributes."""
    if type(module) is nn.Linear:
        return [_linear] if widens_bf16(module.weight.device) else []
    if type(module).__name__.endswith("RMSNorm") and isinstance(getattr(module, "weight", None), Tensor):
        return [partial(_rms_norm, plus=plus) for plus in (0.0, 1.0)]
    if all(isinstance(getattr(module, f"{name}_proj", None), nn.Module) for name in ("gate", "up", "down")):
        form = {"SiLU": False, "SiLUActivation": False, "GELUTanh": True, "PytorchGELUTanh": True}
        gelu = form.get(type(getattr(module, "act_fn", None)).__name__)
        return [] if gelu is None else [partial(_gated, gelu=gelu)]
    return []


def _error(module: Any, form: Form) -> float:
    """How far a fused forward is from the module's own, as a share of the largest output."""
    d = module.weight.shape[-1] if hasattr(module, "weight") else module.gate_proj.in_features
    x = torch.randn(1, 4, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.inference_mode():
        own, fused = module(x).float(), form(module, x).float()
    return float((own - fused).abs().max() / own.abs().max())


def _applies(module: Modules, *inputs: Tensor) -> bool:
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *module.parameters())):
        return False
    return all(x.dtype is torch.bfloat16 and x.device.type == "cpu" for x in inputs)


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    if not _applies(module, x, module.weight):
        own: Tensor = type(module).forward(module, x)
        return own
    y = products(x.flatten(0, -2).unsqueeze(0), module.weight.unsqueeze(0)).view(*x.shape[:-1], -1)
    return y if module.bias is None else y + module.bias


def _rms_norm(module: _Norm, x: Tensor, *, plus: float) -> Tensor:
    if not _applies(module, x, module.weight):
        own: Tensor = type(module).forward(module, x)
        return own
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return kernels.on(x.device).rms_norm(x, module.weight, eps, plus)


def _gated(module: _MLP, x: Tensor, *, gelu: bool) -> Tensor:
    if not _applies(module, x):
        own: Tensor = type(module).forward(module, x)
        return own
    gated = kernels.on(x.device).gate(module.gate_proj(x), module.up_proj(x), gelu=gelu)
    y: Tensor = module.down_proj(gated)
    return y


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, heads, length, size) each -> (batch, length, heads, size)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = more.get("is_causal")
    fits = (
        _applies(module, query, key, value)
        and query.shape[::2] == key.shape[::2] == value.shape[::2]
        and query.shape[3] == key.shape[3] == value.shape[3]
        and query.shape[3] % 32 == 0
        and (getattr(module, "is_causal", True) if causal is None else causal)
        and (attention_mask is None or (attention_mask.dtype is torch.bool and attention_mask.shape[1] == 1))
        and not any(more.get(name) is not None for name in ("softcap", "position_bias", "s_aux", "cache"))
        and not more.get("dropout")
    )
    if not fits:
        result: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **more)
        return result
    scaling = more.get("scaling")
    scale = query.shape[3] ** -0.5 if scaling is None else scaling
    return kernels.on(query.device).attention(query, key, value, attention_mask, scale), None
