"""formats/gguf.py and gguf_model.py: round trips to the byte, transformers' own numbers, and bad files."""

import gguf
import numpy as np
import pytest
import torch

from gradless import QZO
from gradless.blocks import BLOCK_TYPES
from gradless.errors import GradlessError
from gradless.formats.checkpoint import rounded
from gradless.formats.gguf import GGUFFile
from gradless.formats.gguf_model import load_gguf
from gradless.formats.quantized import dequantized
from gradless.fusing import fuse
from gradless.noise import Direction
from gradless.spaces import BlockSpace
from gradless.tensor import Move, Part
from tests.tiny import random_blocks, tiny_gguf

ARCHITECTURES = ("llama", "qwen2", "qwen3")
"""Those whose usual metadata transformers reads as they are meant (of gemma3 it takes the scores' scale as given)."""


def transformers_model(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.mark.parametrize("block", BLOCK_TYPES)
def test_untouched_in_is_byte_identical_out(tmp_path, block):
    path = tiny_gguf(tmp_path / "a.gguf", block=block)
    GGUFFile.open(path).export(tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("part", [Part.SCALE, Part.OFFSET, Part.BOTH])
@pytest.mark.parametrize("block", BLOCK_TYPES)
def test_tuned_but_unmoved_is_byte_identical_and_moved_differs_only_in_its_fields(tmp_path, block, part):
    path = tiny_gguf(tmp_path / "a.gguf", block=block)
    file = GGUFFile.open(path)
    name = "blk.0.ffn_up.weight"
    space = BlockSpace(file.quantized[name], part)
    file.export(tmp_path / "b.gguf")
    assert (tmp_path / "b.gguf").read_bytes() == path.read_bytes()

    space.move([Move(Direction(0, 0), 0.05)])
    file.export(tmp_path / "c.gguf")
    before, after = (np.frombuffer(p.read_bytes(), np.uint8) for p in (path, tmp_path / "c.gguf"))
    info, kind = file.tensors[name], BLOCK_TYPES[block]
    changed = np.flatnonzero(before != after)
    assert len(changed)
    assert changed.min() >= info.offset
    assert changed.max() < info.offset + info.nbytes
    fields = {Part.SCALE: [kind.scale_at], Part.OFFSET: [kind.offset_at], Part.BOTH: [kind.scale_at, kind.offset_at]}[part]
    places = {at + i for at in fields if at is not None for i in (0, 1)} or {kind.scale_at, kind.scale_at + 1}
    assert set((changed - info.offset) % kind.nbytes) <= places


def test_the_exported_file_holds_the_tuned_values(tmp_path, tiny):
    file = GGUFFile.open(tiny)
    tensor = file.quantized["blk.1.attn_q.weight"]
    BlockSpace(tensor, Part.SCALE).move([Move(Direction(0, 0), 0.05)])
    file.export(tmp_path / "out.gguf")
    again = GGUFFile.open(tmp_path / "out.gguf").quantized["blk.1.attn_q.weight"]
    assert torch.equal(
        again.block.field(again.packed, again.block.scale_at), rounded(tensor.tuned_values.values, torch.float16).float()
    )


def test_huge_values_saturate():
    assert rounded(torch.tensor([1e9, -1e9]), torch.float16).tolist() == [65504.0, -65504.0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block", ["Q4_1", "Q6_K"])
def test_logits_are_transformers_own(tmp_path, architecture, block):
    path = tiny_gguf(tmp_path / "model.gguf", architecture, block)
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        ours = load_gguf(path, dtype=torch.float32).model(ids).logits
        theirs = transformers_model(path)(ids).logits
    assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_a_perturbed_forward_equals_a_dense_one_with_the_perturbed_weights(tiny):
    """The view reaches every tuned layer, rows in transformers' order, and leaves nothing behind."""
    loaded = load_gguf(tiny, dtype=torch.float32)
    ids = torch.arange(30).view(1, 30)
    move = Move(Direction(5, 0), 0.03)
    mirrored = move._replace(coefficient=-0.03)
    spaces = [BlockSpace(loaded.file.quantized[name], Part.SCALE) for name in loaded.file.linear_layers()]
    with torch.inference_mode():
        still = loaded.model(ids).logits
        for space in spaces:
            space.view(move)
        viewed = loaded.model(ids).logits
        for space in spaces:
            space.view(mirrored)
        from_the_other_side = loaded.model(ids).logits
        for space in spaces:
            space.view(move, mirrored)
        assert torch.equal(loaded.model(torch.cat([ids, ids])).logits, torch.cat([viewed, from_the_other_side]))
        for space in spaces:
            space.view()
        assert torch.equal(loaded.model(ids).logits, still)
        for space in spaces:
            space.move([move])
        assert torch.equal(loaded.model(ids).logits, viewed)
    assert not torch.equal(viewed, still)


@pytest.mark.parametrize("sign", [+1, -1])
def test_an_answer_is_generated_under_one_direction_whose_noise_is_drawn_once(tiny, sign, monkeypatch):
    loaded = load_gguf(tiny, dtype=torch.float32)
    method = QZO(loaded.spaces("blocks", loaded.file.linear_layers()), eps=0.3)
    before = [space.values.clone() for space in method.spaces]
    drawn: list[str] = []
    draw = Direction.words
    monkeypatch.setattr(Direction, "words", lambda self, name, *stream: drawn.append(name) or draw(self, name, *stream))
    answers = []
    for held in (False, True):
        drawn.clear()
        with torch.inference_mode(), method.perturbed(0, sign, many_forwards=held):
            answers.append(loaded.model.generate(torch.arange(5, 9).view(1, 4), max_new_tokens=12, do_sample=False))
    assert torch.equal(*answers)
    assert sorted(set(drawn)) == sorted(space.name for space in method.spaces)
    assert len(drawn) == 2 * len(set(drawn))  # a direction's words, and its rounding's
    assert all(torch.equal(space.values, values) for space, values in zip(method.spaces, before, strict=True))


def test_dequantized_is_the_same_model_in_bf16(tiny):
    loaded = load_gguf(tiny)
    dense, ids = dequantized(loaded), torch.arange(30).view(1, 30)
    fuse(dense)
    with torch.inference_mode():
        assert torch.equal(dense(ids).logits, loaded.model(ids).logits)


# -- bad files --------------------------------------------------------------------------------------------------------


def test_not_a_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"PK\x03\x04 not this")
    with pytest.raises(GradlessError, match="is not a GGUF file"):
        GGUFFile.open(path)


def test_no_such_file(tmp_path):
    with pytest.raises(GradlessError, match="there is no file"):
        GGUFFile.open(tmp_path / "none.gguf")


def test_an_empty_file(tmp_path):
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(GradlessError, match="is not a GGUF file"):
        GGUFFile.open(tmp_path / "empty.gguf")


@pytest.mark.parametrize("keep", [10, 300, 3000, -100])
def test_truncated(tmp_path, tiny, keep):
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny.read_bytes()[:keep])
    with pytest.raises(GradlessError, match="is truncated"):
        GGUFFile.open(path)


def test_an_unsupported_tensor_type_is_named_with_the_list(tmp_path):
    writer = gguf.GGUFWriter(str(tmp_path / "iq.gguf"), "llama")
    writer.add_tensor("w", np.zeros((4, 136), np.uint8), raw_dtype=gguf.GGMLQuantizationType.IQ4_XS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(GradlessError, match=r"tensor w has type IQ4_XS; supported are F32, F16, BF16, Q4_0, Q4_1"):
        GGUFFile.open(tmp_path / "iq.gguf")


def test_an_unsupported_architecture_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(GradlessError, match="the architecture rwkv6 is not supported"):
        load_gguf(tiny_gguf(tmp_path / "a.gguf", "rwkv6"))


def test_a_full_disk_leaves_nothing_behind(tmp_path, tiny, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gradless.formats.gguf.shutil.copyfile", full)
    with pytest.raises(GradlessError, match=r"No space left on device.*nothing was changed"):
        GGUFFile.open(tiny).export(tmp_path / "out.gguf")
    assert list(tmp_path.iterdir()) == []


def test_random_blocks_are_finite():
    for name in BLOCK_TYPES:
        raw = random_blocks(name, 4, 256, np.random.default_rng(0))
        assert np.isfinite(gguf.dequantize(raw, gguf.GGMLQuantizationType[name])).all()
