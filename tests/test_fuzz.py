"""A short run of the fuzzer, and each of the bad files that it begins with."""

from collections import Counter

import pytest
from safetensors import SafetensorError, safe_open

from gradless.errors import GradlessError
from gradless.formats.gguf import GGUFFile
from gradless.readers import gguf, safetensors
from tests.fuzz import seeds, targets
from tests.fuzz.run import SPARE, run, tried


def refuse(sentence):
    raise GradlessError(sentence)


@pytest.mark.parametrize(
    ("read", "outcome"),
    [
        (lambda: None, "read"),
        (lambda: refuse("no"), "refused"),
        (lambda: refuse("two\nlines"), "more than a sentence"),
        (lambda: {}["a"], "KeyError"),
        (lambda: len(b"x" * (SPARE + (8 << 20))), "memory"),
        (lambda: next(iter(())), "StopIteration"),
        (lambda: all(True for _ in iter(int, 1)), "hang"),
    ],
)
def test_the_fuzzer_sees_each_kind_of_fault(read, outcome, monkeypatch):
    monkeypatch.setattr("tests.fuzz.run.SECONDS", 0.3)
    assert tried(read, 0)[0] == outcome


@pytest.mark.parametrize("name", targets.PARSERS)
def test_mutated_files_are_read_or_refused_in_a_sentence(name):
    outcomes, _, _ = run(targets.PARSERS[name](), range(400), seed=25)
    assert outcomes.keys() == {"read", "refused"}, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("name", targets.LOADS)
def test_mutated_models_and_runs_are_loaded_or_refused_in_a_sentence(name):
    outcomes, _, _ = run(targets.LOADS[name](), range(60), seed=25)
    assert outcomes.keys() <= {"read", "refused"}, outcomes


def test_a_valid_gguf_is_read_value_by_value(tmp_path):
    path = tmp_path / "a.gguf"
    path.write_bytes(seeds.gguf_file().raw())
    header = gguf.read_header(path)
    assert list(header.metadata["tokenizer.ggml.tokens"]) == ["a", "ä", "", "word"]
    assert header.metadata["tokenizer.ggml.tokens"][-1] == "word"
    assert header.metadata["tokenizer.ggml.tokens"][1:3] == ["ä", ""]
    assert header.metadata["tokenizer.ggml.scores"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert header.metadata["flags"].tolist() == [True, False, True]
    assert [header.metadata[f"scalar.{n}"] for n in (0, 6, 7, 12)] == [1, 1.0, True, 1.0]
    first = len(path.read_bytes()) - 160
    assert {n: (t.type, t.shape, t.offset - first, t.nbytes) for n, t in header.tensors.items()} == {
        "a.weight": ("Q8_0", (2, 32), 0, 68),
        "b.weight": ("F32", (5,), 96, 20),
        "c.weight": ("F32", (1, 1, 2, 2), 128, 16),
    }


@pytest.mark.parametrize("kind", seeds.bad_ggufs())
def test_a_bad_gguf_is_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "a.gguf"
    path.write_bytes(seeds.bad_ggufs()[kind].raw())
    with pytest.raises(GradlessError, match=str(path)):
        GGUFFile.open(path)


@pytest.mark.parametrize("kind", seeds.bad_safetensors())
def test_a_bad_safetensors_file_is_refused_in_a_sentence(tmp_path, kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(seeds.bad_safetensors()[kind])
    with pytest.raises(GradlessError, match=str(path)):
        safetensors.read_header(path)


def test_what_is_read_of_mutated_safetensors_the_library_reads_too(tmp_path):
    """The outside judge: its shapes and types are ours, and it refuses nothing that we read."""
    target, seen = targets.PARSERS["safetensors"](), Counter()
    for number in range(600):
        path = target.make(tmp_path, targets.Random(f"judge {number}"))
        try:
            tensors, metadata = safetensors.read_header(path)
        except GradlessError:
            seen["refused"] += 1
            continue
        try:
            with safe_open(path, "np") as theirs:
                assert sorted(theirs.keys()) == sorted(tensors)
                assert (theirs.metadata() or {}) == metadata
                for name, info in tensors.items():
                    ours = theirs.get_slice(name)
                    assert (ours.get_dtype(), tuple(ours.get_shape())) == (info.type, info.shape)
        except SafetensorError as error:
            raise AssertionError(f"we read {path.read_bytes()!r}") from error
        seen["read"] += 1
    assert seen["read"] > 5
    assert seen["refused"] > 500
