"""Checkpoints of a dense model, made and read by the formats' own tools; runs in an environment that has them.

    make tools
    .venv-tools/bin/python papers/qzo/checkpoints.py make gptq --bits 4 --group 64 --dense DIR --text FILE --output DIR
    .venv-tools/bin/python papers/qzo/checkpoints.py scores --model DIR --prompts P.safetensors --output S.safetensors
    .venv-tools/bin/python papers/qzo/checkpoints.py weights --model DIR --output W.safetensors

`make` quantizes with real text (a line is a sample); `scores` loads a checkpoint through transformers, as its users do, and
scores answers to prompts; `weights` writes what its layers multiply with. gradless itself is neither needed nor imported.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig


def with_gptqmodel(arguments: argparse.Namespace, text: list[str]) -> None:
    """GPTQ in its first or second format, and AWQ."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # it wants two, on whatever machine
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import AWQConfig, QuantizeConfig

    shape = {"bits": arguments.bits, "group_size": arguments.group, "sym": not arguments.asymmetric}
    if arguments.format == "awq":
        config, backend = AWQConfig(**shape | {"sym": False}), BACKEND.AWQ_TORCH
    else:
        aware = arguments.group > 0 and not arguments.act_order
        order = {"desc_act": arguments.act_order, "act_group_aware": aware}
        config, backend = QuantizeConfig(**shape, **order, format=arguments.format.replace("-", "_")), BACKEND.AUTO
    model = GPTQModel.load(str(arguments.dense), config, device="cpu", dtype=torch.bfloat16)
    model.quantize(text, batch_size=4, backend=backend)
    model.save(str(arguments.output))


def with_autoround(arguments: argparse.Namespace, text: list[str]) -> None:
    from auto_round import AutoRound

    model = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    tokens = [tokenizer(line, return_tensors="pt").input_ids[:, :64] for line in text]
    tokens = [ids for ids in tokens if ids.shape[1] == 64]
    rounding = AutoRound(
        model, tokenizer, bits=arguments.bits, group_size=arguments.group, sym=not arguments.asymmetric,
        iters=arguments.iterations, nsamples=len(tokens), seqlen=64, dataset=tokens, device_map="cpu",
    )  # fmt: skip
    with tempfile.TemporaryDirectory(dir=arguments.output.parent) as folder:
        rounding.quantize_and_save(folder, format="auto_round")
        next(Path(folder).glob("**/config.json")).parent.rename(arguments.output)  # it writes into a folder of its own choice


def with_bitsandbytes(arguments: argparse.Namespace, _text: list[str]) -> None:
    if arguments.format == "bnb-int8":
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=arguments.format.removeprefix("bnb-"),
            bnb_4bit_use_double_quant=arguments.double,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(
        arguments.dense, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )
    model.save_pretrained(arguments.output)
    AutoTokenizer.from_pretrained(arguments.dense).save_pretrained(arguments.output)


def with_codebooks(arguments: argparse.Namespace, text: list[str]) -> None:
    """AQLM's format, 2x8: k-means of each layer's groups of 8 columns, then codes in GPTQ's order with its error feedback.

    AQLM's own quantizer is a research script for GPUs that also tunes what it has quantized; this is no substitute for its
    accuracy. Layers are quantized in the course of one forward, so that each sees what the quantized ones before it give.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(arguments.dense, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(arguments.dense)
    tokens = torch.cat([tokenizer(line, return_tensors="pt").input_ids[0] for line in text])
    stored, skipped = {}, []

    def quantize(name: str, module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        found = inputs[0].flatten(0, -2)
        dense = module.weight.data
        scales = dense.square().mean(1).sqrt().half()
        moments = found.T @ found / len(found)
        codes, tables = fitted(dense / scales.float().unsqueeze(1), moments, entries=256, rounds=arguments.iterations)
        stored[name + ".codes"] = codes.to(torch.int8)  # modulo 256
        stored[name + ".codebooks"] = tables.half().unsqueeze(2)
        stored[name + ".scales"] = scales.view(-1, 1, 1, 1)
        module.weight.data = summed(tables, codes).flatten(1) * scales.float().unsqueeze(1)
        error, power = ((w @ moments * w).sum() for w in (module.weight.data - dense, dense))
        print(f"{name}: {error / power:.4f} of its outputs' power is lost", flush=True)

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.register_forward_pre_hook(lambda module, inputs, name=name: quantize(name, module, inputs))
        elif isinstance(module, torch.nn.Linear):
            skipped += [name, name + ".weight"]  # transformers 5 looks for the former
    with torch.inference_mode():
        model.model(tokens[: len(tokens) // 128 * 128].view(-1, 128))
    packed = {name.rpartition(".")[0] + ".weight" for name in stored}
    floats = {name: value for name, value in model.state_dict().items() if name not in packed and name != "lm_head.weight"}
    arguments.output.mkdir(parents=True)
    save_file({**{name: value.half() for name, value in floats.items()}, **stored}, arguments.output / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    config = json.loads((arguments.dense / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "aqlm", "in_group_size": 8, "out_group_size": 1, "num_codebooks": 2, "nbits_per_codebook": 8,
        "linear_weights_not_to_quantize": skipped,
    }  # fmt: skip
    (arguments.output / "config.json").write_text(json.dumps(config, indent=2))
    tokenizer.save_pretrained(arguments.output)


def summed(tables: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """What codes (..., codebooks) stand for: (..., size)."""
    return sum((table[codes[..., i]] for i, table in enumerate(tables)), torch.zeros(()))


def nearest(vectors: torch.Tensor, weights: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The entry of each vector (n, size) for which the square of what is left, times weights (n, size), is least: (n,)."""
    return (weights @ table.square().T - 2 * (weights * vectors) @ table.T).argmin(1)


def improve(vectors: torch.Tensor, weights: torch.Tensor, tables: torch.Tensor, codes: torch.Tensor, *, fit: bool) -> None:
    """One codebook after the other: the nearest entries to what the others leave and, where asked, the entries' best places."""
    for i, table in enumerate(tables):
        left = vectors - summed(tables, codes) + table[codes[:, i]]
        codes[:, i] = nearest(left, weights, table)
        if fit:
            heavy = torch.zeros_like(table).index_add_(0, codes[:, i], weights)
            mean = torch.zeros_like(table).index_add_(0, codes[:, i], weights * left) / heavy
            table[:] = torch.where(heavy > 0, mean, table)


def fitted(weight: torch.Tensor, moments: torch.Tensor, *, entries: int, rounds: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (rows, groups, 2) and tables (2, entries, 8) for a weight (rows, columns) whose inputs have such second moments."""
    (rows, columns), size = weight.shape, 8
    moments = moments + 0.01 * moments.diagonal().mean() * torch.eye(columns)
    heed = moments.diagonal().view(1, -1, size).expand(rows, -1, size)
    vectors, weights = weight.reshape(-1, size), heed.reshape(-1, size)
    tables = torch.zeros(2, entries, size)
    tables[0] = vectors[torch.randperm(len(vectors))[:entries]]
    codes = torch.zeros(len(vectors), 2, dtype=torch.long)
    codes[:, 0] = nearest(vectors, weights, tables[0])
    tables[1] = (vectors - tables[0, codes[:, 0]])[torch.randperm(len(vectors))[:entries]]
    for _ in range(rounds):
        improve(vectors, weights, tables, codes, fit=True)
    tables, codes = tables.half().float(), codes.view(rows, -1, 2)
    feedback = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moments)), upper=True)
    weight = weight.clone()
    for group in range(columns // size):
        here, later = slice(size * group, size * (group + 1)), slice(size * (group + 1), None)
        for _ in range(3):
            improve(weight[:, here], heed[:, group], tables, codes[:, group], fit=False)
        error = weight[:, here] - summed(tables, codes[:, group])
        weight[:, later] -= error @ torch.linalg.solve(feedback[here, here], feedback[here, later])
    return codes, tables


MAKERS = {
    "aqlm": with_codebooks,
    "gptq": with_gptqmodel,
    "gptq-v2": with_gptqmodel,
    "awq": with_gptqmodel,
    "auto-round": with_autoround,
    "bnb-nf4": with_bitsandbytes,
    "bnb-fp4": with_bitsandbytes,
    "bnb-int8": with_bitsandbytes,
}


def method_of(folder: Path) -> str:
    return json.loads((folder / "config.json").read_text())["quantization_config"]["quant_method"]


def scores(arguments: argparse.Namespace) -> None:
    """The logits of `candidates` (k,) after each of `ids` (n, length), which are padded behind their `lengths` (n,)."""
    asked = load_file(arguments.prompts)
    dtype = torch.float32 if method_of(arguments.model) == "aqlm" else torch.bfloat16  # AQLM's CPU path knows no other
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype, device_map={"": "cpu"}).eval()
    found = []
    with torch.inference_mode():
        for ids, lengths in zip(asked["ids"].split(16), asked["lengths"].split(16), strict=True):
            ids = ids[:, : int(lengths.max())]
            mask = torch.arange(ids.shape[1]) < lengths.unsqueeze(1)
            last = model(ids, attention_mask=mask.long()).logits[torch.arange(len(ids)), lengths - 1]
            found.append(last[:, asked["candidates"]].float())
    save_file({"scores": torch.cat(found)}, arguments.output)


def weights(arguments: argparse.Namespace) -> None:
    """The weights (rows, columns) that the tool's own plain path makes of codes: each layer's outputs for unit vectors."""
    method = method_of(arguments.model)
    if method in ("gptq", "awq"):
        from gptqmodel import BACKEND, GPTQModel

        backend = BACKEND.AWQ_TORCH if method == "awq" else BACKEND.TORCH
        model = GPTQModel.load(str(arguments.model), backend=backend, device="cpu", dtype=torch.float16).model
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32, device_map={"": "cpu"})
    columns = {
        name: getattr(module, "in_features", getattr(module, "infeatures", None))
        for name, module in model.named_modules()
        if type(module) is not torch.nn.Linear
    }
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.dtype.is_floating_point)
    with torch.inference_mode():
        found = {name: model.get_submodule(name)(torch.eye(n, dtype=dtype)).T.float() for name, n in columns.items() if n}
    save_file({name: weight.contiguous() for name, weight in found.items()}, arguments.output)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    make = commands.add_parser("make")
    make.set_defaults(run=lambda given: MAKERS[given.format](given, given.text.read_text().splitlines()[: given.samples]))
    make.add_argument("format", choices=MAKERS)
    make.add_argument("--dense", type=Path, required=True)
    make.add_argument("--text", type=Path, required=True)
    make.add_argument("--output", type=Path, required=True)
    make.add_argument("--bits", type=int, default=4)
    make.add_argument("--group", type=int, default=64)
    make.add_argument("--asymmetric", action="store_true")
    make.add_argument("--act-order", action="store_true")
    make.add_argument("--double", action="store_true", help="quantize the scales too (bitsandbytes)")
    make.add_argument("--samples", type=int, default=128, help="lines of text to calibrate with")
    make.add_argument("--iterations", type=int, default=20, help="AutoRound's steps a block, AQLM's rounds")
    for read in (scores, weights):
        command = commands.add_parser(read.__name__)
        command.set_defaults(run=read)
        command.add_argument("--model", type=Path, required=True)
        command.add_argument("--output", type=Path, required=True)
        if read is scores:
            command.add_argument("--prompts", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
