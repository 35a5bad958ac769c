"""readers/ and formats/bounded.py: bounds of JSON, .npz, configurations and chat templates."""

import io
import json
import time
import zipfile

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.dense import DenseModel
from gradless.formats.folder import quantization, weight_files
from gradless.formats.gguf_model import load_gguf
from gradless.readers.json import parse_object, read_object
from gradless.readers.npz import read_arrays
from gradless.readers.templates import bounded_rendering
from tests.fuzz import seeds
from tests.fuzz.mutate import Gguf, text

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**38), 10**38) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@settings(deadline=None, max_examples=40)
@given(st.dictionaries(st.text(), VALUES, max_size=3))
def test_all_json_that_is_within_bounds_is_read_as_it_is(content):
    raw = json.dumps(content).encode()
    assert parse_object(raw, "it", len(raw)) == content


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (b"[]", "is no JSON object"),
        (b'{"a": 1, "a": 1}', "'a' is there twice"),
        (b'{"a": {"b": 1, "b": 2}}', "'b' is there twice"),
        (b'{"a": ' + b"1" * 5000 + b"}", "a number has 5000 digits"),
        (b'{"a": 1e400}', "a number is too large"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": "\xff"}', "is not JSON"),
        (b'{"a": "\\udc00"}', "is not JSON"),
        (b'{"a": ' + b"[" * 65 + b"]" * 65 + b"}", "nested more than 64 deep"),
        (b'{"a": ' + b"[" * 10**6 + b"]" * 10**6 + b"}", "too much JSON|nested more than 64 deep"),
        (b'{"a": [' + b"{}," * 10**6 + b"{}]}", "too much JSON"),
        (b"", "is not JSON"),
        (b'{"a": 1} x', "is not JSON"),
    ],
)
def test_json_out_of_bounds_is_refused(tmp_path, raw, says):
    (tmp_path / "a.json").write_bytes(raw)
    with pytest.raises(GradlessError, match=says):
        read_object(tmp_path / "a.json")


@pytest.mark.parametrize(
    "quantizer",
    [
        "gptq",
        ["gptq"],
        {"bits": "4"},
        {"bits": True},
        {"bits": 10**9},
        {"group_size": 0},
        {"group_size": "64"},
        {"group_size": -2},
        {"group_size": 64.0},
        {"nbits_per_codebook": 10**9},
        {"dynamic": []},
        {"extra_config": {"a": 3}},
    ],
)
def test_a_quantizers_setting_out_of_its_range_is_refused(tmp_path, quantizer):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantizer}))
    with pytest.raises(GradlessError, match=r"config\.json"):
        quantization(tmp_path)


@pytest.mark.parametrize("names", [None, [], {}, {"a": 3}, {"a": None}, {"a": ""}, {"a": "x" * 300}, {"a": "b\x00c"}])
def test_an_index_without_names_of_files_is_refused(tmp_path, names):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(GradlessError, match=r"index\.json"):
        weight_files(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 20_000},
        {"num_hidden_layers": 10**9},
        {"num_labels": 10**9},
        {"num_attention_heads": 10**9},
        {"vocab_size": 10**12},
        {"hidden_size": 10**12},
        {"intermediate_size": 10**10},
        {"hidden_size": "big"},
        {"hidden_act": "none"},
        {"rope_parameters": []},
    ],
)
def test_a_configuration_that_asks_for_more_than_its_weights_is_refused_at_once(dense, tmp_path, changes):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in dense.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((dense / "config.json").read_text()) | changes
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    began = time.process_time()
    with pytest.raises(GradlessError) as refused:
        DenseModel.load(folder)
    assert time.process_time() - began < 2
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("changes", [{"num_hidden_layers": 20_000}, {"hidden_size": 10**12}, {"layer_types": "x"}])
def test_a_plan_of_an_absurd_configuration_is_refused(dense, tmp_path, capsys, changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads((dense / "config.json").read_text()) | changes))
    assert main(["plan", str(path)]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert str(path) in said


def test_blocks_that_the_tensors_cannot_be_are_refused(tiny, tmp_path):
    raw = tiny.read_bytes()
    file = Gguf.parsed(raw, len(raw))
    file.keys = [(n, k, (10**9).to_bytes(4, "little") if n == b"llama.block_count" else v) for n, k, v in file.keys]
    (tmp_path / "a.gguf").write_bytes(file.raw() + bytes(10**6))
    with pytest.raises(GradlessError, match="block_count is 1000000000, and it has 20 tensors"):
        load_gguf(tmp_path / "a.gguf")


def npz(path, **members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, raw in members.items():
            archive.writestr(f"{name}.npy", raw)


def npy(array, **more):
    held = io.BytesIO()
    np.save(held, array, **more)
    return held.getvalue()


def test_arrays_are_read_as_numpy_wrote_them(tmp_path):
    a, b = np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(3)
    np.savez_compressed(tmp_path / "a.npz", a=a, b=b)
    held = read_arrays(tmp_path / "a.npz", ["a", "b"])
    assert held["a"].tolist() == a.tolist()
    assert held["b"].tolist() == 3


def test_an_npz_that_unpacks_to_gigabytes_is_refused_before_it_is_unpacked(tmp_path):
    with (
        zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("a.npy", "w") as stream,
    ):
        for _ in range(300):
            stream.write(bytes(1 << 20))
    with pytest.raises(GradlessError, match="unpacks to 314,572,800 bytes"):
        read_arrays(tmp_path / "a.npz", ["a"])


@pytest.mark.parametrize(
    "raw",
    [
        npy(np.array([{}]), allow_pickle=True),
        npy(np.zeros(4))[:-1],
        npy(np.zeros(4)) + b"x",
        npy(np.zeros(4)).replace(b"(4,)", b"(9,)"),
        b"",
        b"\x93NUMPY\x03\x00",
    ],
)
def test_a_bad_member_of_an_npz_is_refused(tmp_path, raw):
    npz(tmp_path / "a.npz", a=raw)
    with pytest.raises(GradlessError, match=r"is no \.npz with arrays `a`"):
        read_arrays(tmp_path / "a.npz", ["a"])


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
        "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% macro f(n) %}{% for i in range(3) %}{{ f(n - 1) if n > 0 }}{% endfor %}{% endmacro %}{{ f(60) }}",
    ],
)
def test_a_chat_template_without_an_end_is_stopped(template, monkeypatch):
    monkeypatch.setattr("gradless.readers.templates.SECONDS", 0.5)
    from transformers.utils.chat_template_utils import render_jinja_template

    conversation = [[{"role": "user", "content": "x"}]]
    with bounded_rendering(), pytest.raises(GradlessError, match="the chat template takes more than"):
        render_jinja_template(conversation, chat_template=template)
    with bounded_rendering():
        assert render_jinja_template(conversation, chat_template="{{ messages[0]['content'] }}")[0] == ["x"]


def test_a_string_that_is_no_utf8_is_refused_where_it_is_read(tmp_path):
    file = seeds.gguf_file()
    file.keys.append((b"words", 9, (8).to_bytes(4, "little") + (2).to_bytes(8, "little") + text(b"a") + text(b"\xff")))
    (tmp_path / "a.gguf").write_bytes(file.raw())
    from gradless.readers.gguf import read_header

    words = read_header(tmp_path / "a.gguf").metadata["words"]
    assert words[0] == "a"
    with pytest.raises(GradlessError, match="words: string 1 is not UTF-8"):
        list(words)
