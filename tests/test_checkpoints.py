"""Folders in GPTQ's, AWQ's, AutoRound's and bitsandbytes' formats: read, tuned, written and refused."""

import json
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from gradless import kernels
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.bitsandbytes import STATE
from gradless.formats.folder import LAYOUTS, Folder
from gradless.formats.load import load
from gradless.formats.quantized import dequantized
from gradless.formats.words import pack_words, unpack_words
from gradless.noise import Direction
from gradless.spaces import CodeSpace
from gradless.tensor import Move, Views
from tests.checkpoint_folders import CODED, FORMATS, quantized_folder, stream, write_shards
from tests.test_cli import ONE_TOKEN, TASK

LAYER = "model.layers.1.mlp.down_proj"


def weights_of(file: Folder) -> dict[str, torch.Tensor]:
    """What the file's own weights are, in the model's order of columns: fp32."""
    found = {}
    for name, tensor in file.quantized.items():
        (weight,) = kernels.dequantize(tensor, torch.arange(tensor.rows), torch.float32)
        order = tensor.column_order
        found[name] = weight if order is None else torch.empty_like(weight).index_copy_(1, order, weight)
    return found


def contents(folder):
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@settings(max_examples=60)
@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(1, 5), st.integers(0, 99))
def test_codes_lie_in_words_one_after_the_other(bits, n, m, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (m, 32 * n)).astype(np.uint8)
    words = torch.from_numpy(stream(codes, bits).T.copy())
    assert torch.equal(pack_words(torch.from_numpy(codes.T.copy()), bits), words)
    assert torch.equal(unpack_words(words, bits), torch.from_numpy(codes.T.copy()))


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_what_the_format_says(dense, tmp_path, name):
    expected = quantized_folder(dense, tmp_path / "base", name)
    weights = weights_of(Folder.open(tmp_path / "base"))
    assert weights.keys() == expected.keys()
    for key, weight in weights.items():
        assert torch.allclose(weight, expected[key], rtol=1e-6, atol=1e-8), key


@pytest.mark.parametrize("name", ["gptq-4 in act-order", "awq", "nf4, nested", "int8", "aqlm 2x8"])
def test_the_model_computes_with_these_weights(dense, tmp_path, name):
    quantized_folder(dense, tmp_path / "base", name)
    loaded = load(tmp_path / "base")
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        ours, theirs = (model(ids, use_cache=False).logits.float() for model in (loaded.model, dequantized(loaded)))
    assert torch.allclose(ours, theirs, atol=0.02 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("shards", [1, 3])
def test_untouched_in_is_byte_identical_out(dense, tmp_path, name, shards):
    quantized_folder(dense, tmp_path / "base", name, shards=shards)
    Folder.open(tmp_path / "base").export(tmp_path / "out")
    names = sorted(file.name for file in (tmp_path / "base").iterdir())
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == names
    for file in names:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_tuned_by_nothing_keeps_its_bits(dense, tmp_path, name):
    """Scales and codes go through our blocks and back."""
    quantized_folder(dense, tmp_path / "base", name)
    for part in ("scale", "code" if name in CODED else "codebook"):
        file = Folder.open(tmp_path / "base")
        for tensor in file.quantized.values():
            CodeSpace(tensor) if part == "code" else tensor.tune(part)
        file.export(tmp_path / "out")
        assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


SCALES = {"scales", "weight.absmax", "SCB"}
CHANGED = {"qzo": SCALES, "nzo": SCALES, "ezo": SCALES, "quzo": {"qweight", "weight"}, "zoqo": {"qweight", "weight"}}


@pytest.mark.parametrize(
    ("name", "method"), [(name, method) for name in FORMATS for method in CHANGED if name in CODED or CHANGED[method] is SCALES]
)
def test_a_folder_is_tuned_and_replays_to_the_byte(dense, rows, tmp_path, name, method):
    quantized_folder(dense, tmp_path / "base", name, shards=2)
    more = {"qzo": ["--lr", "1e-2"], "quzo": ["--eps", "0.5", "--lr", "0.1"], "zoqo": ["--share", "0.2", "--lr", "1"]}
    more = {**more, "nzo": ONE_TOKEN}.get(method, [])
    arguments = [str(rows), *TASK, "--batch-size", "4", "--steps", "3", "--method", method, *more]
    assert main(["tune", str(tmp_path / "base"), *arguments, "--output", str(tmp_path / "run")]) == 0
    journal = str(tmp_path / "run" / "journal.db")
    assert main(["replay", str(tmp_path / "base"), journal, "--output", str(tmp_path / "again")]) == 0
    before, tuned, again = (contents(tmp_path / folder) for folder in ("base", "run/model", "again"))
    assert all(torch.equal(tuned[key], again[key]) for key in tuned)
    changed = {key for key in before if not torch.equal(before[key], tuned[key])}
    assert changed
    for key in before:
        assert (tuned[key].dtype, tuned[key].shape) == (before[key].dtype, before[key].shape)
    assert all(any(key.endswith("_proj." + part) for part in CHANGED[method]) for key in changed)
    assert (tmp_path / "run/model/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()


@pytest.mark.parametrize(
    ("name", "part"),
    [
        *((name, part) for name in ("gptq-3", "awq", "nf4", "fp4", "nf4, nested", "int8") for part in ("scale", "code")),
        *((name, part) for name in ("aqlm 2x8", "aqlm 1x12") for part in ("scale", "codebook")),
    ],
)
def test_what_was_tuned_is_what_the_new_folder_holds(dense, tmp_path, name, part):
    quantized_folder(dense, tmp_path / "base", name)
    loaded = load(tmp_path / "base")
    names = list(loaded.file.quantized)
    spaces = loaded.spaces("codes", names) if part == "code" else loaded.spaces("blocks", names, part=part)
    for tensor, space in zip(loaded.file.quantized.values(), spaces, strict=True):
        if part != "code":
            values = tensor.tuned_values.values
            values.mul_(1 + 0.1 * torch.rand(values.shape, generator=torch.Generator().manual_seed(0)))
            values.copy_(loaded.file.saved(tensor))
        else:
            blocks = tensor.packed.flatten(0, 1)
            codes = tensor.block.unpack(blocks).codes.flatten(1)
            blocks.copy_(tensor.block.pack(blocks, (codes + 1).clamp(*tensor.block.codes)))
        assert space.name == tensor.name
    loaded.file.export(tmp_path / "out")
    tuned, again = (weights_of(file) for file in (loaded.file, Folder.open(tmp_path / "out")))
    for key, weight in tuned.items():
        assert torch.equal(weight, again[key]), key


@pytest.mark.parametrize("part", ["scale", "codebook"])
def test_sides_of_a_query_on_codebooks_are_those_of_two_forwards(dense, tmp_path, part):
    quantized_folder(dense, tmp_path / "base", "aqlm 2x8")
    file = Folder.open(tmp_path / "base")
    tensor = file.quantized[f"{LAYER}.weight"]
    tensor.tune(part)
    move, rows = Move(Direction(1, 2), 0.1), torch.tensor([3, 0, 7])
    x = torch.randn(2, 5, tensor.columns, generator=torch.Generator().manual_seed(0))
    sides = []
    for side in (move, move._replace(coefficient=-0.1)):
        tensor.views = Views((side,))
        sides.append(kernels.dequantize(tensor, rows, torch.float32)[0])
        expected = x[len(sides) - 1] @ sides[-1].T
        assert torch.allclose(kernels.linear(tensor, rows, x[len(sides) - 1 : len(sides)])[0], expected, rtol=1e-4, atol=1e-5)
    tensor.views = Views((move, move._replace(coefficient=-0.1)))
    assert torch.equal(kernels.dequantize(tensor, rows, torch.float32), torch.stack(sides))
    assert torch.allclose(kernels.linear(tensor, rows, x), x @ torch.stack(sides).mT, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(sides[0], sides[1])


def test_codes_of_vectors_are_not_tuned(dense, rows, tmp_path, capsys):
    quantized_folder(dense, tmp_path / "base", "aqlm 2x8")
    assert main(["tune", str(tmp_path / "base"), str(rows), *TASK, "--method", "quzo", "--output", str(tmp_path / "run")]) == 1
    assert "quzo tunes integer codes, and this model has none" in " ".join(capsys.readouterr().err.split())


def broken(dense, tmp_path, name, change):
    """A folder in which `change` did something to the tensors."""
    quantized_folder(dense, tmp_path / "base", name)
    tensors = contents(tmp_path / "base")
    change(tensors)
    write_shards(tmp_path / "base", tensors)
    return tmp_path / "base"


def set_first(part, value):
    return lambda tensors: tensors[f"{LAYER}.{part}"].view(-1)[:1].fill_(value)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("gptq-4", set_first("g_idx", 99), "g_idx names groups beyond 0 .. 7"),
        ("gptq-4", set_first("g_idx", 1), "groups that are not of 64 columns each"),
        ("gptq-4", set_first("scales", float("nan")), "a scale that is not a finite number"),
        ("awq", set_first("scales", float("inf")), "a scale that is not a finite number"),
        ("nf4", set_first("weight.absmax", float("nan")), "a scale that is not a finite number"),
        ("int8", set_first("SCB", float("nan")), "a scale that is not a finite number"),
        ("gptq-4", lambda t: t.pop(f"{LAYER}.qzeros"), f"has no qzeros for {LAYER}.weight"),
        ("nf4", lambda t: t.pop(f"{LAYER}.weight.quant_map"), f"has no weight.quant_map for {LAYER}.weight"),
        ("gptq-4", lambda t: t.update({f"{LAYER}.scales": t[f"{LAYER}.scales"][:4].clone()}), "its scales are for 4 x 256"),
        ("gptq-4", lambda t: t.pop("model.norm.weight"), "has no tensor for model.norm.weight"),
        ("int8", lambda t: t.update({f"{LAYER}.SCB": t[f"{LAYER}.SCB"][:4].clone()}), "has 256 rows, but 4 scales"),
        ("nf4", set_first("weight.quant_map", -0.9), "a quant_map that is not nf4's"),
        ("nf4", set_first(f"{STATE}nf4", 0), "are not bitsandbytes, nf4"),
        ("awq", lambda t: t.update({f"{LAYER}.qweight": t[f"{LAYER}.qweight"].flatten()}), "are not AWQ, 4 bits"),
        ("aqlm 2x8", lambda t: t.update({f"{LAYER}.codes": t[f"{LAYER}.codes"].flatten()}), "are not AQLM, 2x8"),
    ],
)
def test_contradictions_are_refused(dense, tmp_path, name, change, message):
    with pytest.raises(GradlessError, match=message):
        load(broken(dense, tmp_path, name, change))


def test_a_layer_of_another_shape_than_the_configuration_says(dense, tmp_path):
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    (tmp_path / "base" / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(GradlessError, match="the model's configuration says"):
        load(tmp_path / "base")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "quip"}, "is quantized by quip; supported are GGUF files and " + ", ".join(LAYOUTS)),
        ({"bits": 5}, "GPTQ of 5 bits; supported are 2, 3, 4, 8"),
        ({"checkpoint_format": "marlin"}, "GPTQ in the format marlin"),
        ({"dynamic": {"+:.*down.*": {"bits": 8}}}, "differ between layers"),
        ({"quant_method": "awq", "version": "gemv"}, "AWQ in gemv order"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8"}, "AutoRound packed as auto_round:fp8"),
        ({"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "af4"}, "4-bit type af4 is not known"),
    ],
)
def test_formats_that_are_not_supported(dense, tmp_path, change, message):
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config["quantization_config"] |= change
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(GradlessError, match=message):
        load(tmp_path / "base")


def test_a_missing_shard_and_a_pickle(dense, tmp_path):
    quantized_folder(dense, tmp_path / "base", "gptq-4", shards=3)
    shard = tmp_path / "base" / "model-00002-of-00003.safetensors"
    shard.unlink()
    with pytest.raises(GradlessError, match=f"{shard.name} is missing"):
        load(tmp_path / "base")
    for file in (tmp_path / "base").glob("model*"):
        file.unlink()
    (tmp_path / "base" / "pytest_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(GradlessError, match=r"as a pickle \(pytest_model.bin\)"):
        load(tmp_path / "base")


def test_info_and_plan_of_a_folder(dense, tmp_path, capsys):
    quantized_folder(dense, tmp_path / "base", "gptq-3", shards=2)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "base"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"] == sum(file.stat().st_size for file in (tmp_path / "base").glob("*.safetensors"))
    assert found["format"] == "GPTQ, 3 bits, groups of 64"
    assert found["types"][0]["type"] == "uint3/64+zero"
    assert found["tunable"]["qzo"]["values"] == sum(t.numel() for n, t in contents(tmp_path / "base").items() if "scales" in n)
    capsys.readouterr()
    assert main(["plan", str(tmp_path / "base"), "--methods", "qzo", "--json"]) == 0
    held = Folder.open(tmp_path / "base")
    expected = sum(tensor.packed.nbytes for tensor in held.quantized.values())
    expected += sum(held.tensors[name].nbytes for name in held.floats)
    assert json.loads(capsys.readouterr().out)["packed"] == expected
