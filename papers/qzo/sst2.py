"""QZO on SST-2 with SmolLM2-135M-Instruct in Q4_1: accuracy against steps and seconds, and the lines that keep it honest.

    python papers/qzo/sst2.py            # do what is still to do; stop and start again at will
    python papers/qzo/sst2.py --table    # print the table and draw docs/sst2.png from what is committed

A work list: each finished row is one line of papers/qzo/sst2.jsonl. 1000 training rows, the 872 dev rows, batch 16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DATA = ROOT.parent / "shared" / "data" / "sst2"
RESULTS = HERE / "sst2.jsonl"
RUNS = ROOT / "runs" / "papers" / "sst2"
sys.path.insert(0, str(ROOT / "benchmarks"))

WEAK = {"task": "sst2"}
STRONG = {"template": "Review: {text}\nSentiment:", "labels": "0=negative,1=positive"}
TRAIN_ROWS, BATCH, EVERY = 1000, 16, 250


def work() -> dict[str, dict[str, Any]]:
    """Every row of the table, in the order of its importance."""
    rows: dict[str, dict[str, Any]] = {"zero-shot": {"kind": "zero"}}
    rows["zero-shot, strong prompt"] = {"kind": "zero", "prompt": STRONG}
    rows["calibrated threshold"] = {"kind": "threshold"}
    rows["two-number bias fit"] = {"kind": "bias"}
    for seed in range(3):
        rows[f"QZO, 1000 steps, seed {seed}"] = {"kind": "tune", "seed": seed, "steps": 1000}
    rows["QZO from the strong prompt, 1000 steps"] = {"kind": "tune", "steps": 1000, "prompt": STRONG}
    rows["AdamW on the dense model, 50 steps"] = {"kind": "adamw", "steps": 50}
    rows["MeZO on the dense model, 1000 steps"] = {"kind": "tune", "method": "mezo", "steps": 1000}
    rows["QZO, 3000 steps"] = {"kind": "tune", "steps": 3000}
    return rows


def done() -> dict[str, dict[str, Any]]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return {row["name"]: row for row in map(json.loads, lines)}


def options(row: dict[str, Any], **more: Any) -> Any:
    from gradless.training.options import RunOptions

    return RunOptions(**{**row.get("prompt", WEAK), **more})


def dense_folder() -> Path:
    """SmolLM2 dequantized, made once."""
    from gradless.cli import main

    folder = RUNS / "dense"
    if not folder.exists() and main(["dequantize", str(model_path()), "--output", str(folder)]):
        raise SystemExit("could not dequantize the model")
    return folder


def model_path() -> Path:
    from step import default_model

    return default_model()


def zero(row: dict[str, Any]) -> dict[str, Any]:
    from gradless import run

    return run.evaluate(str(model_path()), str(DATA / "dev.tsv"), options(row))


def tune(row: dict[str, Any]) -> dict[str, Any]:
    from gradless import run
    from gradless.journal import Journal

    output = RUNS / row["name"].replace(", ", "-").replace(" ", "-")
    base = model_path() if row.get("method", "qzo") == "qzo" else dense_folder()
    chosen = options(
        row,
        eval=str(DATA / "dev.tsv"),
        method=row.get("method", "qzo"),
        steps=row["steps"],
        seed=row.get("seed", 0),
        train_rows=TRAIN_ROWS,
        batch_size=BATCH,
        eval_every=EVERY,
        output=str(output),
        resume=(output / "journal.db").exists(),
        allow_changes=True,
    )
    summary = run.tune(str(base), str(DATA / "train.tsv"), chosen)
    if not summary["finished"]:
        raise SystemExit("stopped; run this script again to go on")
    journal = Journal.open(output / "journal.db")
    curve = journal.evaluations()
    lr, eps = journal.header["groups"][0]["lr"], journal.header["groups"][0]["eps"]
    journal.close()
    return {
        **summary["after"],
        "curve": curve,
        "seconds": summary["seconds"],
        "lr": lr,
        "eps": eps,
        "rounding": summary.get("rounding"),
    }


def score_gaps(split: str) -> tuple[Any, Any]:
    """(score of `great` minus score of `terrible`, label) of every row under the weak prompt, untuned."""
    import torch

    from gradless import objectives, run

    loaded = run.load_model(model_path())
    limit = {"limit": TRAIN_ROWS, "shuffled": True} if split == "train" else {}
    examples = run.prepare(str(DATA / f"{split}.tsv"), loaded, options({}), **limit).examples
    gaps, labels = [], []
    with torch.inference_mode():
        for batch in objectives.batches(examples, 32):
            made = objectives.collate(batch)
            gaps += [float(s[1] - s[0]) for s in objectives.scores(loaded.model, made)]
            labels += made["labels"].tolist()
    return torch.tensor(gaps), torch.tensor(labels)


def threshold(_row: dict[str, Any]) -> dict[str, Any]:
    """No labels: call positive what lies above the dev rows' own median."""
    gaps, labels = score_gaps("dev")
    return {"accuracy": ((gaps > gaps.median()) == labels.bool()).float().mean().item(), "examples": len(labels)}


def bias(_row: dict[str, Any]) -> dict[str, Any]:
    """A factor and a bias on the score gap, fit to the 1000 training rows by logistic regression."""
    import torch

    gaps, labels = score_gaps("train")
    fit = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.LBFGS([fit], max_iter=100)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(fit[0] * gaps + fit[1], labels.float())
        loss.backward()
        return loss

    optimizer.step(closure)
    gaps, labels = score_gaps("dev")
    logits = (fit[0] * gaps + fit[1]).detach()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels.float()).item()
    return {"accuracy": ((logits > 0) == labels.bool()).float().mean().item(), "loss": loss, "examples": len(labels)}


def adamw(row: dict[str, Any]) -> dict[str, Any]:
    """First-order AdamW (lr 2e-5, constant) on all weights of the dense model: what backpropagation reaches."""
    import torch

    from gradless import noise, objectives, run

    loaded = run.load_model(dense_folder())
    train = run.prepare(str(DATA / "train.tsv"), loaded, options({}), limit=TRAIN_ROWS, shuffled=True).examples
    dev = run.prepare(str(DATA / "dev.tsv"), loaded, options({})).examples
    model = loaded.model.float().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)
    curve, seconds, order = [], 0.0, noise.permutation(0, 0, len(train)).tolist()
    torch.set_float32_matmul_precision("medium")
    for step in range(row["steps"] + 1):
        if step % 25 == 0:
            metrics = objectives.evaluate(model, dev, loaded.tokenizer)
            curve.append({"step": step, "seconds": seconds, **metrics})
            print(curve[-1], flush=True)
        if step < row["steps"]:
            began = time.perf_counter()
            start = step * BATCH % (len(order) - BATCH)
            batch = objectives.collate([train[i] for i in order[start : start + BATCH]])
            loss = objectives.losses(model, batch)[0].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds += time.perf_counter() - began
    return {**metrics, "examples": len(dev), "curve": curve, "seconds": seconds, "lr": 2e-5}


KINDS = {"zero": zero, "tune": tune, "threshold": threshold, "bias": bias, "adamw": adamw}


def table() -> str:
    finished = done()
    lines = ["| row | n | accuracy | loss | seconds |", "|---|---|---|---|---|"]
    for name in work():
        row = finished.get(name)
        if row is None:
            lines.append(f"| {name} | – | still to run | | |")
            continue
        loss = f"{row['loss']:.4f}" if "loss" in row else "–"
        lines.append(f"| {name} | {row['examples']} | {row['accuracy']:.4f} | {loss} | {row.get('seconds', 0):.0f} |")
    three = [finished[name]["accuracy"] for name in (f"QZO, 1000 steps, seed {s}" for s in range(3)) if name in finished]
    if len(three) > 1:
        mean, spread = statistics.mean(three), statistics.stdev(three)
        lines.append(f"| **QZO, 1000 steps, mean of {len(three)} seeds** | 872 | {mean:.4f} ± {spread:.4f} | | |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for name, row in done().items():
        if "curve" in row and name in work():
            for axis, key in zip(axes, ("step", "seconds"), strict=True):
                axis.plot([p[key] for p in row["curve"]], [p["accuracy"] for p in row["curve"]], "o-", markersize=3, label=name)
    for axis, label in zip(axes, ("step", "seconds"), strict=True):
        axis.set(xlabel=label, ylabel="SST-2 dev accuracy", xscale="symlog")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="print the table and draw the curves; run nothing")
    parser.add_argument("--only", help="do only rows whose name contains this")
    arguments = parser.parse_args()
    if not arguments.table:
        for name, row in work().items():
            if name in done() or (arguments.only and arguments.only not in name):
                continue
            print(f"== {name}", flush=True)
            result = {
                "name": name,
                **{k: v for k, v in row.items() if k != "kind"},
                **KINDS[row["kind"]]({"name": name, **row}),
            }
            result["threads"] = __import__("torch").get_num_threads()
            with RESULTS.open("a") as file:
                file.write(json.dumps(result) + "\n")
    else:
        draw(ROOT / "docs" / "sst2.png")
    print(table())


if __name__ == "__main__":
    main()
