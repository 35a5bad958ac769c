"""The conformance suite: a small part of it, whether docs/models.md is all of it, and, slow, every cell."""

import re

import pytest
import torch
import transformers

from gradless.errors import GradlessError
from gradless.formats.folder import Folder
from gradless.formats.load import load
from gradless.independence import independence
from gradless.layers import is_plain
from gradless.noise import Direction
from gradless.spaces import dense_spaces, reads_text
from gradless.tensor import Move
from tests.conformance import folders
from tests.conformance.architectures import KINDS, tiny_model
from tests.conformance.cells import check, logits
from tests.conformance.gguf_files import check_gguf, names
from tests.conformance.write import PAGE


@pytest.mark.parametrize(
    ("kind", "form", "methods"),
    [
        ("llama", "GPTQ", ("qzo",)),  # dense, as most are
        ("mixtral", "gradless int4", ("zoqo",)),  # experts
        ("falcon_mamba", "dense", ("mezo",)),  # recurrent, and multiplies a layer's weight itself
        ("lfm2", "gradless nf4", ("ezo",)),  # hybrid
    ],
)
def test_a_small_part(kind, form, methods, tmp_path):
    cell = check(kind, form, tmp_path, methods)
    assert cell.state == "works", cell.faults or cell.refused
    assert set(cell.methods) == set(methods)


@pytest.mark.slow
@pytest.mark.parametrize("form", folders.ALL)
@pytest.mark.parametrize("kind", KINDS)
def test_every_cell(kind, form, tmp_path):
    cell = check(kind, form, tmp_path)
    assert cell.state != "open", cell.faults


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "form"), names())
def test_every_cell_of_a_gguf(kind, form, tmp_path):
    cell = check_gguf(kind, form, tmp_path)
    assert cell.state == "works", cell.faults or cell.refused


def test_the_page_is_of_the_suites_architectures_and_has_no_open_cell():
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    folder_rows = {row[0].strip(): [each.strip() for each in row[2:]] for row in rows if len(row) == 2 + len(folders.ALL)}
    folder_rows.pop("architecture")
    if transformers.__version__ in PAGE.read_text():  # another version may know more architectures, or fewer
        assert folder_rows.keys() == set(KINDS)
    state = re.compile(r"-|refused \[\d+\]|works(, not [\w, ]+ \[\d+\])*")
    for kind, cells in folder_rows.items():
        assert all(state.fullmatch(cell) for cell in cells), kind


# -- what the suite found ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def falcon_mamba(tmp_path_factory):
    """A packed model that multiplies the weight of a layer, dt_proj, itself."""
    base, _ = folders.write("falcon_mamba", "gradless int4", tmp_path_factory.mktemp("mamba"))
    return base


def test_a_packed_weight_that_a_model_multiplies_itself_follows_its_view(falcon_mamba):
    loaded = load(falcon_mamba)
    name, before = next(name for name in loaded.file.quantized if "dt_proj" in name), logits(loaded.model)
    (space,) = loaded.spaces("blocks", [name])
    with torch.inference_mode():
        space.view(Move(Direction(0, 0), 0.5))
        moved = logits(loaded.model)
        space.view()
    assert not torch.equal(before, moved)
    assert torch.equal(before, logits(loaded.model))
    assert not independence(loaded.model).halves
    space.view(Move(Direction(0, 0), 0.5), Move(Direction(0, 0), -0.5))
    with pytest.raises(GradlessError, match=r"the model multiplies .*dt_proj.weight itself"):
        logits(loaded.model)


def test_a_dense_weight_that_a_model_multiplies_itself_follows_its_view():
    model = tiny_model("falcon_mamba")
    (space,) = dense_spaces(model, lambda name, _: name.endswith("layers.1.mixer.dt_proj.weight"))
    before = logits(model)
    for _ in range(2):  # before and after a first forward
        space.view(Move(Direction(0, 0), 0.5))
        moved = logits(model)
        space.view()
        assert not torch.equal(before, moved)
        assert torch.equal(before, logits(model))
    space.move([Move(Direction(0, 0), 0.5)])
    assert torch.equal(moved, logits(model))


def test_layers_that_do_more_than_multiply_are_not_packed(tmp_path):
    """Phi-MoE's router is a linear layer's class with a forward of its own, Falcon's layers only write theirs down anew."""
    found = {}
    for kind in ("phimoe", "falcon"):
        base, _ = folders.write(kind, "gradless int4", tmp_path / kind)
        found[kind] = {name.split(".")[-2] for name in Folder.open(base).quantized}
    assert found["falcon"] == {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
    assert found["phimoe"] == {"q_proj", "k_proj", "v_proj", "o_proj"}
    router = next(m for m in tiny_model("phimoe").modules() if type(m).__name__ == "PhimoeTopKRouter")
    assert not is_plain(router)


def test_whatever_a_class_ties_is_one_tensor(tmp_path):
    """BERT ties the bias of its head too, CamemBERT an embedding to what comes before it."""
    for kind, one, other in (
        ("bert", "cls.predictions.decoder.bias", "cls.predictions.bias"),
        ("camembert", "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.weight"),
    ):
        base, judge = folders.write(kind, "gradless int4", tmp_path / kind)
        model = load(base).model
        assert model.get_parameter(one) is model.get_parameter(other)
        assert torch.equal(model.get_parameter(one).float(), judge.get_parameter(one))


def test_a_model_that_fails_by_itself_is_refused(tmp_path):
    base, _ = folders.write("xlnet", "dense", tmp_path)
    with pytest.raises(GradlessError, match="the forward of XLNetLMHeadModel fails on a few tokens"):
        independence(load(base).model)
    with pytest.raises(GradlessError, match="ProphetNetForCausalLM does not compute its logits by its head alone"):
        independence(tiny_model("prophetnet"))


def test_only_the_part_that_reads_text_is_tuned_by_default():
    model = tiny_model("gemma3")
    paths = {path for path, module in model.named_modules() if module in reads_text(model)}
    assert {"lm_head", "model.language_model.layers.1.mlp.up_proj"} <= paths
    assert not any("vision" in path for path in paths)
    named = [name for name in (space.name for space in dense_spaces(model)) if "language_model" not in name]
    assert named == []
