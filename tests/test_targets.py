"""Which modules are tuned, models by name, and the card of a run."""

import json
import shutil

import pytest

from gradless.cli import main
from gradless.errors import GradlessError
from gradless.formats.hub import local
from gradless.formats.load import load
from gradless.journal import Journal
from gradless.targets import Targets
from tests.test_cli import TASK

PLACES = [(f"model.layers.{i}.{name}", f"blk.{i}.{name}") for i in range(2) for name in ("attn.q_proj", "mlp.up_proj")]
PLACES.append(("lm_head", "token_embd"))
LINEAR = [name for _, name in PLACES[:-1]]


@pytest.mark.parametrize(
    ("target", "exclude", "expected"),
    [
        (None, None, LINEAR),
        ("all-linear", None, LINEAR),
        ("q_proj", None, ["blk.0.attn.q_proj", "blk.1.attn.q_proj"]),
        ("q_proj,up_proj", None, LINEAR),
        ("proj,lm_head", None, ["token_embd"]),
        ("model.layers.1.mlp.up_proj", None, ["blk.1.mlp.up_proj"]),
        (r".*layers\.0\..*", None, ["blk.0.attn.q_proj", "blk.0.mlp.up_proj"]),
        (None, "q_proj", ["blk.0.mlp.up_proj", "blk.1.mlp.up_proj"]),
        (r".*_proj", r".*\.0\..*", ["blk.1.attn.q_proj", "blk.1.mlp.up_proj"]),
    ],
)
def test_patterns_choose_as_pefts_do(target, exclude, expected):
    assert Targets(target, exclude).choose(PLACES, LINEAR) == expected


@pytest.mark.parametrize(
    "target", ["q_proj", "q_proj,up_proj", "proj,lm_head", r".*layers\.0\..*", "model.layers.1.mlp.up_proj"]
)
def test_peft_itself_agrees(target):
    tuners = pytest.importorskip("peft.tuners.tuners_utils")
    from peft import LoraConfig

    given = target if "*" in target else target.split(",")
    config = LoraConfig(target_modules=given)
    theirs = [name for path, name in PLACES if tuners.check_target_module_exists(config, path)]
    assert Targets(target).choose(PLACES, LINEAR) == theirs


def test_patterns_that_choose_nothing():
    with pytest.raises(GradlessError, match="there are lm_head, q_proj, up_proj"):
        Targets("k_proj").choose(PLACES, LINEAR)
    with pytest.raises(GradlessError, match="neither names nor a regular expression"):
        Targets("q_proj(").choose(PLACES, LINEAR)


@pytest.mark.parametrize("method", ["qzo", "quzo"])
def test_only_the_chosen_modules_are_tuned(tiny, rows, tmp_path, method):
    arguments = [str(rows), *TASK, "--batch-size", "4", "--steps", "2", "--method", method]
    chosen = ["--target-modules", "q_proj,lm_head", "--exclude-modules", r".*layers\.1\..*"]
    assert main(["tune", str(tiny), *arguments, *chosen, "--output", str(tmp_path / "run")]) == 0
    journal = Journal.open(tmp_path / "run" / "journal.db")
    names = {name for group in journal.header["groups"] for name in group["names"]}
    journal.close()
    assert names == {"token_embd.weight", "blk.0.attn_q.weight"}
    before, after = load(tiny).file, load(tmp_path / "run" / "model.gguf").file
    differing = {name for name in before.quantized if not before.contents[name].equal(after.contents[name])}
    assert differing <= names
    replay = ["replay", str(tiny), str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "again.gguf")]
    assert main(replay) == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "run" / "model.gguf").read_bytes()


@pytest.fixture
def cached(tiny, tmp_path, monkeypatch):
    """A Hub's cache that holds org/dense and org/ggufs."""
    cache = tmp_path / "hub"
    for name in ("dense", "ggufs"):
        snapshot = cache / f"models--org--{name}" / "snapshots" / "0123"
        snapshot.mkdir(parents=True)
        (cache / f"models--org--{name}" / "refs").mkdir()
        (cache / f"models--org--{name}" / "refs" / "main").write_text("0123")
    assert main(["dequantize", str(tiny), "--output", str(cache / "dense")]) == 0
    shutil.copytree(cache / "dense", cache / "models--org--dense" / "snapshots" / "0123", dirs_exist_ok=True)
    shutil.copy(tiny, cache / "models--org--ggufs" / "snapshots" / "0123" / "tiny.gguf")
    for module in ("constants", "file_download", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(cache), raising=False)
    return cache


def test_models_are_found_in_the_hubs_cache_by_name(cached, rows, tmp_path, capsys):
    assert local("org/dense") == cached / "models--org--dense" / "snapshots" / "0123"
    arguments = ["tune", "org/ggufs/tiny.gguf", str(rows), *TASK, "--batch-size", "4", "--steps", "2"]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 0
    replay = ["replay", "org/ggufs/tiny.gguf", str(tmp_path / "run" / "journal.db"), "--output", str(tmp_path / "again.gguf")]
    assert main(replay) == 0
    assert (tmp_path / "again.gguf").read_bytes() == (tmp_path / "run" / "model.gguf").read_bytes()
    assert 'base_model: "org/ggufs/tiny.gguf"' in (tmp_path / "run" / "README.md").read_text()
    assert main(["eval", "org/missing", str(rows), *TASK]) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "there is no file or folder org/missing, none of that name in the Hub's cache, and HF_HUB_OFFLINE forbids" in said


def test_a_folders_own_python_is_not_run(cached, rows, capsys):
    folder = cached / "dense"
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config", "AutoModelForCausalLM": "strange.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text("raise SystemExit('was run')")
    assert main(["eval", str(folder), str(rows), *TASK]) == 1
    assert "not run unless you trust it (--trust-remote-code)" in " ".join(capsys.readouterr().err.split())


def test_a_run_leaves_a_card_whose_command_rebuilds_the_model(tiny, rows, tmp_path):
    output = tmp_path / "run"
    arguments = ["tune", str(tiny), str(rows), *TASK, "--batch-size", "4", "--steps", "2", "--eval", str(rows)]
    assert main([*arguments, "--output", str(output)]) == 0
    card = (output / "README.md").read_text()
    front, _, text = card.removeprefix("---\n").partition("---\n")
    assert 'tags: ["gradless", "zeroth-order", "qzo"]' in front
    assert "base_model" not in front
    journal = Journal.open(output / "journal.db")
    for part in (journal.header["base"], journal.header["data"], "QZO", "2 of batch 4 (0 skipped)", "accuracy", "loss.png"):
        assert part in text
    journal.close()
    (command,) = (line.strip() for line in text.splitlines() if line.strip().startswith("gradless replay"))
    replay = command.split()[1:]
    replay[replay.index("journal.db")] = str(output / "journal.db")
    replay[replay.index("model.gguf")] = str(tmp_path / "again.gguf")
    assert main(replay) == 0
    assert (tmp_path / "again.gguf").read_bytes() == (output / "model.gguf").read_bytes()
