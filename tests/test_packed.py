"""Packed folders: quantizing a dense model, reading it back, tuning it, and bad files."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from gradless import kernels
from gradless.blocks import block_type
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.folder import WEIGHTS, Folder
from gradless.formats.load import load
from gradless.formats.packed import packed_rows, quantize
from gradless.grids import GRIDS
from gradless.layers import QuantLinear, set_activations
from gradless.methods.codes import DEFAULT_STRIDE
from gradless.noise import Direction, uniform_grid
from gradless.tensor import BlockWeight, Move, TunedCodes, Views
from tests.test_cli import ONE_TOKEN, TASK


def quantized(dense, folder, *options):
    assert main(["quantize", str(dense), "--output", str(folder), *options]) == 0
    return folder


@pytest.mark.parametrize("grid", GRIDS)
def test_rounded_weights_are_nearest_on_their_grid(grid):
    weight = torch.randn(6, 128, generator=torch.Generator().manual_seed(1)) * 0.05
    for group in (32, 64, None):
        name, packed = packed_rows(weight, "w", grid, group, search=False)
        tensor = BlockWeight("w", block_type(name), packed)
        (got,) = kernels.dequantize(tensor, torch.arange(6), torch.float32)
        scale = tensor.block.field(packed, 0).repeat_interleave(tensor.block.size, 1)
        levels = torch.tensor(tensor.block.levels or GRIDS[grid].levels)
        assert ((got - weight).abs() <= scale * levels.diff().max() * 0.51).all()
        coarse = packed_rows(got, "w", grid, group, search=False)[1]
        (again,) = kernels.dequantize(BlockWeight("w", tensor.block, coarse), torch.arange(6), torch.float32)
        assert (again - got).abs().max() <= 2e-3 * got.abs().max() + scale.max() * 0.02


def test_a_range_a_row_is_one_scale_in_all_its_blocks():
    _, packed = packed_rows(torch.randn(4, 256), "w", "int8", None, search=False)
    assert (packed[:, :1, :2] == packed[..., :2]).all()


@pytest.mark.parametrize(
    "options",
    [
        ["--bits", "8"],
        ["--bits", "4", "--group-size", "32"],
        ["--bits", "4", "--grid", "uint"],
        ["--grid", "nf4"],
        ["--grid", "fp8"],
    ],
)
@pytest.mark.parametrize("method", ["quzo", "zoqo", "qzo", "nzo", "ezo"])
def test_a_packed_folder_is_tuned_and_replays_to_the_byte(dense, rows, tmp_path, options, method):
    base = quantized(dense, tmp_path / "base", *options)
    arguments = [*TASK, "--batch-size", "4", "--steps", "3", "--method", method, "--eval", str(rows)]
    more = {"quzo": ["--eps", "0.5", "--lr", "0.1"], "zoqo": ["--share", "0.2", "--lr", "1"], "qzo": ["--lr", "1e-2"]}
    more = {**more, "nzo": ONE_TOKEN}.get(method, [])
    assert main(["tune", str(base), str(rows), *arguments, *more, "--output", str(tmp_path / "run")]) == 0
    replay = ["replay", str(base), str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "again")]
    assert main(replay) == 0
    tuned, again, before = (tmp_path / name / WEIGHTS for name in ("run/model", "again", "base"))
    assert tuned.read_bytes() == again.read_bytes() != before.read_bytes()
    assert tuned.stat().st_size == before.stat().st_size
    assert sorted(f.name for f in (tmp_path / "run" / "model").iterdir()) == sorted(f.name for f in base.iterdir())
    assert load(tmp_path / "run" / "model").file.tensors.keys() == load(base).file.tensors.keys()


@pytest.mark.parametrize(
    ("activations", "grid"),
    [("int8", ["--bits", "8"]), ("int8", ["--bits", "4"]), ("fp8", ["--grid", "fp8"]), ("fp8", ["--grid", "fp8-e5m2"])],
)
@pytest.mark.parametrize("method", ["quzo", "zoqo"])
def test_tuning_with_quantized_activations(dense, rows, tmp_path, capsys, activations, grid, method):
    arguments = [str(rows), *TASK, "--batch-size", "4", "--steps", "2", "--method", method, "--eval", str(rows)]
    arguments += [
        *grid,
        "--group-size",
        "channel",
        "--activations",
        activations,
        "--share",
        "0.2",
        "--output",
        str(tmp_path / "run"),
    ]
    assert main(["tune", str(dense), *arguments]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert {"int8": "in integers", "fp8": "as 8-bit floats"}[activations] in said
    journal = str(tmp_path / "run" / "journal.db")
    assert main(["replay", str(tmp_path / "run" / "base"), journal, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "run" / "model" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("grid", ["fp8-e4m3", "fp8-e5m2"])
def test_8_bit_floats_are_multiplied_as_they_are_stored(grid):
    """The product with inputs that E4M3 holds exactly is the dense one, but for bf16's rounding of the result."""
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(1)) * 0.05
    name, packed = packed_rows(weight, "w", grid, None, search=False)
    layer = QuantLinear(BlockWeight("w", block_type(name), packed), None, torch.float32)
    layer.packed.tuned = TunedCodes()
    layer.packed.views = Views((Move(Direction(3, 1, 0, uniform_grid(2)), 1.0),))
    x = torch.randint(-8, 9, (5, 128), generator=torch.Generator().manual_seed(2)).float()
    x[:, 0], x[4] = 448.0, 0.0  # so that a token's scale is 1; a token of zeros
    expected = F.linear(x.double(), kernels.dequantize(layer.packed, torch.arange(48), torch.float32)[0].double())
    set_activations(layer, "fp8")
    assert torch.allclose(layer(x).double(), expected, rtol=2.0**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "activations", "message"),
    [
        (["--grid", "fp8"], "fp8", "--group-size channel"),
        (["--bits", "8"], "fp8", "need --grid fp8"),
        (["--grid", "nf4"], "int8", "whose codes are no integers"),
    ],
)
def test_activations_that_do_not_suit_the_weights(dense, rows, tmp_path, capsys, options, activations, message):
    base = quantized(dense, tmp_path / "base", *options)
    assert main(["eval", str(base), str(rows), *TASK, "--activations", activations]) == 1
    assert message in capsys.readouterr().err
    assert main(["eval", str(dense), str(rows), *TASK, "--activations", activations]) == 1
    assert "this model is dense" in capsys.readouterr().err
    arguments = ["tune", str(dense), str(rows), *TASK, "--method", "quzo", *options, "--activations", activations]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 1
    assert "activations need" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_bits_quantize_a_dense_folder_first(dense, rows, tmp_path):
    arguments = [str(rows), *TASK, "--batch-size", "4", "--steps", "2", "--method", "zoqo", "--output", str(tmp_path / "run")]
    assert main(["tune", str(dense), *arguments, "--bits", "8", "--share", "0.2"]) == 0
    quantized(dense, tmp_path / "same", "--bits", "8")
    assert (tmp_path / "run" / "base" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()
    assert (tmp_path / "run" / "model" / WEIGHTS).is_file()


def test_overwriting_a_run_that_quantizes_keeps_its_new_base(dense, rows, tmp_path):
    arguments = ["tune", str(dense), str(rows), *TASK, "--batch-size", "4", "--steps", "2", "--method", "zoqo", "--bits", "8"]
    arguments += ["--share", "0.2", "--output", str(tmp_path / "run")]
    assert main(arguments) == 0
    before = (tmp_path / "run" / "base" / WEIGHTS).read_bytes()
    assert main([*arguments, "--overwrite", "--labels", "0=no"]) == 1  # bad input leaves the run that is there alone
    assert main([*arguments, "--overwrite", "--bits", "4", "--hold", "--accumulate", "2"]) == 1  # refused once it is quantized
    assert (tmp_path / "run" / "base" / WEIGHTS).read_bytes() == before
    assert main([*arguments, "--overwrite", "--bits", "4"]) == 0
    assert Folder.open(tmp_path / "run" / "base").quantized["model.layers.0.mlp.up_proj.weight"].block.name == "int4/64"
    journal = str(tmp_path / "run" / "journal.db")
    assert main(["replay", str(tmp_path / "run" / "base"), journal, "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (tmp_path / "run" / "model" / WEIGHTS).read_bytes()


def test_the_input_is_never_replaced(dense, capsys):
    held = sorted(file.name for file in dense.iterdir())
    for output in (dense, dense.parent):
        assert main(["quantize", str(dense), "--bits", "4", "--output", str(output), "--overwrite"]) == 1
        assert "never the model itself" in capsys.readouterr().err
    assert sorted(file.name for file in dense.iterdir()) == held


def test_a_model_without_linear_layers_is_refused(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(GradlessError, match="no linear layer to quantize"):
        quantize(model, None, "int8", 32, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_layout_is_the_documented_one(dense, tmp_path):
    folder = quantized(dense, tmp_path / "base", "--bits", "4")
    tensors = load_file(folder / WEIGHTS)
    weight = tensors["model.layers.0.mlp.up_proj.weight"]
    assert weight.dtype is torch.uint8
    assert weight.shape == (512, 256 // 64, 2 + 64 // 2)
    assert tensors["model.norm.weight"].dtype is torch.bfloat16
    assert Folder.open(folder).quantized["model.layers.0.mlp.up_proj.weight"].block.name == "int4/64"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "9"], "it must be a whole number from 2 to 8"),
        ([], "give --bits"),
        (["--grid", "nf4", "--bits", "8"], "has 4 bits, not 8"),
        (["--bits", "4", "--group-size", "48"], "groups of 48 do not fit"),
        (["--bits", "4", "--group-size", "big"], "it is a number of weights, at most 1,048,576, or channel"),
    ],
)
def test_what_cannot_be_quantized(dense, tmp_path, capsys, options, message):
    assert main(["quantize", str(dense), "--output", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_only_dense_folders_are_quantized(dense, tiny, tmp_path, capsys):
    base = quantized(dense, tmp_path / "base", "--bits", "8")
    for source in (tiny, base):
        assert main(["quantize", str(source), "--bits", "4", "--output", str(tmp_path / "out")]) == 1
        assert "is not a dense folder" in capsys.readouterr().err
    assert main(["quantize", str(dense), "--bits", "4", "--output", str(base)]) == 1
    assert "give --overwrite" in capsys.readouterr().err


def test_info_shows_a_packed_folder(dense, tmp_path, capsys):
    folder = quantized(dense, tmp_path / "base", "--grid", "nf4")
    capsys.readouterr()
    assert main(["info", str(folder), "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["architecture"] == "llama"
    assert {row["type"]: row["bits_per_weight"] for row in shown["types"]}["nf4/64"] == 4.25
    assert shown["tunable"]["quzo"]["values"] == 64 * shown["tunable"]["qzo"]["values"] // DEFAULT_STRIDE
    assert main(["info", str(dense)]) == 1
    assert "is a folder without quantized weights" in capsys.readouterr().err


def test_damaged_folders(dense, tmp_path):
    folder = quantized(dense, tmp_path / "base", "--bits", "8")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:-9])
    with pytest.raises(GradlessError, match="is truncated"):
        load(folder)
    (folder / WEIGHTS).write_bytes(whole[:40])
    with pytest.raises(GradlessError, match="not a safetensors file"):
        load(folder)
    tensors = {"w": torch.zeros(2, 2, 34, dtype=torch.uint8)}
    save_file(tensors, folder / WEIGHTS, metadata={"gradless-packed": json.dumps({"w": "int5/7"})})
    with pytest.raises(GradlessError, match="int5/7, which this gradless does not know"):
        load(folder)
