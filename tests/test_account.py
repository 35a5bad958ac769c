"""The account of a load: what has no place or no source is refused, what is proven harmless is noted, and nothing is lost."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from gradless import kernels
from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.account import harmless
from gradless.formats.adapter import adaptable
from gradless.formats.dense import DenseModel
from gradless.formats.folder import Folder, identity
from gradless.formats.load import load
from gradless.formats.quantized import dequantized, restore_buffers
from gradless.targets import Targets
from tests.checkpoint_folders import GROUP, gptq, quantized_folder, stream, write_shards

Q = "model.layers.0.self_attn.q_proj"
ROTARY = "model.layers.0.self_attn.rotary_emb.inv_freq"
FREQUENCIES = 1 / 10000 ** (torch.arange(0, 64, 2) / 64)
IDS = torch.arange(40).view(2, 20)


def changed(source, folder, change=None, settings=None, **config):
    """A copy of a folder with other tensors, quantizer's settings or configuration."""
    if source != folder:
        shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = (change(tensors) or tensors) if change else tensors
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    described = json.loads((folder / "config.json").read_text()) | config
    if settings:
        described["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(described))
    return folder


def logits(model):
    with torch.inference_mode():
        return model(IDS, use_cache=False).logits.float()


def theirs(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): values for name, values in tensors.items()}


def without(part):
    return lambda tensors: {name: values for name, values in tensors.items() if part not in name}


def added(**more):
    return lambda tensors: tensors | {name.replace("__", "."): values for name, values in more.items()}


FOREIGN = {
    "a missing layer": (without("layers.1."), {}, r"no tensor for model.layers.1.* \(9 parameters of LlamaForCausalLM\)"),
    "a layer too many": (None, {"num_hidden_layers": 1}, r"\(9 tensors for which LlamaForCausalLM has no place"),
    "an adapter's base_layer": (renamed("q_proj.", "q_proj.base_layer."), {}, "an adapter in it was not merged"),
    "a prefix": (renamed("model.", "module.model."), {}, "names begin with module., as of a model inside of another"),
    "a compiled model": (renamed("model.", "_orig_mod.model."), {}, "names begin with _orig_mod."),
    "the other half": (added(vision_tower__weight=torch.ones(4, 4)), {}, r"holds vision_tower.weight \(1 tensor"),
    "a layer for later tokens": (added(model__layers__2__eh_proj__weight=torch.ones(4, 4)), {}, "holds model.layers.2.eh_proj"),
    "integers": (lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"].to(torch.int8)}, {}, f"{Q}.weight in I8, where the model has"),
    "another shape": (lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"][:64]}, {}, r"of \(64, 256\), where config.json"),
    "floats of 8 bits": (lambda t: t | {f"{Q}.weight": t[f"{Q}.weight"].to(torch.float8_e4m3fn)}, {}, "in F8_E4M3, where"),
    "a name with and without its prefix": (
        lambda t: t | {"layers.0.mlp.up_proj.weight": t["model.layers.0.mlp.up_proj.weight"] + 1}, {}, "which are both model."
    ),
    "a bias that would count": (added(model__layers__0__self_attn__q_proj__bias=torch.ones(256)), {}, f"holds {Q}.bias"),
    "other frequencies": (added(model__layers__0__self_attn__rotary_emb__inv_freq=FREQUENCIES * 2), {}, f"holds {ROTARY}"),
    "a head that is not tied": (without("lm_head"), {"tie_word_embeddings": False}, "no tensor for lm_head.weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOREIGN)
def test_a_dense_folder_that_is_not_its_model_is_refused(dense, tmp_path, case):
    change, config, message = FOREIGN[case]
    with pytest.raises(GradlessError, match=message):
        load(changed(dense, tmp_path / "base", change, **config))


@pytest.mark.parametrize("case", ["a missing layer", "a layer too many", "the other half", "other frequencies"])
def test_so_is_a_quantized_one(dense, tmp_path, case):
    change, config, message = FOREIGN[case]
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    with pytest.raises(GradlessError, match=message):
        load(changed(tmp_path / "base", tmp_path / "base", change, **config))


def test_a_missing_expert_is_refused(tmp_path):
    """transformers stacks experts at loading, so that their names are in no model."""
    config = AutoConfig.for_model(
        "mixtral", hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=50, num_local_experts=4,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    changed(tmp_path / "base", tmp_path / "base", without("experts.2."))
    with pytest.raises(GradlessError, match=r"cannot be used: .*mlp.experts"):
        DenseModel.load(tmp_path / "base", tokenizer=object())


def test_quantized_weights_without_settings_are_refused(dense, tmp_path):
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    described = json.loads((tmp_path / "base" / "config.json").read_text())
    del described["quantization_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(described))
    with pytest.raises(GradlessError, match="a quantizer's, whose settings"):
        load(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "file", "settings"),
    [
        (
            "gptq-4",
            "quantize_config.json",
            {"bits": 4, "group_size": GROUP, "desc_act": False, "sym": True},
        ),
        ("awq", "quant_config.json", {"zero_point": True, "q_group_size": GROUP, "w_bit": 4, "version": "GEMM"}),
    ],
)
def test_settings_in_an_older_tools_file_are_read(dense, tmp_path, kind, file, settings):
    quantized_folder(dense, tmp_path / "base", kind)
    expected = logits(load(tmp_path / "base").model)
    described = json.loads((tmp_path / "base" / "config.json").read_text())
    del described["quantization_config"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(described))
    (tmp_path / "base" / file).write_text(json.dumps(settings))
    assert torch.equal(logits(load(tmp_path / "base").model), expected)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"hf_quant_config.json": {}}, "is quantized by modelopt"),
        ({"config.json": {"quantization": {"bits": 4, "group_size": 64}}}, "is quantized by mlx"),
        ({"config.json": {"quantization_config": {"quant_method": "hqq"}}}, "is quantized by hqq"),
        ({"config.json": {"quantization_config": "gptq"}}, "it must be an object"),
        ({"config.json": {"text_config": {"quantization_config": {"quant_method": "fp8"}}}}, "is quantized by fp8"),
        ({"quantize_config.json": {"bits": 4}}, "quantized by gptq, as its settings say, but no tensor of it is"),
        ({"adapter_config.json": {}}, "holds an adapter"),
    ],
)
def test_other_tools_folders_are_refused_by_name(dense, tmp_path, files, message):
    shutil.copytree(dense, tmp_path / "base")
    for name, content in files.items():
        file = tmp_path / "base" / name
        file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | content))
    with pytest.raises(GradlessError, match=message):
        load(tmp_path / "base")


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("gptq-4", {"rotation": "hadamard"}, "rotation = 'hadamard', a setting that gradless does not know"),
        ("gptq-4", {"act_bits": 8}, "activations of 8 bits"),
        ("gptq-4", {"pack_dtype": "int8"}, "pack_dtype = 'int8'; supported is int32"),
        ("gptq-4", {"format": "marlin"}, "GPTQ in the format marlin"),
        ("gptq-4", {"checkpoint_format": "gptq_v2", "format": "gptq"}, "in the format gptq and gptq_v2"),
        ("gptq-4", {"is_marlin_format": True}, "in the format marlin"),
        ("awq", {"version": None, "format": "gemv_fast"}, "AWQ in gemv_fast order"),
        ("awq", {"version": None, "checkpoint_format": "gemv"}, "AWQ in gemv order"),
        ("awq", {"version": "marlin"}, "AWQ in marlin order"),
        ("awq", {"backend": "llm-awq"}, "AWQ in llm-awq order"),
        ("awq", {"dynamic": {"+:.*": {"bits": 8}}}, "AWQ with settings that differ between layers"),
        ("autoround", {"data_type": "mx_fp"}, "data_type = 'mx_fp'; supported is int"),
        ("autoround", {"rotation_configs": [{"a": 1}]}, "rotation_configs"),
        ("nf4", {"bnb_4bit_quant_storage": "bfloat16"}, "stored as bfloat16"),
        ("nf4", {"load_in_8bit": True}, "both or neither"),
        ("aqlm 2x8", {"rescaled": True}, "AQLM with rescaled = True"),
    ],
)
def test_a_setting_that_may_change_the_weights_is_refused_by_name(dense, tmp_path, kind, settings, message):
    quantized_folder(dense, tmp_path / "base", kind)
    with pytest.raises(GradlessError, match=message):
        Folder.open(changed(tmp_path / "base", tmp_path / "base", settings=settings))


HARMLESS = {
    f"{Q}.bias": torch.zeros(256, dtype=torch.float16),
    ROTARY: FREQUENCIES.half(),
    "model.layers.1.self_attn.bias": torch.ones(1, 1, 16, 16).tril().bool(),
    "model.layers.1.self_attn.masked_bias": torch.tensor(-1e4),
}


def test_what_changes_nothing_is_noted_and_kept(dense, tmp_path, capsys):
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    expected = logits(load(tmp_path / "base").model)
    changed(tmp_path / "base", tmp_path / "base", lambda tensors: tensors | HARMLESS)
    capsys.readouterr()
    loaded = load(tmp_path / "base")
    said = capsys.readouterr().err
    assert all(name in said and name in "".join(loaded.notes) for name in HARMLESS)
    assert torch.equal(logits(loaded.model), expected)
    loaded.save(tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (tmp_path / "base" / "model.safetensors").read_bytes()


def test_names_prove_nothing(dense):
    model = load(dense).model
    for name, values in HARMLESS.items():
        assert harmless(model, name, values)
        assert harmless(model, name, torch.full_like(values, 1)) is None, name
    assert harmless(model, "model.layers.0.self_attn.other.bias", torch.zeros(256)) is None
    assert harmless(model, f"{Q}.bias", torch.zeros(8)) is None


def test_a_bias_that_is_not_zero_counts(dense, tmp_path):
    """Beside transformers, on the dense weights and the configuration that says that there is a bias."""
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    bias = torch.linspace(-1, 1, 256).bfloat16()
    without_it = logits(load(tmp_path / "base").model)
    loaded = load(changed(tmp_path / "base", tmp_path / "base", lambda tensors: tensors | {f"{Q}.bias": bias}))
    assert main(["dequantize", str(tmp_path / "base"), "--output", str(tmp_path / "dense")]) == 0
    assert torch.equal(load_file(tmp_path / "dense" / "model.safetensors")[f"{Q}.bias"], bias)
    expected = theirs(tmp_path / "dense")
    assert torch.allclose(logits(loaded.model), expected, atol=0.02 * float(expected.abs().max()))
    assert not torch.allclose(without_it, expected, atol=0.1 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("settings", [{"sym": True}, {"sym": True, "checkpoint_format": "gptq_v2"}, {}])
@pytest.mark.parametrize("less", [0, 1])
def test_a_symmetric_files_zero_points_are_the_middle_however_they_are_held(tmp_path, bits, settings, less):
    rng = np.random.default_rng(0)
    parts, weight = gptq(rng, 64, 128, bits=bits, symmetric=True)
    zeros = np.full((2, 64), 2 ** (bits - 1) - less)
    parts["qzeros"] = torch.from_numpy(stream(zeros, bits))
    save_file({f"layer.{name}": values.contiguous() for name, values in parts.items()}, tmp_path / "model.safetensors")
    described = {"quantization_config": {"quant_method": "gptq", "bits": bits, "group_size": GROUP} | settings}
    (tmp_path / "config.json").write_text(json.dumps(described))
    (tensor,) = Folder.open(tmp_path).quantized.values()
    assert torch.allclose(kernels.dequantize(tensor, torch.arange(64), torch.float32)[0], weight, rtol=1e-6, atol=1e-8)


def test_symmetric_settings_over_other_zero_points_are_refused(dense, tmp_path):
    quantized_folder(dense, tmp_path / "base", "gptq-2")
    with pytest.raises(GradlessError, match=r"down_proj.*zero points of \d to \d, where all should be 2"):
        Folder.open(changed(tmp_path / "base", tmp_path / "base", settings={"sym": True}))


@pytest.mark.parametrize("packed", [True, False])
def test_a_head_of_the_files_own_is_not_tied(dense, tmp_path, packed):
    quantized_folder(dense, tmp_path / "base", "gptq-4")
    parts, weight = gptq(np.random.default_rng(5), 288, 256, bits=4, symmetric=True)
    own = {f"lm_head.{name}": values for name, values in parts.items()} if packed else {"lm_head.weight": weight.bfloat16()}

    def with_head(tensors):
        rows = tensors["model.embed_tokens.weight"]
        grown = torch.cat([rows, torch.zeros(288 - len(rows), 256, dtype=rows.dtype)])
        return {k: v for k, v in tensors.items() if k != "lm_head.weight"} | {"model.embed_tokens.weight": grown} | own

    changed(tmp_path / "base", tmp_path / "base", with_head, tie_word_embeddings=True, vocab_size=288)
    loaded = load(tmp_path / "base")
    assert any("lm_head.weight is the file's own" in note for note in loaded.notes)
    assert len(loaded.tunable("blocks")) == len(adaptable(loaded)) == 14
    assert "lm_head.weight" not in loaded.tunable("blocks")
    if packed:
        assert loaded.tunable("blocks", Targets("lm_head")) == ["lm_head.weight"]
    assert main(["dequantize", str(tmp_path / "base"), "--output", str(tmp_path / "dense")]) == 0
    expected = theirs(tmp_path / "dense")
    assert torch.allclose(load_file(tmp_path / "dense" / "model.safetensors")["lm_head.weight"].float(), weight, rtol=2**-8)
    assert torch.allclose(logits(loaded.model), expected, atol=0.02 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_tuned_dense_folder_differs_in_what_was_tuned_alone(dense, rows, tmp_path, dtype):
    noise = torch.Generator().manual_seed(1)

    def cast(tensors):
        more = {n: (t.float() * (1 + 1e-4 * torch.randn(t.shape, generator=noise))).to(dtype) for n, t in tensors.items()}
        return {name.removeprefix("model."): values for name, values in more.items()} | {ROTARY: FREQUENCIES}

    base = changed(dense, tmp_path / "base", cast)
    (base / "notes.txt").write_text("kept")
    task = ["--template", "{text} is\\n", "--labels", "0=n,1=y", "--batch-size", "4", "--steps", "2", "--method", "mezo"]
    output = ["--lr", "1e-2", "--output", str(tmp_path / "run")]
    assert main(["tune", str(base), str(rows), *task, "--target-modules", "down_proj", *output]) == 0
    assert main(["replay", str(base), str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "again")]) == 0
    before, after = load_file(base / "model.safetensors"), load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {name for name in before if not torch.equal(before[name], after[name])} == {n for n in before if "down_proj" in n}
    assert all(before[name].dtype is after[name].dtype for name in before)
    assert sorted(f.name for f in (tmp_path / "run" / "model").iterdir()) == sorted(f.name for f in base.iterdir())
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
        tmp_path / "run" / "model" / "model.safetensors"
    ).read_bytes()
    for name in before:
        if "down_proj" in name:  # what did not move keeps every bit; what moved is what was computed with
            moved = before[name].bfloat16() != after[name].bfloat16()
            assert moved.any()
            assert torch.equal(after[name][~moved], before[name][~moved])


@pytest.mark.parametrize("name", ["gemma2", "bloom", "mamba2", "gpt_oss"])
def test_architectures_that_have_no_sdpa_are_dequantized(dense, tmp_path, name):
    tiny = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
    of = {"mamba2": {"num_heads": 8, "state_size": 16, "n_groups": 1}, "bloom": {"n_layer": 2, "n_head": 4}}
    more = {"gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2}, **of}.get(name, {})
    config = AutoConfig.for_model(name, **tiny, **more, vocab_size=259, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    shutil.copytree(dense, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    assert (
        main(["quantize", str(tmp_path / "base"), "--bits", "8", "--output", str(tmp_path / "packed"), "--group-size", "32"])
        == 0
    )
    loaded = load(tmp_path / "packed")
    expected = logits(dequantized(loaded))
    assert torch.allclose(logits(loaded.model), expected, atol=0.02 * float(expected.abs().max()))


def test_every_file_that_matters_is_in_the_identity_of_a_base(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    before = load(tmp_path / "base").identity()
    assert {"config.json", "tokenizer.json", "tokenizer_config.json"} <= before.keys()
    for name in ("README.md", "generation_config.json", "config.json", "tokenizer_config.json"):
        with (tmp_path / "base" / name).open("a") as file:
            file.write("\n")
    after = identity(tmp_path / "base")
    assert {name for name in before if before[name] != after[name]} == {"config.json", "tokenizer_config.json"}


def _outside(folder, dense):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": dict.fromkeys(load_file(dense / "model.safetensors"), f"../{dense.name}/model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _linked(folder, dense):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(dense / "model.safetensors")


def _twice(folder, _dense):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    shutil.copy(folder / "a.safetensors", folder / "b.safetensors")


def _lacking(folder, dense):
    names = [*load_file(dense / "model.safetensors"), "model.norm.bias"]
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_outside, r"names weights in '../dense/model.safetensors', which is no file of that folder"),
        (_linked, "is a link out of its folder"),
        (_twice, "holds .* twice, in a.safetensors and in b.safetensors"),
        (_lacking, r"lacks 1 tensors that .* names \(model.norm.bias\)"),
    ],
)
def test_weights_are_the_folders_own_files(dense, tmp_path, change, message):
    shutil.copytree(dense, tmp_path / "base")
    change(tmp_path / "base", dense)
    with pytest.raises(GradlessError, match=message):
        load(tmp_path / "base")


def test_the_hubs_cache_may_link_to_its_blobs(dense, tmp_path):
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    shutil.copytree(dense, snapshot)
    (tmp_path / "models--a--b" / "blobs").mkdir()
    (snapshot / "model.safetensors").rename(tmp_path / "models--a--b" / "blobs" / "abc")
    (snapshot / "model.safetensors").symlink_to("../../blobs/abc")
    assert torch.equal(logits(load(snapshot).model), logits(load(dense).model))


def test_weights_beside_the_models_are_said(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base")
    save_file({"more": torch.ones(2)}, tmp_path / "base" / "consolidated.safetensors")
    assert "consolidated.safetensors holds tensors, but" in load(tmp_path / "base").notes[0]


def test_no_programs_are_asked_for_on_standard_input(dense, tmp_path, monkeypatch, capsys):
    """An unknown model whose folder brings Python: refused, whatever is typed."""
    shutil.copytree(dense, tmp_path / "base")
    changed(tmp_path / "base", tmp_path / "base", model_type="strange", auto_map={"AutoConfig": "its.Config"})
    (tmp_path / "base" / "its.py").write_text("raise SystemExit('ran')\n")
    for command in (["plan"], ["eval"], ["dequantize"]):
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        more = {"eval": ["rows.tsv", "--task", "sst2"], "dequantize": ["--output", str(tmp_path / "out")]}.get(command[0], [])
        assert main([*command, str(tmp_path / "base"), *more]) == 1
        said = capsys.readouterr()
        assert "its own" in said.err
        assert "[y/N]" not in said.out + said.err


class _Owner(nn.Module):
    """A module whose buffers transformers would compute, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64), persistent=False)
        self.register_buffer("kept", torch.zeros(2))

    def _init_weights(self, module):
        if self.computes:
            module.steps.copy_(torch.arange(3))


@pytest.mark.parametrize("computes", [True, False])
def test_no_buffer_is_left_as_it_happens_to_be(computes):
    with torch.device("meta"):
        owner = _Owner()
    owner.computes = computes
    if not computes:
        with pytest.raises(GradlessError, match="does not initialize the buffer steps of _Owner"):
            restore_buffers(owner)
        return
    restore_buffers(owner)
    assert owner.steps.tolist() == [0, 1, 2]
    assert list(owner.state_dict()) == ["kept"]


def test_a_folder_in_shards_lacks_nothing(dense, tmp_path):
    shutil.copytree(dense, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    write_shards(tmp_path / "base", load_file(dense / "model.safetensors"), 3)
    assert torch.equal(logits(load(tmp_path / "base").model), logits(load(dense).model))
