"""LoRA on the grid: what a forward adds, PEFT's and llama.cpp's files, replay."""

import json
from dataclasses import fields

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.adapter import AdaptedModel, LoRA, adaptable, attach_peft
from gradless.formats.dense import DenseModel
from gradless.formats.gguf_model import load_gguf
from gradless.formats.load import load
from gradless.formats.peft_config import OFF, PLAIN, RECORDS, USED, read_config
from gradless.formats.quantized import dequantized
from gradless.methods.registry import RECIPES
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
    model.save(tmp_path / "adapter")
    base = load_gguf(tiny, dtype=torch.float32)
    before = logits(base.model)
    attach_peft(base, tmp_path / "adapter")
    assert torch.equal(logits(base.model), ours)
    theirs = peft.PeftModel.from_pretrained(dequantized(load_gguf(tiny)).float(), tmp_path / "adapter")
    assert (ours - before).abs().max() > 0.1
    assert (logits(theirs) - ours).abs().max() < 0.05 * (ours - before).abs().max()


def test_the_gguf_adapter_follows_the_files_rows(tiny, tmp_path):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
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
    optimizer = RECIPES[method].method()(spaces, lr=1.5, eps=2.0)
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
    loaded = load(tiny)
    with pytest.raises(GradlessError, match="holds no adapter that can be read"):
        attach_peft(loaded, tmp_path)
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace("LORA", "IA3"))
    with pytest.raises(GradlessError, match="holds a IA3 adapter; gradless reads plain LORA"):
        attach_peft(loaded, tmp_path / "adapter")
    first = next(iter(model.adapters.values()))
    for letter, space in zip("AB", (first.a, first.b), strict=True):
        space.name = f"model.layers.9.mlp.up_proj.lora_{letter}.weight"
    model.save(tmp_path / "other")
    with pytest.raises(GradlessError, match=r"does not fit this model: no linear layer model\.layers\.9"):
        attach_peft(loaded, tmp_path / "other")
    assert tune(tiny, rows, tmp_path / "run", "--method", "qzo", "--lora", "4") == 1
    assert "lora is for adapters on a grid, which quzo and zoqo tune" in capsys.readouterr().err


ON_AND_OFF = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"up_proj": 2, r"layers\.0\.self_attn\.q_proj": 6, "^model.layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"q_proj|k_proj": 40, ".*mlp.up_proj": 5},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 8}, "alpha_pattern": {"v_proj": 100}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["k_proj"], "lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian", "fan_in_fan_out": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
}


def peft_folder(path, dense, *, move=True, **more):
    """What PEFT saves of a LoRA adapter on all linear layers of the dense model, and the logits that it gives there."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = {"r": 4, "lora_alpha": 16, "target_modules": names, "task_type": "CAUSAL_LM", **more}
    model = peft.get_peft_model(base, peft.LoraConfig(**config)).eval()
    if move:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(path)
    return logits(model)


def changed(folder, **keys):
    """Set keys of an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


@pytest.mark.parametrize("more", ON_AND_OFF.values(), ids=ON_AND_OFF)
def test_peft_gives_the_same_logits(dense, tmp_path, more):
    theirs = peft_folder(tmp_path / "adapter", dense, **more)
    base = DenseModel.load(dense, dtype=torch.float32)
    before = logits(base.model)
    attach_peft(base, tmp_path / "adapter")
    assert (theirs - before).abs().max() > 0.05
    assert torch.allclose(logits(base.model), theirs, atol=1e-5)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_an_adapter_whose_base_was_changed_is_refused_and_a_converted_one_is_read(dense, tmp_path, start):
    peft_folder(tmp_path / "adapter", dense, move=False, init_lora_weights=start)
    with pytest.raises(GradlessError, match=f"init_lora_weights '{start}'.*path_initial_model_for_weight_conversion"):
        attach_peft(DenseModel.load(dense), tmp_path / "adapter")


def test_a_converted_pissa_adapter_changes_nothing_before_it_is_trained(dense, tmp_path):
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = transformers.AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "up_proj"]))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    loaded = DenseModel.load(dense, dtype=torch.float32)
    before = logits(loaded.model)
    attach_peft(loaded, tmp_path / "adapter")
    assert torch.allclose(logits(loaded.model), before, atol=1e-5)


def test_every_key_of_the_installed_peft_is_in_the_account():
    peft = pytest.importorskip("peft")
    lists = (USED, RECORDS, frozenset(PLAIN), OFF)
    assert {each.name for each in fields(peft.LoraConfig)} <= frozenset().union(*lists)
    assert sum(map(len, lists)) == len(frozenset().union(*lists)), "a key is in one list"


REFUSED = {
    "use_dora": True,
    "bias": "all",
    "rank_pattern": {"q_proj": 2},
    "lora_bias": True,
    "layer_replication": [[0, 2]],
    "alora_invocation_tokens": [5, 7],
    "use_qalora": True,
    "trainable_token_indices": [1],
    "target_parameters": ["mlp.experts.gate_up_proj"],
    "modules_to_save": ["lm_head"],
    "init_lora_weights": "loftq",
    "task_type": "SEQ_CLS",
    "kasa_config": {"beta": 0.1},
    "megatron_config": {"tp": 2},
    "a_key_of_tomorrow": 1,
    "alpha_pattern": {"(a+)+": 3},
    "use_rslora": "yes",
    "r": 0,
    "lora_alpha": float("nan"),
    "target_modules": [1],
}


@pytest.mark.parametrize("key", REFUSED)
def test_adapters_with_more_than_factors_are_refused(tiny, tmp_path, key):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    changed(tmp_path / "adapter", **{key: REFUSED[key]})
    with pytest.raises(GradlessError, match=f"a LORA adapter with {key} "):
        attach_peft(load_gguf(tiny), tmp_path / "adapter")


def test_what_a_newer_peft_leaves_off_is_no_reason_to_refuse(tiny, tmp_path):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    changed(tmp_path / "adapter", key_of_tomorrow=None, other=False, more=[], last={}, peft_version="9.0", qalora_group_size=16)
    assert read_config(tmp_path / "adapter").factor_of("model.layers.0.mlp.up_proj") == 16


def rewritten(folder, change):
    """Change the names and values of an adapter's tensors."""
    path = folder / "adapter_model.safetensors"
    save_file({name: values.clone().contiguous() for name, values in change(load_file(path)).items()}, path)


UP = "base_model.model.model.layers.0.mlp.up_proj"
TENSORS = {
    "a magnitude": (lambda t: {**t, f"{UP}.lora_magnitude_vector": torch.ones(3)}, "1 tensors beside LoRA's factors"),
    "an embedding": (lambda t: {**t, "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 3)}, "beside LoRA"),
    "a whole module": (lambda t: {**t, "base_model.model.lm_head.weight": torch.ones(4, 3)}, "lm_head.weight first"),
    "a base layer": (lambda t: {**t, f"{UP}.base_layer.weight": torch.ones(4, 3)}, "base_layer.weight first"),
    "a bias": (lambda t: {**t, f"{UP}.lora_B.bias": torch.ones(4)}, "lora_B.bias first"),
    "no number": (lambda t: {**t, f"{UP}.lora_A.weight": t[f"{UP}.lora_A.weight"] * float("nan")}, "no finite floats"),
    "infinity": (lambda t: {**t, f"{UP}.lora_B.weight": t[f"{UP}.lora_B.weight"] / 0}, "no finite floats"),
    "integers": (lambda t: {**t, f"{UP}.lora_B.weight": t[f"{UP}.lora_B.weight"].int()}, "no finite floats"),
    "half a pair": (lambda t: {n: v for n, v in t.items() if n != f"{UP}.lora_A.weight"}, "takes lora_B"),
    "a missing layer": (lambda t: {n: v for n, v in t.items() if not n.startswith(UP)}, "lacks the factors of 1 layers"),
    "another rank": (lambda t: {n: v.repeat(2, 1) if "lora_A" in n else v.repeat(1, 2) for n, v in t.items()}, "with r 4 for"),
    "two adapters": (
        lambda t: {n.replace("weight", f"{'x' if '.0.' in n else 'y'}.weight"): v for n, v in t.items()},
        "2 adapters",
    ),
    "one layer twice": (lambda t: {**t, **{n.removeprefix("base_model.model."): v for n, v in t.items()}}, "twice"),
    "a scalar": (lambda t: {**t, f"{UP}.lora_A.weight": torch.tensor(1.0)}, r"takes lora_A \(\)"),
    "nothing": (lambda t: {}, "would change nothing"),  # noqa: ARG005
}


@pytest.mark.parametrize("case", TENSORS)
def test_every_tensor_of_an_adapter_has_a_place(tiny, tmp_path, case):
    change, says = TENSORS[case]
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", change)
    loaded = load_gguf(tiny)
    with pytest.raises(GradlessError, match=says):
        attach_peft(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded.model), logits(load_gguf(tiny).model)), "no layer was changed"


NAMES = {
    "an adapter's name": lambda name: name.replace(".weight", ".default.weight"),
    "no prefix": lambda name: name.removeprefix("base_model.model."),
    "a part of a wrapper": lambda name: name.replace("model.model.model.", "model.model.model.language_model."),
    "an older wrapper": lambda name: name.replace("_model.model.", "_model.model.language_model."),
}


@pytest.mark.parametrize("case", NAMES)
def test_names_that_say_the_same_are_read(tiny, tmp_path, case):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    rewritten(tmp_path / "adapter", lambda tensors: {NAMES[case](name): values for name, values in tensors.items()})
    loaded = load_gguf(tiny, dtype=torch.float32)
    attach_peft(loaded, tmp_path / "adapter")
    assert torch.equal(logits(loaded.model), logits(model.model))


def test_what_is_no_adapter_folder(tiny, tmp_path):
    model, _ = adapted(tiny)
    model.save(tmp_path / "adapter")
    loaded, folder = load_gguf(tiny), tmp_path / "adapter"
    with pytest.raises(GradlessError, match=r"adapter.gguf is a file; give the PEFT folder"):
        attach_peft(loaded, tmp_path / "adapter.gguf")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(GradlessError, match="a pickle, which runs code"):
        attach_peft(loaded, folder)
    for text in ("[1]", "{", "[" * 100_000, '{"peft_type": "LORA", "r": ' + "9" * 5000 + "}", b"\xff".decode("latin-1")):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(GradlessError, match="holds no adapter that can be read"):
            attach_peft(loaded, folder)


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
        assert "is, or contains, an input of the replay" in capsys.readouterr().err
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
