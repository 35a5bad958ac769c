"""transformers' configuration of a GGUF file's model, from the file's metadata.

For each architecture every key is read, or is known to change no forward, or is refused by name. Values that are not
implemented are refused too. A key, or a missing key, means what it means in llama.cpp, with which every architecture is
compared (tests/test_gguf_forward.py). transformers' defaults of a model decide nothing.

Over 400 lines, because the architectures are read side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from gradless.errors import GradlessError
from gradless.formats.gguf import GGUFFile
from gradless.formats.gguf_rope import Rope
from gradless.types import Config

NEUTRAL = (
    "vocab_size",  # the embedding's number of rows is used
    "rope.scaling.finetuned",  # whether the model has seen such positions
    "tensor_data_layout",  # where the converter took the weights from
    "pooling_type",  # of embeddings, not of words
    "expert_used_count",
)
"""Keys that change no forward of the architectures here."""
NOT_MODELS = {
    "adapter": "an adapter; give it with --adapter, beside its model",
    "mmproj": "the projector of a multimodal model, without the language model",
    "imatrix": "an importance matrix for a quantizer, not a model",
    "vocab": "a vocabulary without a model",
}
"""`general.type` -> a description of files that are no models."""
FOREIGN = ("adapter.", "clip.", "diffusion.", "imatrix.", "xielu.")
"""Prefixes of keys that belong to other things than the language models here."""
DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Name of a layer's tensor in the file -> module."""
QK_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
POST_NORMS = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
TOKENS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
_REQUIRED: object = object()


class Statement:
    """The metadata of a file's architecture. It notes every key that is read, and `close` refuses the others.

    Raises:
        GradlessError: from every method, if a key is missing, has another type, or is out of range.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.asked: set[str] = set()
        self.tensors: set[str] = set()

    def refused(self, why: str, more: str = "") -> GradlessError:
        return GradlessError(f"{self.file.path} {why}; gradless does not compute such a model rightly. {more}".rstrip())

    def value(self, key: str, default: object = _REQUIRED) -> object:
        """The value of a key. If it has one for each layer, they must be equal."""
        key = f"{self.file.architecture}.{key}"
        self.asked.add(key)
        if key not in self.file.metadata:
            if default is _REQUIRED:
                raise GradlessError(
                    f"{self.file.path} has no {key}, which its model cannot be built without; convert it again."
                )
            return default
        value = self.file.metadata[key]
        if isinstance(value, np.ndarray):
            if not len(value) or (value != value[0]).any():
                raise self.refused(f"states {key} for each layer, and not the same")
            return value[0].item()
        return value

    def size(self, key: str, default: object = _REQUIRED, *, least: int = 1) -> int:
        """A whole number of at least 1, or `least`."""
        value = self.value(key, default)
        if type(value) is not int or value < least:
            raise self._wrong(key, value, f"a whole number of at least {least}")
        return value

    def number(self, key: str, default: object = _REQUIRED, *, above: float = -math.inf) -> float:
        """A finite number, larger than `above`."""
        value = self.value(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= above:
            wanted = "a finite number" if above == -math.inf else f"a finite number above {above:g}"
            raise self._wrong(key, value, wanted)
        return float(value)

    def word(self, key: str, default: str) -> str:
        value = self.value(key, default)
        if type(value) is not str:
            raise self._wrong(key, value, "a word")
        return value

    def token(self, name: str) -> int | None:
        """The id of a special token, or None if there is none."""
        number = self.file.metadata.get(f"tokenizer.ggml.{name}_token_id")
        return number if type(number) is int and 0 <= number < self.file.tensors["token_embd.weight"].shape[0] else None

    def has(self, *tensors: str) -> bool:
        """Whether a layer of the file has one of these tensors."""
        return any(name.endswith(tensors) for name in self.file.tensors if name.startswith("blk."))

    def vector(self, name: str, length: int) -> Tensor | None:
        """The values of a tensor that becomes part of the configuration, fp64."""
        if name not in self.file.floats:
            return None
        self.tensors.add(name)
        values = self.file.floats[name].double()
        if values.shape != (length,) or not (values > 0).all() or not values.isfinite().all():
            raise GradlessError(f"{self.file.path}: {name} must be {length} positive numbers, one for each frequency.")
        return values

    def measure(self, name: str, columns: int) -> None:
        """Refuse a tensor of another size than the metadata state, before anything of that size is made."""
        shape = self.file.tensors[name].shape if name in self.file.tensors else ()
        if len(shape) != 2 or shape[1] != columns:
            held = " x ".join(map(str, shape)) or "missing"
            raise GradlessError(
                f"{self.file.path}: {name} is {held}, where the metadata say {columns} columns; download or convert it again."
            )

    def expect(self, key: str, *allowed: object) -> None:
        """Refuse every value of a key except `allowed`. The first of these is the default."""
        value = self.value(key, allowed[0])
        if value not in allowed:
            raise self.refused(f"states {self.file.architecture}.{key} = {value!r}")

    def close(self) -> None:
        """Refuse every key that was not read."""
        own = f"{self.file.architecture}."
        neutral = {own + key for key in NEUTRAL}
        for key in self.file.metadata:
            if (key.startswith(own) and key not in self.asked | neutral) or key.startswith(FOREIGN):
                raise self.refused(f"states {key} = {self.file.metadata[key]!r:.60}, which is not read")

    def _wrong(self, key: str, value: object, wanted: str) -> GradlessError:
        return GradlessError(f"{self.file.path}: {self.file.architecture}.{key} is {value!r:.60}; it must be {wanted}.")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        hidden: width of the residual stream.
        heads: number of heads.
        head: width of one head.
        layers: number of layers.
        context: positions that the model can read.
    """

    hidden: int
    heads: int
    head: int
    layers: int
    context: int


Settings = Callable[[Statement, Sizes, Rope], dict[str, object]]


def _unwindowed(stated: Statement, sizes: Sizes, _rope: Rope) -> dict[str, object]:
    """Settings of a model in which every layer sees all earlier tokens."""
    window = stated.size("attention.sliding_window", 0, least=0)
    if window and window < sizes.context:
        raise stated.refused(f"states {stated.file.architecture}.attention.sliding_window = {window}")
    return {"sliding_window": None, "use_sliding_window": False}


def _gemma2(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    if stated.number("rope.freq_base_swa", rope.base) != rope.base:
        raise stated.refused("states another rope.freq_base_swa than rope.freq_base")
    return {
        "sliding_window": stated.size("attention.sliding_window", 4096),
        "layer_types": _windows(sizes, 2),
        "query_pre_attn_scalar": _queries(sizes, 46),
        "attn_logit_softcapping": _cap(stated, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _cap(stated, "final_logit_softcapping", 30.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _gemma3(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    stated.expect("attn_logit_softcapping", 0.0)
    window = stated.size("attention.sliding_window", 0, least=0)
    pattern = stated.size("attention.sliding_window_pattern", 6, least=0) if window else 1
    windows = rope.of_windows(stated.number("rope.freq_base_swa", 10_000.0, above=1), scale=1.0)
    return {
        "sliding_window": window or sizes.context,
        "layer_types": _windows(sizes, pattern),
        "rope_parameters": {
            "full_attention": rope.parameters(),
            "sliding_attention": windows.parameters(),
        },
        "query_pre_attn_scalar": _queries(sizes, 62),
        "attn_logit_softcapping": None,
        "final_logit_softcapping": _cap(stated, "final_logit_softcapping", 0.0),
        "hidden_activation": "gelu_pytorch_tanh",
    }


def _windows(sizes: Sizes, pattern: int) -> list[str]:
    """The kind of attention of each layer: every `pattern`-th sees all tokens, the others a window."""
    layers = range(1, sizes.layers + 1)
    return ["sliding_attention" if pattern == 0 or i % pattern else "full_attention" for i in layers]


def _queries(sizes: Sizes, largest: int) -> int:
    """Gemma divides scores by the root of this: the size of a head, or, in its largest model, hidden size / heads."""
    if sizes.layers == largest:
        return sizes.hidden // sizes.heads
    return sizes.head


def _cap(stated: Statement, key: str, default: float) -> float | None:
    """The bound that a tanh keeps logits below, or None if there is none."""
    value = stated.number(key, default)
    if value < 0 or (value == 0 and default):
        raise stated.refused(f"states {stated.file.architecture}.{key} = {value}")
    return value or None


def _phi3(stated: Statement, _sizes: Sizes, rope: Rope) -> dict[str, object]:
    """The window is the model's own here; llama.cpp reads the key and lets every layer see all tokens."""
    return {
        "sliding_window": stated.size("attention.sliding_window", 0, least=0) or None,
        "original_max_position_embeddings": rope.original,
        "rope_parameters": rope.parameters(linear=False),
    }


def _granite(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    stated.expect("rope.scaling.finetuned", True)  # False is a model without positions
    return _unwindowed(stated, sizes, rope) | {
        "embedding_multiplier": stated.number("embedding_scale", 0.0) or 1.0,
        "residual_multiplier": stated.number("residual_scale", 0.0) or 1.0,
        "attention_multiplier": stated.number("attention.scale", 0.0) or sizes.head**-0.5,
        "logits_scaling": stated.number("logit_scale", above=0),
    }


def _smollm3(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    layers = range(1, sizes.layers + 1)
    return _unwindowed(stated, sizes, rope) | {"no_rope_layers": [int(i % 4 != 0) for i in layers]}


def _stablelm(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    stated.value("use_parallel_residual", None)  # converters wrote wrong values; llama.cpp decides by the tensors too
    parallel = not stated.has("ffn_norm.weight")
    biased = stated.has("attn_q.bias", "attn_k.bias", "attn_v.bias")
    own = {"use_parallel_residual": parallel, "use_qkv_bias": biased, "qk_layernorm": False}
    return _unwindowed(stated, sizes, rope) | own


def _starcoder2(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    for name in (f"blk.{i}.ffn_{part}.bias" for i in range(sizes.layers) for part in ("up", "down")):
        if name not in stated.file.tensors:
            raise GradlessError(f"{stated.file.path} has no {name}; download or convert it again.")
    return _unwindowed(stated, sizes, rope) | {"use_bias": True, "hidden_act": "gelu_pytorch_tanh"}


def _squared(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    return _unwindowed(stated, sizes, rope) | {"hidden_act": "relu2"}


def _gemma(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    return _unwindowed(stated, sizes, rope) | {"hidden_act": "gelu_pytorch_tanh"}


def _cohere(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    return _unwindowed(stated, sizes, rope) | {"logit_scale": stated.number("logit_scale"), "use_qk_norm": False}


def _cohere2(stated: Statement, sizes: Sizes, _rope: Rope) -> dict[str, object]:
    return {
        "logit_scale": stated.number("logit_scale"),
        "sliding_window": stated.size("attention.sliding_window"),
        "layer_types": _windows(sizes, stated.size("attention.sliding_window_pattern", 4, least=0)),
    }


def _mistral3(stated: Statement, sizes: Sizes, rope: Rope) -> dict[str, object]:
    growth = {
        "llama_4_scaling_beta": stated.number("attention.temperature_scale", 0.0),
        "original_max_position_embeddings": rope.original,
    }
    return _unwindowed(stated, sizes, rope) | {"rope_parameters": rope.parameters() | growth}


@dataclass(frozen=True)
class Architecture:
    """How transformers describes a model of llama.cpp.

    Attributes:
        model_type: transformers' name.
        settings: (the file's statement, the settings of every architecture, rotary positions) -> further settings.
        modules: name of a layer's tensor in the file -> module.
        epsilon: the configuration's name for the norms' epsilon.
        mean: whether norms subtract the mean.
        shifted: whether norms hold their weight minus one; the file holds the weight.
        interleaved: whether a pair of rotated values lies side by side in the file's rows of q and k, and half a head apart in
            the model's.
        partial: whether only a part of a head may rotate.
        head: whether the file has a head of its own: "own", "tied", or "either".
        factors: the tensors with factors of frequencies that a file may have, see `Rope.read`.
        ramps: whether yarn's ramp may differ from the usual one.
    """

    model_type: str
    settings: Settings = _unwindowed
    modules: Mapping[str, str] = field(default_factory=lambda: DECODER)
    epsilon: str = "rms_norm_eps"
    mean: bool = False
    shifted: bool = False
    interleaved: bool = False
    partial: bool = False
    head: str = "either"
    factors: str = "none"
    ramps: bool = False

    def configuration(self, stated: Statement) -> Config:
        """transformers' configuration of a file.

        Raises:
            GradlessError: a key is missing or wrong, is not read, or has a value that is not implemented.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        file = stated.file
        hidden, heads = stated.size("embedding_length"), stated.size("attention.head_count")
        context = stated.size("context_length")
        layers = stated.size("block_count")
        head = stated.size("attention.key_length", hidden // heads)
        if (held := len({name.split(".")[1] for name in file.tensors if name.startswith("blk.")})) != layers:
            raise GradlessError(f"{file.path} states {layers} layers and has tensors of {held}; download or convert it again.")
        if stated.size("attention.value_length", hidden // heads) != head:
            raise stated.refused("has heads whose keys and values differ in size")
        stated.measure("token_embd.weight", hidden)
        stated.measure("blk.0.attn_output.weight", heads * head)
        rotated = stated.size("rope.dimension_count", head)
        if rotated % 2 or rotated > head or (rotated < head and not self.partial):
            raise stated.refused(f"states {file.architecture}.rope.dimension_count = {rotated}, with heads of {head}")
        rope = Rope.read(stated, rotated, context, ramps=self.ramps, factors=self.factors)
        own_head = "output.weight" in file.tensors
        if self.head != "either" and own_head != (self.head == "own"):
            raise stated.refused("has a head of its own (output.weight)" if own_head else "has no head (output.weight)")
        stated.expect("attention.causal", True)
        stated.expect("expert_count", 0)
        epsilon = "attention.layer_norm_epsilon" if self.mean else "attention.layer_norm_rms_epsilon"
        key_heads = stated.size("attention.head_count_kv", heads)
        sizes = Sizes(hidden, heads, head, layers, min(context, rope.limit or context))
        known: dict[str, object] = {
            "vocab_size": file.tensors["token_embd.weight"].shape[0],
            "hidden_size": hidden,
            "intermediate_size": stated.size("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": key_heads,
            "head_dim": head,
            "max_position_embeddings": sizes.context,
            self.epsilon: stated.number(epsilon, above=0),
            "rope_parameters": rope.parameters(),
            "tie_word_embeddings": not own_head,
            "hidden_act": "silu",
            "attention_bias": stated.has("attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_output.bias"),
            "mlp_bias": stated.has("ffn_gate.bias", "ffn_up.bias", "ffn_down.bias"),
            **{name: stated.token(key) for name, key in TOKENS.items()},
        }
        known |= self.settings(stated, sizes, rope)
        stated.close()
        if self.partial:
            share = rotated / head  # transformers takes int(share * head)
            positions = known["rope_parameters"]
            assert isinstance(positions, dict)
            positions["partial_rotary_factor"] = share if int(share * head) == rotated else math.nextafter(share, 1)
        if heads % key_heads:
            raise stated.refused(f"has {heads} heads over {key_heads} of keys and values")
        try:
            config: Config = AutoConfig.for_model(self.model_type, **known)
        except (StrictDataclassError, ValueError, TypeError) as error:
            raise stated.refused(f"states what transformers refuses ({' '.join(str(error).split())})") from error
        return config


_SANDWICH = DECODER | POST_NORMS | {"ffn_norm": "pre_feedforward_layernorm"}
_FUSED = {name: module for name, module in DECODER.items() if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")}
_UNGATED = {name: module for name, module in DECODER.items() if name != "ffn_gate"}
_GLM = {name: module for name, module in DECODER.items() if name != "ffn_gate"} | {
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}
_PARALLEL = {name: module for name, module in DECODER.items() if name != "ffn_norm"}

ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True, factors="either"),
    "mistral3": Architecture("ministral3", _mistral3, interleaved=True, factors="either", ramps=True),
    "arcee": Architecture("arcee", _squared, _UNGATED, interleaved=True, factors="either"),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", modules=DECODER | QK_NORMS),
    "gemma": Architecture("gemma", _gemma, shifted=True, head="tied"),
    "gemma2": Architecture("gemma2", _gemma2, _SANDWICH, shifted=True, head="tied"),
    "gemma3": Architecture("gemma3_text", _gemma3, _SANDWICH | QK_NORMS, shifted=True),
    "phi3": Architecture(
        "phi3", _phi3, _FUSED | {"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, partial=True, factors="pair"
    ),
    "granite": Architecture("granite", _granite, interleaved=True, factors="either"),
    "smollm3": Architecture("smollm3", _smollm3, interleaved=True),
    "olmo2": Architecture(
        "olmo2",
        modules={name: module for name, module in DECODER.items() if "norm" not in name} | QK_NORMS | POST_NORMS,
        head="own",
    ),
    "glm4": Architecture("glm4", modules=_GLM, partial=True),
    "stablelm": Architecture("stablelm", _stablelm, epsilon="layer_norm_eps", mean=True, partial=True, head="own"),
    "starcoder2": Architecture(
        "starcoder2", _starcoder2, _UNGATED | {"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"}, "norm_epsilon", mean=True
    ),
    "nemotron": Architecture("nemotron", _squared, _UNGATED, "norm_eps", mean=True, shifted=True, partial=True, head="own"),
    "command-r": Architecture("cohere", _cohere, _PARALLEL, "layer_norm_eps", mean=True, head="tied"),
    "cohere2": Architecture("cohere2", _cohere2, _PARALLEL, "layer_norm_eps", mean=True, head="tied"),
}
"""`general.architecture` -> its description; all others are refused."""


def architecture(file: GGUFFile) -> Architecture:
    """The architecture of a file.

    Raises:
        GradlessError: the architecture is not in `ARCHITECTURES`, or the file is a part of a model or no model.
    """
    kind = str(file.metadata.get("general.type", "model"))
    if file.architecture == "controlvector":
        kind = "a control vector, not a model"
    if kind != "model":
        raise GradlessError(f"{file.path} is {NOT_MODELS.get(kind, kind)}; give the GGUF file of a language model.")
    if (parts := file.metadata.get("split.count", 1)) not in (0, 1):
        raise GradlessError(f"{file.path} is one of {parts} parts of a model; join them first (llama-gguf-split --merge).")
    if file.architecture not in ARCHITECTURES:
        raise GradlessError(
            f"{file.path}: the architecture {file.architecture} is not supported. Supported are {', '.join(ARCHITECTURES)}."
        )
    return ARCHITECTURES[file.architecture]
