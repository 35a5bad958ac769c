"""LoRA on the grid: what a forward adds, PEFT's and llama.cpp's files, replay."""

import json

import gguf
import pytest
import torch

from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.adapter import AdaptedModel, LoRA, adaptable, attach_peft
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.methods import METHODS
from gradless.run import load_model
from tests.test_cli import TASK, tune

IDS = torch.tensor([[7, 70, 30, 200, 5, 31]])


def adapted(path, *, rank=4, bits=8, moved=True):
    """A tiny model with adapters; `moved` gives B values too."""
    model = AdaptedModel(load_gguf(path, dtype=torch.float32), LoRA(rank, bits=bits, seed=3))
    spaces = model.spaces("codes", model.tunable("codes"), residual=True)
    if moved:
        for space in spaces:
            space.values.add_(torch.arange(space.values.numel(), dtype=torch.int16).view_as(space.values) % 41 - 20)
    return model, spaces


def logits(model):
    with torch.inference_mode():
        return model(IDS).logits


def test_adapters_begin_where_the_base_is_and_have_room(tiny):
    model, spaces = adapted(tiny, moved=False)
    assert torch.equal(logits(model.model), logits(load_gguf(tiny, dtype=torch.float32).model))
    assert len(spaces) == 2 * 7 * 2
    for a, b in zip(spaces[::2], spaces[1::2], strict=True):
        assert a.scale == b.scale
        assert not b.values.any()
        assert a.values.abs().max() <= 64 <= a.grid.highest


def test_the_peft_folder_gives_peft_the_same_model(tiny, tmp_path):
    peft = pytest.importorskip("peft")
    model, _ = adapted(tiny)
    ours = logits(model.model)
    model.save(tmp_path / "adapter", [])
    base = load_gguf(tiny, dtype=torch.float32)
    before = logits(base.model)
    attach_peft(base, tmp_path / "adapter")
    assert torch.equal(logits(base.model), ours)
    theirs = peft.PeftModel.from_pretrained(dequantized(load_gguf(tiny)).float(), tmp_path / "adapter")
    assert (ours - before).abs().max() > 0.1
    assert (logits(theirs) - ours).abs().max() < 0.05 * (ours - before).abs().max()


def test_the_gguf_adapter_follows_the_files_rows(tiny, tmp_path):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter", [])
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    held = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    layers = adaptable(model.base)
    assert len(held) == 2 * len(layers)
    for adapter in model.adapters.values():
        tensor = layers[adapter.path].packed
        assert torch.equal(held[f"{tensor.name}.lora_a"], adapter.a.shown())
        assert torch.equal(held[f"{tensor.name}.lora_b"][tensor.file_rows], adapter.b.shown())
    assert any(layer.packed.row_order is not None for layer in layers.values())


@pytest.mark.parametrize("method", ["quzo", "zoqo"])
@pytest.mark.parametrize("bits", [8, 4])
def test_factors_are_on_their_grid_after_every_step(tiny, method, bits):
    model, spaces = adapted(tiny, bits=bits, moved=False)
    optimizer = METHODS[method](spaces, lr=1.5, eps=2.0)
    for _ in range(3):
        optimizer.step(lambda: float(logits(model.model).square().mean()))
        for space in spaces:
            codes = space.shown() / space.scale
            assert torch.equal(codes.round(), space.values.float())
            assert space.values.abs().max() <= 2 ** (bits - 1) - 1
    assert optimizer.moved > 0


@pytest.mark.parametrize("method", ["quzo", "zoqo"])
def test_a_run_on_adapters_replays_to_the_byte_and_is_measured(tiny, rows, tmp_path, capsys, method):
    output = tmp_path / "run"
    assert tune(tiny, rows, output, "--method", method, "--lora", "4", "--eval", str(rows), "--json") == 0
    after = json.loads(capsys.readouterr().out)["after"]
    assert not (output / "model.gguf").exists()
    again = tmp_path / "again"
    assert main(["replay", str(tiny), str(output / "journal.db"), "--output", str(again), "--json"]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (again / name).read_bytes() == (output / "adapter" / name).read_bytes()
    assert (tmp_path / "again.gguf").read_bytes() == (output / "adapter.gguf").read_bytes()
    capsys.readouterr()
    measure = ["eval", str(tiny), str(rows), *TASK, "--batch-size", "4", "--adapter", str(output / "adapter"), "--json"]
    assert main(measure) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == pytest.approx(after["loss"], abs=1e-6)


def test_a_dense_folder_gets_adapters_too(tiny, rows, tmp_path):
    dense = tmp_path / "dense"
    assert main(["dequantize", str(tiny), "--output", str(dense)]) == 0
    assert tune(dense, rows, tmp_path / "plain", "--method", "zoqo", "--lora", "2") == 0
    assert tune(dense, rows, tmp_path / "first", "--method", "zoqo", "--bits", "8", "--group-size", "32", "--lora", "2") == 0
    assert (tmp_path / "first" / "base").is_dir()
    for name in ("plain", "first"):
        assert (tmp_path / name / "adapter" / "adapter_config.json").is_file()
        assert not (tmp_path / name / "adapter.gguf").exists()


def test_adapters_that_do_not_fit(tiny, rows, tmp_path, capsys):
    loaded = load_model(tiny)
    with pytest.raises(GradlessError, match="holds no adapter that can be read"):
        attach_peft(loaded, tmp_path)
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter", [])
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("LORA", "IA3"))
    with pytest.raises(GradlessError, match="holds a IA3 adapter; gradless reads plain LORA"):
        attach_peft(loaded, tmp_path / "adapter")
    first = next(iter(model.adapters.values()))
    for letter, space in zip("AB", (first.a, first.b), strict=True):
        space.name = f"model.layers.9.mlp.up_proj.lora_{letter}.weight"
    model.save(tmp_path / "other", [])
    with pytest.raises(GradlessError, match=r"does not fit this model: no linear layer model\.layers\.9"):
        attach_peft(loaded, tmp_path / "other")
    assert tune(tiny, rows, tmp_path / "run", "--method", "qzo", "--lora", "4") == 1
    assert "lora is for adapters on a grid, which quzo and zoqo tune" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "value"), [("use_dora", True), ("rank_pattern", {"q_proj": 2}), ("bias", "all")])
def test_adapters_with_more_than_factors_are_refused(tiny, tmp_path, key, value):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter", [])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(GradlessError, match=f"a LORA adapter with {key}"):
        attach_peft(load_gguf(tiny), tmp_path / "adapter")


@pytest.mark.parametrize("bits", [2, 3])
def test_the_shortest_grids_hold_an_adapter_too(tiny, bits):
    _, spaces = adapted(tiny, bits=bits, moved=False)
    assert all(a.values.any() for a in spaces[::2])


def test_a_replay_never_replaces_what_it_reads(tiny, rows, tmp_path, capsys):
    base = tmp_path / "base.gguf"
    base.write_bytes(tiny.read_bytes())
    run = tmp_path / "run"
    assert tune(base, rows, run, "--method", "zoqo", "--lora", "2") == 0
    journal = str(run / "journal.db")
    for output in ("base", "base.gguf", "run", "run/journal.db", "."):
        assert main(["replay", str(base), journal, "--output", str(tmp_path / output), "--overwrite"]) == 1
        assert "is, or holds, what the replay reads" in capsys.readouterr().err
    (tmp_path / "other").mkdir()
    assert main(["replay", str(base), journal, "--output", str(tmp_path / "other"), "--overwrite"]) == 1
    assert "is a folder that holds no model" in capsys.readouterr().err
    assert base.read_bytes() == tiny.read_bytes()


def test_an_overwrite_that_cannot_run_keeps_the_old_run(tiny, rows, tmp_path):
    output = tmp_path / "run"
    assert tune(tiny, rows, output, "--method", "quzo") == 0
    held = {path.name: path.read_bytes() for path in output.iterdir()}
    assert tune(tiny, rows, output, "--method", "quzo", "--eps", "1e-9", "--overwrite") == 1
    assert {path.name: path.read_bytes() for path in output.iterdir()} == held
