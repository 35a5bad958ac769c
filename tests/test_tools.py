"""Slow: checkpoints that the formats' own tools made of a real model, tuned here, and opened by these tools again."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gradless import kernels, run
from gradless.cli import main
from gradless.formats.folder import Folder
from gradless.formats.load import load
from gradless.tasks.prepare import prepare
from gradless.training.options import RunOptions
from tests.test_checkpoints import contents, weights_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
PYTHON = ROOT / ".venv-tools" / "bin" / "python"
KEPT = ROOT / "runs" / "tools"
"""Where the checkpoints stay: making them takes a quarter of an hour, once."""
ROWS, FEW_ROWS, STEPS = 400, 200, 30
"""To score by a tool; few of them where its kernel takes a token at a time, on one thread (AQLM's for CPUs)."""
FP16, BF16 = 2.0**-11, 2.0**-7
MADE = {
    "gptq": (["gptq", "--samples", "64"], FP16),
    "gptq-3, act-order": (["gptq", "--bits", "3", "--asymmetric", "--act-order", "--samples", "16"], FP16),
    "gptq-v2, 8 bits, a group a row": (["gptq-v2", "--bits", "8", "--group", "-1", "--samples", "16"], FP16),
    "awq": (["awq", "--samples", "16"], FP16),
    "auto-round": (["auto-round", "--samples", "16", "--iterations", "4"], FP16),
    "nf4": (["bnb-nf4"], BF16),
    "nf4, double": (["bnb-nf4", "--double"], 2 * BF16),
    "fp4": (["bnb-fp4"], BF16),
    "int8": (["bnb-int8"], BF16),
    "aqlm": (["aqlm", "--iterations", "6"], 2.0**-20),
}
"""How each is made, and how exact the tool's own weights are: by the type that it computes them in."""


def tool(*arguments: object) -> None:
    environment = os.environ | {"NUMBA_NUM_THREADS": "1"}  # AQLM's kernel for CPUs has a race
    command = [str(PYTHON), str(ROOT / "papers/qzo/checkpoints.py"), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def dense(smollm2, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dense") / "smollm2"
    assert main(["dequantize", str(smollm2), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module", params=MADE)
def made(request, dense, shared_data, tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip("needs the formats' own tools (make tools)")
    arguments, exact = MADE[request.param]
    folder = KEPT / "".join(c if c.isalnum() else "-" for c in request.param)
    if not folder.exists():
        text = tmp_path_factory.mktemp("made") / "text.txt"
        lines = [line.partition("\t")[0] for line in (shared_data / "agnews" / "dev.tsv").read_text().splitlines()]
        text.write_text("\n".join(line for line in lines if len(line) > 250))
        KEPT.mkdir(parents=True, exist_ok=True)
        tool("make", *arguments, "--dense", dense, "--text", text, "--output", folder)
    return folder, exact


def test_our_weights_are_the_tools(made, tmp_path):
    folder, exact = made
    tool("weights", "--model", folder, "--output", tmp_path / "weights.safetensors")
    theirs, ours = load_file(tmp_path / "weights.safetensors"), weights_of(Folder.open(folder))
    assert {name + ".weight" for name in theirs} == set(ours)
    for name, weight in theirs.items():
        difference = (ours[name + ".weight"] - weight).abs()
        assert (difference <= exact * weight.abs() + 2.0**-20).all(), (name, float(difference.max()))


def test_a_tuned_checkpoint_is_the_tools_own(made, shared_data, tmp_path):
    """Tuned by QZO: the same tensors, and, opened by the tool through transformers, our accuracy within a point."""
    folder, _ = made
    sst2 = shared_data / "sst2"
    arguments = ["tune", str(folder), str(sst2 / "train.tsv"), "--task", "sst2", "--steps", str(STEPS), "--lr", "1e-3"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    tuned = tmp_path / "run" / "model"
    before, after = contents(folder), contents(tuned)
    assert {name: (t.dtype, t.shape) for name, t in after.items()} == {name: (t.dtype, t.shape) for name, t in before.items()}
    assert (tuned / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert any(not torch.equal(before[name], after[name]) for name in before)

    loaded, options = load(tuned), RunOptions(task="sst2")
    rows = FEW_ROWS if folder.name == "aqlm" else ROWS
    examples = prepare(str(sst2 / "dev.tsv"), loaded, options, limit=rows).examples
    ours = run.measure(loaded, examples, 16, quiet=True)["accuracy"]
    prompts = [torch.tensor(example.prompts[0]) for example in examples]
    save_file(
        {
            "ids": torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True),
            "lengths": torch.tensor([len(prompt) for prompt in prompts]),
            "candidates": torch.tensor(examples[0].words),
        },
        tmp_path / "prompts.safetensors",
    )
    tool("scores", "--model", tuned, "--prompts", tmp_path / "prompts.safetensors", "--output", tmp_path / "scores.safetensors")
    labels = load_file(tmp_path / "scores.safetensors")["scores"].argmax(1)
    theirs = sum(int(label) == example.label for label, example in zip(labels, examples, strict=True)) / rows
    print(json.dumps({"format": folder.name, "rows": rows, "ours": ours, "theirs": theirs, "kernels": kernels.name()}))
    assert abs(ours - theirs) <= 0.01
