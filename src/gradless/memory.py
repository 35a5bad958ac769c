"""The memory of this process, and the memory that each way of tuning a model would need.

A plan is the peak of one step, in bytes, from shapes alone. It counts tensors. Not counted: the interpreter, its libraries, a
GPU's context, and memory cached by the allocator. P is the number of parameters, N the number of weights of the linear layers
(without heads), B the number of their blocks, L the size of the largest, A the number of values of adapters of rank 8 on all of
them, T = batch * length the number of tokens, V the size of the vocabulary, and C is explained below:

            weights          gradients  states                 scratch
    adamw   4 P              4 P        8 P: two moments       -
    sgd     4 P              4 P        -: no momentum         -
    qat     4 P + 4 N        4 P        8 P                    4 L: a layer being rounded
    lora    2 P + 4 A        4 A        8 A                    -
    qlora   packed + 4 A     4 A        8 A                    2 L: a layer, unpacked
    mezo    2 P              -          -                      2 L: a layer, moved
    zoqo    packed           -          N / 16: residuals       2 C min(L, TILE): a tile, unpacked
    quzo    packed           -          N / 16: residuals       2 C min(L, TILE)
    qzo     packed           -          4 B: fp32 masters      2 C min(L, TILE)
    ezo     packed           -          4 B: fp32 masters      2 C min(L, TILE)
    nzo     packed           -          4 B / 2: at most       2 min(L, TILE)

Full tuning is in fp32: 16 bytes a parameter with AdamW, as much as mixed precision takes (bf16 weights and gradients, fp32
masters and moments). QAT keeps latent weights and their rounded copies. Adapters are fp32 on a bf16 base, as peft makes them.
`packed` is the size of the quantized checkpoint's tensors in memory: for a GGUF file its own tensors; for other folders the
blocks that their layers become; for a dense model the output of `gradless quantize`, blocks for linear layers and bf16 for
everything else. gradless maps files into memory, so rows of an embedding that no token looks up are counted but never read.
ZOQO and QuZO tune one row in 16 (their default) and keep a byte for each of its codes.

A backward keeps the input and the output of every linear layer for every token,

    4 T sum(inputs + outputs)

if everything is tuned. With adapters it keeps 2 T sum(inputs + outputs), in bf16, and 4 T sum(inputs), peft's fp32 copy of each
adapter's input. This is the count of Korthikanti et al. (arXiv 2205.05198) layer by layer, without dropout and with attention
that keeps no scores. It counts the one input of q, k and v three times, which makes up for norms and activation functions,
which it leaves out. Gradients and activations are added although a backward frees one while it makes the other, because both
are complete if a step has several micro-batches. A forward alone keeps the values of one block, in bf16: the residual stream,
its normalized copy, and three tensors as wide as the widest layer (a gated product and its factors),

    2 T (2 hidden + 3 widest)

times C. gradless reads both sides of a query in one forward, C = 2, unless T is above 1024. MeZO's dense weights and NZO have
C = 1. The same factor holds for logits. NZO adds 2 q = 16 tokens to each example.

Logits are those that a loss needs, at one position an example: fp32 logits and their log-softmax take 8 V bytes an example,
with their gradient 12 V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import psutil
import torch

from gradless.blocks import dividing_size, grid_block
from gradless.errors import GradlessError
from gradless.formats.bounded import building, check_config
from gradless.formats.checkpoint import Checkpoint
from gradless.formats.folder import Folder, is_quantized
from gradless.formats.gguf import GGUFFile
from gradless.grids import integers
from gradless.layers import TILE
from gradless.methods.recipe import COUNT
from gradless.methods.registry import RECIPES
from gradless.spaces import parameter_sites
from gradless.training.batches import PAIR_TOKENS
from gradless.training.options import GROUPS
from gradless.types import Config, LanguageModel

FIRST_ORDER = ("adamw", "sgd", "qat", "lora", "qlora")
"""First-order ways of tuning that a plan knows beside the methods."""
RANK = 8
"""Rank of LoRA's adapters."""
BITS, GROUP_SIZE = 4, 64
"""Default bits and group size for quantizing a dense model."""


def resident_bytes() -> int:
    """Resident memory of this process, memory-mapped file pages included."""
    return int(psutil.Process().memory_info().rss)


@dataclass(frozen=True)
class Shapes:
    """The shapes of a model that a plan needs.

    Attributes:
        name: the model's name, for a person.
        parameters: values in all tensors; a head that is tied to an embedding counts once.
        linear: (outputs, inputs) of every linear layer, heads left out.
        vocabulary: rows of the embedding.
        hidden: its columns, the width of the residual stream.
        packed: bytes of all tensors of the quantized checkpoint.
        blocks: blocks of the linear layers in it.
    """

    name: str
    parameters: int
    linear: tuple[tuple[int, int], ...]
    vocabulary: int
    hidden: int
    packed: int
    blocks: int


@dataclass(frozen=True)
class Memory:
    """Bytes at the peak of a step, by purpose; see the module."""

    weights: int
    gradients: int
    states: int
    activations: int
    logits: int
    scratch: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def need(method: str, shapes: Shapes, *, batch_size: int, length: int) -> Memory:
    """The memory of a step of `method`.

    Args:
        method: one of `FIRST_ORDER`, or a method's name.
        shapes: the model's.
        batch_size: examples in a forward.
        length: tokens of an example.
    """
    p, inputs = shapes.parameters, sum(columns for _, columns in shapes.linear)
    both = inputs + sum(rows for rows, _ in shapes.linear)
    n, largest = (of(rows * columns for rows, columns in shapes.linear) for of in (sum, max))
    tokens, adapters = batch_size * length, RANK * both
    of_token = 2 * (2 * shapes.hidden + 3 * max(map(max, shapes.linear)))
    full = {"gradients": 4 * p, "activations": 4 * tokens * both, "logits": 12 * batch_size * shapes.vocabulary}
    adapted = {**full, "gradients": 4 * adapters, "activations": tokens * (2 * both + 4 * inputs), "states": 8 * adapters}
    match method:
        case "adamw":
            return Memory(weights=4 * p, states=8 * p, scratch=0, **full)
        case "sgd":
            return Memory(weights=4 * p, states=0, scratch=0, **full)
        case "qat":
            return Memory(weights=4 * p + 4 * n, states=8 * p, scratch=4 * largest, **full)
        case "lora":
            return Memory(weights=2 * p + 4 * adapters, scratch=0, **adapted)
        case "qlora":
            return Memory(weights=shapes.packed + 4 * adapters, scratch=2 * largest, **adapted)
    if method not in RECIPES:
        raise GradlessError(f"there is no method {method!r} to plan for; there are {', '.join((*FIRST_ORDER, *RECIPES))}.")
    recipe = RECIPES[method]
    sides = 2 if recipe.pairs and tokens <= PAIR_TOKENS else 1
    return Memory(
        weights=shapes.packed if recipe.held_packed else 2 * p,
        gradients=0,
        states=recipe.state_bytes(shapes.linear, shapes.blocks),
        activations=sides * (tokens + recipe.tokens_added * batch_size) * of_token,
        logits=sides * 8 * batch_size * shapes.vocabulary,
        scratch=2 * sides * min(largest, TILE) if recipe.held_packed else 2 * largest,
    )


class Plan(TypedDict):
    """The memory of a step of each method; see `plan`."""

    name: str
    parameters: int
    packed: int
    batch_size: int
    length: int
    methods: dict[str, dict[str, float]]


def plan(shapes: Shapes, methods: Sequence[str], *, batch_size: int, length: int) -> Plan:
    """The memory of a step of each method, as plain values: bytes, and each total's ratio to the largest."""
    for name, value in (("batch size", batch_size), ("length", length)):
        if value not in COUNT:
            raise GradlessError(f"the {name} is {value}; it must be {COUNT}.")
    needs = {m: need(m, shapes, batch_size=batch_size, length=length) for m in methods}
    largest = max(memory.total for memory in needs.values())
    rows = {m: {**asdict(memory), "total": memory.total, "ratio": memory.total / largest} for m, memory in needs.items()}
    return {
        "name": shapes.name,
        "parameters": shapes.parameters,
        "packed": shapes.packed,
        "batch_size": batch_size,
        "length": length,
        "methods": rows,
    }


def as_text(planned: Plan) -> str:
    """A plan for a person, in MB."""
    rows = planned["methods"]
    columns = ("weights", "gradients", "states", "activations", "logits", "scratch", "total")
    lines = [
        f"{planned['name']}: {planned['parameters']:,} parameters, {planned['packed']:,} bytes when quantized",
        f"peak of a step on {planned['batch_size']} x {planned['length']} tokens, in MB; the interpreter is not counted",
        "",
        f"  {'method':8}" + "".join(f"{name:>13}" for name in columns) + f"{'of largest':>13}",
    ]
    for method, row in rows.items():
        lines.append(f"  {method:8}" + "".join(f"{row[name] / 1e6:13,.1f}" for name in columns) + f"{row['ratio']:13.1%}")
    return "\n".join(lines)


def shapes_of(path: Path, *, bits: int | None = None, group_size: int | None = None) -> Shapes:
    """The shapes of a model; its weights are not read.

    Args:
        path: a GGUF file, a packed or a dense folder, or a config.json.
        bits: bits of a code, for quantizing a dense model's linear layers; None for `BITS`.
        group_size: number of weights of a row that share a range, likewise; None for `GROUP_SIZE`.

    Raises:
        GradlessError: there is no model, it cannot be read, or it is packed already and `bits` or `group_size` is given.
    """
    packed = is_quantized(path) if path.is_dir() else path.is_file() and path.suffix != ".json"
    if packed and not (bits is None and group_size is None):
        raise GradlessError(f"{path} is quantized already; leave --bits and --group-size out.")
    if packed and path.is_dir():
        embedding = _skeleton(_config(path)).get_input_embeddings().weight
        return _of_file(Folder.open(path), *embedding.shape)
    if packed:
        file = GGUFFile.open(path)
        if "token_embd.weight" not in file.tensors:
            raise GradlessError(f"{path} has no tensor token_embd.weight; give the GGUF file of a language model.")
        return _of_file(file, *file.tensors["token_embd.weight"].shape)
    return shapes_of_config(_config(path), str(path), bits=bits, group_size=group_size)


def shapes_of_config(config: Config, name: str, *, bits: int | None = None, group_size: int | None = None) -> Shapes:
    """The shapes of the dense model that a transformers configuration describes; see `shapes_of`."""
    bits, group_size = BITS if bits is None else bits, GROUP_SIZE if group_size is None else group_size
    if not 2 <= bits <= 8:
        raise GradlessError(f"--bits is {bits}; codes have 2 to 8.")
    if group_size not in GROUPS:
        raise GradlessError(f"--group-size is {group_size}; it must be {GROUPS}.")
    model = _skeleton(config)
    weights = {name: getattr(*sites[0]) for name, sites in parameter_sites(model).items() if name.endswith("weight")}
    size = dividing_size(group_size)
    for layer, weight in weights.items():
        if size is None or weight.shape[1] % group_size:
            raise GradlessError(
                f"{layer} has rows of {weight.shape[1]}: groups of {group_size} do not fit; "
                "give a --group-size that is a multiple of 32 and divides it."
            )
    assert size is not None
    parameters, n = (sum(one.numel() for one in tensors) for tensors in (model.parameters(), weights.values()))
    vocabulary, hidden = model.get_input_embeddings().weight.shape
    block = grid_block(integers(bits), size)
    return Shapes(
        name=name,
        parameters=parameters,
        linear=tuple((weight.shape[0], weight.shape[1]) for weight in weights.values()),
        vocabulary=vocabulary,
        hidden=hidden,
        packed=n // size * block.nbytes + 2 * (parameters - n),
        blocks=n // size,
    )


def _of_file(file: Checkpoint, vocabulary: int, hidden: int) -> Shapes:
    linear = [file.quantized[name] for name in file.linear_layers()]
    linear = [tensor for tensor in linear if tensor.rows != vocabulary]  # the head is not tuned
    if not linear:
        raise GradlessError(f"{file.path} has no quantized linear layer; give a quantized file, or the dense model's folder.")
    return Shapes(
        name=str(file.path),
        parameters=sum(t.rows * t.columns for t in file.quantized.values()) + sum(map(torch.numel, file.floats.values())),
        linear=tuple((tensor.rows, tensor.columns) for tensor in linear),
        vocabulary=vocabulary,
        hidden=hidden,
        packed=sum(t.nbytes for t in file.quantized.values()) + sum(file.tensors[name].nbytes for name in file.floats),
        blocks=sum(tensor.rows * tensor.values_per_row for tensor in linear),
    )


def _config(path: Path) -> Config:
    """transformers' configuration in a folder or a file."""
    from transformers import AutoConfig

    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise GradlessError(f"there is no {file}; give a GGUF file, a model's folder, or its config.json.")
    check_config(file)
    with building(file, fault="{} is no configuration that transformers can read"):
        config: Config = AutoConfig.from_pretrained(file, local_files_only=True, trust_remote_code=False)
    return config


def _skeleton(config: Config) -> LanguageModel:
    """The model that a configuration describes, on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM

    with building(Path(str(config.name_or_path or config.model_type))), torch.device("meta"):
        model: LanguageModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model.tie_weights()
    return model
