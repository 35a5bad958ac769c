"""What every method learns from a forward, and in a second: SST-2 on SmolLM2-135M, against forwards and against seconds.

    python benchmarks/learning.py              # do what is still to do; stop and start again at will
    python benchmarks/learning.py --table      # print the table from what is committed, and draw docs/learning.png

A work list: a finished row is one line of benchmarks/learning.jsonl. 1000 training rows, batch 16, `{text} It was`, all 872 dev
rows. A forward is one of a batch's tokens through the model: QZO, EZO, QuZO, ZOQO and MeZO pass twice as many a step; NZO the
batch and 2 q tokens an example; AdamW is counted as three, a backward taking about two. Seconds are the machine's that ran a
row, measurements among them, so compare rows of one machine with nothing beside them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "papers"))

from worklist import DATA, ROOT, TRAIN_ROWS, WEAK, Row, WorkList, figure, model_path

EVERY = 50
PLAIN = "QZO, 600 steps"


def rows() -> dict[str, Row]:
    """Every row: the method, its steps and its seed."""
    made: dict[str, Row] = {}

    def tuned(name: str, steps: int, seeds: int = 3, **options: Any) -> None:
        for seed in range(seeds):
            row = {"kind": "tune", "base": "Q4_1", "steps": steps, "seed": seed, **options}
            made[f"{name}, {steps} steps, seed {seed}"] = row

    tuned("NZO", 250, method="nzo")
    tuned("QZO", 600, method="qzo")
    made["AdamW, 100 steps"] = {"kind": "adamw", "steps": 100}
    tuned("EZO", 200, 1, method="ezo")
    tuned("QuZO", 400, 1, method="quzo")
    tuned("ZOQO", 400, 1, method="zoqo")
    tuned("MeZO", 400, 1, method="mezo", base="dense")
    return made


def forwards_a_step(row: Row) -> float:
    """How many times a step passes its batch's tokens."""
    if row["kind"] == "adamw":
        return 3.0
    if row["method"] != "nzo":
        return 2.0
    from gradless import run
    from gradless.training.options import RunOptions

    loaded, options = run.load_model(model_path()), RunOptions(**WEAK, method="nzo", seed=row["seed"])
    examples = run.prepare(str(DATA / "train.tsv"), loaded, options, limit=TRAIN_ROWS, shuffled=True).examples
    return 1 + 2 * options.queries * len(examples) / sum(len(example.prompts[0]) for example in examples)


def counted(row: Row, found: Row) -> Row:
    """A row's results with the forwards at each point of its curve."""
    each = forwards_a_step(row)
    curve = [{**point, "forwards": point["step"] * each} for point in found["curve"]]
    return {**found, "curve": curve, "forwards_a_step": each}


def tune(row: Row) -> Row:
    base = WORK.dense_folder() if row["base"] == "dense" else model_path()
    return counted(row, WORK.tune(row, base, EVERY))


def adamw(row: Row) -> Row:
    from gradless import run

    return counted(row, WORK.first_order(run.load_model(WORK.dense_folder()), row["steps"]))


def forwards_to(loss: float, row: Row) -> float | None:
    """The forwards after which a row's dev loss is first measured at or below `loss`; None if it never is."""
    return next((point["forwards"] for point in row.get("curve", ()) if point["loss"] <= loss), None)


def table(done: dict[str, Row]) -> str:
    plain = [row["loss"] for name, row in done.items() if name.startswith(PLAIN)]
    reached = {}
    if plain:
        mean = sum(plain) / len(plain)
        reached = {f"forwards to {mean:.4f}": lambda row: f"{forwards_to(mean, row) or '–'}"}
    columns = {"accuracy": figure("accuracy"), "loss": figure("loss"), "forwards a step": figure("forwards_a_step", ".2f")}
    columns |= {**reached, "seconds": figure("seconds", ".0f"), "peak MB": figure("peak_mb", "")}
    finished = [name for name in WORK.rows if "curve" in done.get(name, ())]
    WORK.draw(finished, ROOT / "docs" / "learning.png", ("loss", "accuracy"), along=("forwards", "seconds"))
    return "\n".join(WORK.table(done, columns))


WORK = WorkList(Path(__file__).resolve(), rows(), {"tune": tune, "adamw": adamw})

if __name__ == "__main__":
    WORK.main(__doc__, table)
