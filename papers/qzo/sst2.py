"""QZO on SST-2 with SmolLM2-135M-Instruct in Q4_1: accuracy against steps and seconds, and the lines that keep it honest.

    python papers/qzo/sst2.py            # do what is still to do; stop and start again at will
    python papers/qzo/sst2.py --table    # print the table and draw docs/sst2.png from what is committed

A work list: each finished row is one line of papers/qzo/sst2.jsonl. 1000 training rows, the 872 dev rows, batch 16.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gradless.formats.load import load
from gradless.tasks.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import DATA, ROOT, TRAIN_ROWS, WEAK, Row, WorkList, figure, model_path

STRONG = {"template": "Review: {text}\nSentiment:", "labels": "0=negative,1=positive"}


def rows() -> dict[str, Row]:
    """Every row of the table, in the order of its importance."""
    made: dict[str, Row] = {"zero-shot": {"kind": "zero"}}
    made["zero-shot, strong prompt"] = {"kind": "zero", "prompt": STRONG}
    made["calibrated threshold"] = {"kind": "threshold"}
    made["two-number bias fit"] = {"kind": "bias"}
    for seed in range(3):
        made[f"QZO, 1000 steps, seed {seed}"] = {"kind": "tune", "seed": seed, "steps": 1000}
    for seed in range(3):
        row = {"kind": "tune", "seed": seed, "steps": 1000, "activations": "int8"}
        made[f"QZO, int8 activations, 1000 steps, seed {seed}"] = row
    made["QZO from the strong prompt, 1000 steps"] = {"kind": "tune", "steps": 1000, "prompt": STRONG}
    made["AdamW on the dense model, 50 steps"] = {"kind": "adamw", "steps": 50}
    made["MeZO on the dense model, 1000 steps"] = {"kind": "tune", "method": "mezo", "steps": 1000, "lr": 1e-5}
    made["QZO, 3000 steps"] = {"kind": "tune", "steps": 3000}
    return made


def options(row: Row) -> Any:
    from gradless.training.options import RunOptions

    return RunOptions(**row.get("prompt", WEAK))


def zero(row: Row) -> Row:
    from gradless import run

    return run.evaluate(str(model_path()), str(DATA / "dev.tsv"), options(row))


def tune(row: Row) -> Row:
    return WORK.tune(row, WORK.dense_folder() if row.get("method") == "mezo" else model_path())


def score_gaps(split: str) -> tuple[Any, Any]:
    """(score of `great` minus score of `terrible`, label) of every row under the weak prompt, untuned."""
    import torch

    from gradless import objectives

    loaded = load(model_path())
    limit = {"limit": TRAIN_ROWS, "shuffled": True} if split == "train" else {}
    examples = prepare(str(DATA / f"{split}.tsv"), loaded, options({}), **limit).examples
    gaps, labels = [], []
    with torch.inference_mode():
        for batch in objectives.batches(examples, 32):
            made = objectives.collate(batch)
            gaps += [float(s[1] - s[0]) for s in objectives.scores(loaded.model, made)]
            labels += made.labels.tolist()
    return torch.tensor(gaps), torch.tensor(labels)


def threshold(_row: Row) -> Row:
    """No labels: call positive what lies above the dev rows' own median."""
    gaps, labels = score_gaps("dev")
    return {"accuracy": ((gaps > gaps.median()) == labels.bool()).float().mean().item(), "examples": len(labels)}


def bias(_row: Row) -> Row:
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


def adamw(row: Row) -> Row:
    """First-order AdamW on all weights of the dense model: what backpropagation reaches."""

    return WORK.first_order(load(WORK.dense_folder()), row["steps"])


def table(finished: dict[str, Row]) -> str:
    WORK.draw([name for name in WORK.rows if name in finished], ROOT / "docs" / "sst2.png", ("accuracy",))
    columns = {"n": figure("examples", ""), "accuracy": figure("accuracy"), "loss": figure("loss")}
    columns["seconds"] = lambda row: f"{row.get('seconds', 0):.0f}"
    lines = WORK.table(finished, columns)
    return "\n".join(lines)


WORK = WorkList(
    Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune, "threshold": threshold, "bias": bias, "adamw": adamw}
)

if __name__ == "__main__":
    WORK.main(__doc__, table)
