"""The planner: what it takes from files, what it adds up, and bad input."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig

from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.folder import Folder
from gradless.formats.gguf import GGUFFile
from gradless.memory import FIRST_ORDER, RANK, need, shapes_of, shapes_of_config
from gradless.methods.codes import DEFAULT_STRIDE
from gradless.methods.registry import RECIPES
from gradless.spaces import CodeSpace, parameter_sites

LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=96
)
OPT = OPTConfig(hidden_size=64, ffn_dim=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=96, word_embed_proj_dim=64)
PARTS = ["weights", "gradients", "states", "activations", "logits", "scratch"]


def planned(capsys, *arguments):
    assert main(["plan", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


METHODS = (*FIRST_ORDER, *RECIPES)


@pytest.mark.parametrize("method", METHODS)
def test_parts_add_up_and_grow_with_the_batch(tiny, method):
    small, large = (need(method, shapes_of(tiny), batch_size=size, length=32) for size in (2, 8))
    assert small.total == sum(getattr(small, part) for part in PARTS)
    assert (large.activations, large.logits) == (4 * small.activations, 4 * small.logits)
    assert all(getattr(large, part) == getattr(small, part) for part in ("weights", "gradients", "states", "scratch"))


def test_what_a_gguf_holds(tiny):
    file, shapes = GGUFFile.open(tiny), shapes_of(tiny)
    linear = [file.quantized[name] for name in file.linear_layers()]
    for tensor in linear:
        tensor.tune("scale")
    scales = sum(tensor.tuned_values.values.nbytes for tensor in linear)
    codes = sum(CodeSpace(tensor, stride=DEFAULT_STRIDE).codes for tensor in linear)
    at = {"batch_size": 1, "length": 1}
    qzo, quzo = need("qzo", shapes, **at), need("quzo", shapes, **at)
    assert qzo.weights == quzo.weights == sum(info.nbytes for info in file.tensors.values())
    assert qzo.states == scales
    assert quzo.states == codes


@pytest.mark.parametrize("options", [[], ["--bits", "8"], ["--bits", "2", "--group-size", "128"]])
def test_a_dense_model_is_planned_as_quantize_packs_it(dense, tmp_path, capsys, options):
    bits = options or ["--bits", "4"]
    assert main(["quantize", str(dense), "--output", str(tmp_path / "packed"), *bits]) == 0
    capsys.readouterr()
    file = Folder.open(tmp_path / "packed")
    before, from_json = (planned(capsys, path, *options) for path in (dense, dense / "config.json"))
    after = planned(capsys, tmp_path / "packed")
    assert before["methods"] == from_json["methods"] == after["methods"]
    assert before["packed"] == sum(info.nbytes for info in file.tensors.values())


def test_parameters_and_adapters(dense):
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    shapes = shapes_of(dense)
    assert shapes.parameters == sum(parameter.numel() for parameter in model.parameters())
    layers = [getattr(*sites[0]) for sites in parameter_sites(model).values()]
    adapters = 4 * RANK * sum(sum(weight.shape) for weight in layers)
    lora = need("lora", shapes, batch_size=1, length=1)
    assert lora.weights == sum(parameter.nbytes for parameter in model.parameters()) + adapters
    assert (lora.gradients, lora.states) == (adapters, 2 * adapters)
    adamw = need("adamw", shapes, batch_size=1, length=1)
    assert adamw.weights + adamw.gradients + adamw.states == 16 * shapes.parameters


@pytest.mark.parametrize("config", [LLAMA, OPT], ids=["llama", "opt"])
def test_activations_are_about_what_autograd_keeps(config):
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    parameters, kept = {parameter.data_ptr() for parameter in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        held = model.model(torch.ones(4, 32, dtype=torch.int64), use_cache=False)
    assert held is not None
    predicted = need("adamw", shapes_of_config(config, "", group_size=32), batch_size=4, length=32).activations
    assert 2 / 3 < predicted / sum(kept.values()) < 3 / 2


def test_the_command_line(tiny, capsys):
    plan = planned(capsys, tiny, "--methods", "qzo, adamw", "--batch-size", "2", "--length", "16")
    assert set(plan) == {"name", "parameters", "packed", "batch_size", "length", "methods"}
    assert [*plan["methods"]] == ["qzo", "adamw"]
    assert set(plan["methods"]["qzo"]) == {*PARTS, "total", "ratio"}
    totals = {name: row["total"] for name, row in plan["methods"].items()}
    assert plan["methods"]["qzo"]["ratio"] == totals["qzo"] / totals["adamw"]
    assert [*planned(capsys, tiny)["methods"]] == [*METHODS]
    assert main(["plan", str(tiny)]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {method} " in text for method in METHODS)
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    text = capsys.readouterr().out
    assert all(method in text for method in METHODS)
    assert "examples:\n  gradless plan" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no nowhere; give a GGUF file, a model's folder, or its config.json"),
        (["{folder}"], "there is no {folder}/config.json; give"),
        (["{folder}/notes.txt"], "is not a GGUF file"),
        (["{folder}/empty.json"], "is no configuration that transformers can read"),
        (["{tiny}", "--bits", "4"], "is quantized already; leave --bits and --group-size out"),
        (["{tiny}", "--methods", "qzo,magic"], "there is no method 'magic' to plan for; there are adamw, "),
        (["{tiny}", "--length", "0"], "the length is 0"),
        (["{tiny}", "--batch-size", "-1"], "the batch size is -1"),
        (["{dense}", "--bits", "9"], "--bits is 9; codes have 2 to 8"),
        (["{dense}", "--group-size", "48"], "groups of 48 do not fit"),
    ],
)
def test_bad_input_is_one_sentence(tiny, dense, tmp_path, capsys, arguments, message):
    (tmp_path / "notes.txt").write_text("no model")
    (tmp_path / "empty.json").write_text("{}")
    places = {"folder": tmp_path, "tiny": tiny, "dense": dense}
    assert main(["plan", *(argument.format(**places) for argument in arguments)]) == 1
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert error.count("\n") == 1


def test_a_gguf_without_packed_layers(tmp_path):
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(str(tmp_path / "float.gguf"), "llama")
    writer.add_tensor("token_embd.weight", np.zeros((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GradlessError, match="has no quantized linear layer"):
        shapes_of(tmp_path / "float.gguf")
