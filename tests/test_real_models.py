"""Slow: real models from PyPI through tune, replay and llama.cpp."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from gradless.cli import main
from gradless.formats.gguf import GGUFFile
from gradless.tasks.data import read_rows

pytestmark = pytest.mark.slow
STEPS = 40


@pytest.fixture(scope="module", params=[("smollm2", "qzo"), ("smollm2", "quzo"), ("gemma3", "qzo")], ids=" ".join)
def model_and_method(request):
    model, method = request.param
    return request.getfixturevalue(model), method


@pytest.fixture(scope="module")
def base(model_and_method):
    return model_and_method[0]


@pytest.fixture(scope="module")
def run(model_and_method, shared_data, tmp_path_factory):
    """A short run on SST-2: long enough that predictions are no longer all the same."""
    base, method = model_and_method
    output = tmp_path_factory.mktemp("real") / "run"
    train = str(shared_data / "sst2" / "train.tsv")
    arguments = ["tune", str(base), train, "--task", "sst2", "--steps", str(STEPS), "--schedule", "constant"]
    arguments += ["--method", method, "--lr", {"qzo": "1e-3", "quzo": "0.2"}[method]]
    assert main([*arguments, "--output", str(output)]) == 0
    return output


def test_untouched_round_trip_is_byte_identical(base, tmp_path):
    GGUFFile.open(base).export(tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == base.read_bytes()


def test_replay_is_byte_identical(base, run, tmp_path, capsys):
    output = tmp_path / "again.gguf"
    assert main(["replay", str(base), str(run / "journal.db"), "--output", str(output), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert output.read_bytes() == (run / "model.gguf").read_bytes()
    assert output.read_bytes() != base.read_bytes()
    assert result["steps"] == STEPS


def test_the_tuned_file_has_the_bases_size_types_and_metadata(base, run):
    ours, theirs = GGUFFile.open(run / "model.gguf"), GGUFFile.open(base)
    assert ours.tensors == theirs.tensors
    first = min(info.offset for info in theirs.tensors.values())
    assert (run / "model.gguf").read_bytes()[:first] == base.read_bytes()[:first]
    assert (run / "model.gguf").stat().st_size == base.stat().st_size


class LlamaCpp:
    """A GGUF file in llama.cpp, through xllamacpp."""

    def __init__(self, path, adapter=None):
        xllamacpp = pytest.importorskip("xllamacpp")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        if adapter is not None:
            parameters.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        parameters.n_ctx = 1024
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = 0
        self.server = xllamacpp.Server(parameters)

    def complete(self, prompt, tokens, **more):
        request = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0, **more}
        return self.server.handle_completions(request)["choices"][0]["text"]

    def likelier(self, prompt, words):
        """Which of two single tokens has the larger log-probability: both are raised alike, so that the best is one of them."""
        return self.complete(prompt, 1, logit_bias=[[word, 100.0] for word in words])

    def accuracy(self, dev, tokenizer):
        """On SST-2's rows, with the prompt and words of the task."""
        words = ("terrible", "great")
        ids = [tokenizer(" " + word, add_special_tokens=False).input_ids[0] for word in words]
        rows = read_rows(str(dev))
        right = sum(self.likelier(row["text"] + " It was", ids).strip() == words[int(row["label"])] for row in rows)
        return right / len(rows)


def test_llama_cpp_runs_the_tuned_file_and_measures_our_accuracy(base, run, shared_data, capsys):
    from gradless.formats.gguf_tokenizer import load_tokenizer

    dev = shared_data / "sst2" / "dev.tsv"
    assert main(["eval", str(run / "model.gguf"), str(dev), "--task", "sst2", "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["accuracy"]
    llama = LlamaCpp(run / "model.gguf")
    assert len(llama.complete("The capital of France is", 8)) > 3
    theirs = llama.accuracy(dev, load_tokenizer(base))
    print(f"accuracy: ours {ours:.4f}, llama.cpp's {theirs:.4f}")
    assert abs(theirs - ours) <= 0.01


def test_llama_cpp_applies_an_adapter_and_measures_our_accuracy(smollm2, shared_data, tmp_path, capsys):
    from gradless.formats.gguf_tokenizer import load_tokenizer

    train, dev = (str(shared_data / "sst2" / f"{split}.tsv") for split in ("train", "dev"))
    options = ["--method", "zoqo", "--lora", "8", "--steps", str(STEPS), "--schedule", "constant", "--lr", "10"]
    assert main(["tune", str(smollm2), train, "--task", "sst2", *options, "--output", str(tmp_path / "run")]) == 0
    adapter = tmp_path / "run" / "adapter"
    capsys.readouterr()
    assert main(["eval", str(smollm2), dev, "--task", "sst2", "--adapter", str(adapter), "--json"]) == 0
    ours = json.loads(capsys.readouterr().out)["accuracy"]
    theirs = LlamaCpp(smollm2, adapter.with_suffix(".gguf")).accuracy(dev, load_tokenizer(smollm2))
    print(f"accuracy with the adapter: ours {ours:.4f}, llama.cpp's {theirs:.4f}")
    assert abs(theirs - ours) <= 0.01


def test_memory_stays_within_the_file_and_a_little(smollm2):
    """benchmarks/memory.py: loading, tuning and saving, over an interpreter with its libraries and the tokenizer."""
    benchmark = Path(__file__).parents[1] / "benchmarks" / "memory.py"
    command = [sys.executable, str(benchmark), str(smollm2), "--json"]
    measured = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert measured["ours"] < measured["allowed_without_activations"]
    assert measured["ours"] < measured["dequantized"]
