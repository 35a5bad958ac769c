"""What every method learns from a forward, and in a second, against forwards and against seconds: SmolLM2-135M in Q4_1.

    python benchmarks/learning.py              # do what is still to do; stop and start again at will
    python benchmarks/learning.py --table      # print the table from what is committed, and draw docs/learning.png

A work list: a finished row is one line of benchmarks/learning.jsonl. SST-2 (`{text} It was`, all 872 dev rows) unless a row
says AG News (500 test rows) or RTE; 1000 training rows (RTE: all 2490, but for AdamW), batch 16. A forward is one of a
batch's tokens through the model: QZO, EZO, QuZO, ZOQO and MeZO pass twice as many a step; NZO the batch and 2 q tokens an
example; AdamW is counted as three, a backward taking about two; forwards before the first step (some 15 of NZO's
calibration, and the probe of eps of EZO and MeZO) are left out. Seconds are the machine's that ran a row, measurements among
them but for AdamW, so compare rows of one machine with nothing beside them. The last two columns are of the first 400 dev
rows after `random.Random(0).shuffle`.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from gradless.formats.load import load
from gradless.tasks.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1] / "papers"))

from worklist import DATA, FIRST_ROWS, MODELS, ROOT, TASKS, TRAIN_ROWS, WEAK, Row, WorkList, figure, shuffled

MEASURED = 5
PLAIN = "QZO, 600 steps"


def rows() -> dict[str, Row]:
    """Every row: the method, its steps and its seed."""
    made: dict[str, Row] = {}

    def tuned(name: str, steps: int, seeds: int = 3, **options: Any) -> None:
        for seed in range(seeds):
            row = {"kind": "tune", "on": "SST-2", "base": "SmolLM2", "steps": steps, "seed": seed, **options}
            made[f"{name}, {steps} steps, seed {seed}"] = row

    def first_order(on: str) -> None:
        made[f"{'' if on == 'SST-2' else on + ', '}AdamW, 100 steps"] = {"kind": "adamw", "on": on, "steps": 100}

    tuned("NZO", 250, method="nzo")
    tuned("QZO", 600, method="qzo")
    first_order("SST-2")
    tuned("AG News, NZO", 250, on="AG News", method="nzo")
    first_order("AG News")
    tuned("gemma3, NZO", 250, 1, method="nzo", base="gemma3")
    tuned("EZO", 200, 1, method="ezo")
    tuned("QuZO", 400, 1, method="quzo")
    tuned("ZOQO", 400, 1, method="zoqo")
    tuned("MeZO", 400, 1, method="mezo", base="dense")
    tuned("RTE, NZO", 250, on="RTE", method="nzo", train_rows=None)
    first_order("RTE")
    return made


def forwards_a_step(row: Row) -> float:
    """How many times a step passes its batch's tokens."""
    if row["kind"] == "adamw":
        return 3.0
    if row["method"] != "nzo":
        return 2.0
    from gradless.training.options import RunOptions

    train, _, how = TASKS[row["on"]]
    loaded, options = load(MODELS[row["base"]]()), RunOptions(**how, method="nzo", seed=row["seed"])
    examples = prepare(str(train), loaded, options, limit=row.get("train_rows", TRAIN_ROWS), shuffled=True).examples
    return 1 + 2 * options.queries * len(examples) / sum(len(example.prompts[0]) for example in examples)


def counted(row: Row, found: Row) -> Row:
    """A row's results with the forwards at each point of its curve."""
    each = forwards_a_step(row)
    curve = [{**point, "forwards": point["step"] * each} for point in found["curve"]]
    return {**found, "curve": curve, "forwards_a_step": each}


def on_first_rows(row: Row, loaded: Any) -> Row:
    """A tuned model's figures on the first 400 shuffled rows, where it was tuned on SST-2."""
    from gradless import run
    from gradless.training.options import RunOptions

    if row["on"] != "SST-2":
        return {}
    rows = (DATA / "dev.tsv").read_text().splitlines()
    path = WORK.runs / "first-rows.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(rows[i] for i in shuffled(len(rows))[:FIRST_ROWS]) + "\n")
    metrics = run.measure(loaded, prepare(str(path), loaded, RunOptions(**WEAK)).examples, 32, quiet=True)
    return {"first_accuracy": metrics["accuracy"], "first_loss": metrics["loss"]}


def tune(row: Row) -> Row:

    base = WORK.dense_folder() if row["base"] == "dense" else MODELS[row["base"]]()
    train, dev, how = TASKS[row["on"]]
    found = counted(row, WORK.tune({**row, "prompt": how}, base, row["steps"] // MEASURED, train, dev))
    (tuned,) = WORK.folder(row["name"]).glob("model*")
    return {**found, **on_first_rows(row, load(tuned))}


def adamw(row: Row) -> Row:

    loaded = load(WORK.dense_folder())
    found = counted(row, WORK.first_order(loaded, row["steps"], task=row["on"]))
    return {**found, **on_first_rows(row, loaded)}


def of_plain_model(row: Row) -> bool:
    """Whether a row is of SST-2 on SmolLM2, quantized or dense, so that its losses are those of plain QZO's data."""
    return row["on"] == "SST-2" and row.get("base") != "gemma3"


def forwards_to(loss: float, row: Row) -> str:
    """The forwards after which a row's dev loss is first measured at or below `loss`; a dash if it never is."""
    if not of_plain_model(row):
        return "–"
    return next((f"{point['forwards']:.0f}" for point in row.get("curve", ()) if point["loss"] <= loss), "–")


def table(done: dict[str, Row]) -> str:
    plain = [row["loss"] for name, row in done.items() if name.startswith(PLAIN)]
    reached = {}
    if plain:
        mean = sum(plain) / len(plain)
        reached = {f"forwards to {mean:.4f}": partial(forwards_to, mean)}
    columns = {"accuracy": figure("accuracy"), "loss": figure("loss"), "forwards a step": figure("forwards_a_step", ".2f")}
    columns |= {**reached, "seconds": figure("seconds", ".0f"), "peak MB": figure("peak_mb", "")}
    columns |= {f"accuracy, {FIRST_ROWS} rows": figure("first_accuracy"), f"loss, {FIRST_ROWS} rows": figure("first_loss")}
    finished = [name for name, row in WORK.rows.items() if of_plain_model(row) and "curve" in done.get(name, ())]
    WORK.draw(finished, ROOT / "docs" / "learning.png", ("loss", "accuracy"), along=("forwards", "seconds"))
    return "\n".join(WORK.table(done, columns))


WORK = WorkList(Path(__file__).resolve(), rows(), {"tune": tune, "adamw": adamw})

if __name__ == "__main__":
    WORK.main(__doc__, table)
