"""QuZO, ZOQO, QZO and MeZO on SST-2 with SmolLM2-135M: the integer weights themselves against scales and plain weights.

    python papers/quzo/sst2.py            # do what is still to do; stop and start again at will
    python papers/quzo/sst2.py --table    # print the table from what is committed

A work list: each finished row is one line of papers/quzo/sst2.jsonl. 1000 training rows, the 872 dev rows, batch 16, prompt
`{text} It was`, linear schedule. Packed models are the dequantized SmolLM2 rounded to nearest (`gradless quantize`).
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import DATA, WEAK, Row, WorkList, model_path

STEPS = 500
PACKED = {"int8": {"bits": 8}, "int4": {"bits": 4}, "fp8": {"grid": "fp8"}, "nf4": {"grid": "nf4"}}


def rows() -> dict[str, Row]:
    """Every row of the table, in the order of its importance: three seeds for the main ones."""
    made: dict[str, Row] = {f"zero-shot, {name}": {"kind": "zero", "model": name} for name in ("dense", "q4_1", *PACKED)}
    main = {
        "QuZO, int8": {"model": "int8", "method": "quzo", "eps": 3.0, "lr": 3.0},
        "ZOQO, int8": {"model": "int8", "method": "zoqo", "eps": 3.0, "lr": 0.1},
        "QuZO, Q4_1": {"model": "q4_1", "method": "quzo", "eps": 0.03, "lr": 3e-4},
        "ZOQO, Q4_1": {"model": "q4_1", "method": "zoqo", "share": 0.02, "lr": 0.03},
        "MeZO, bf16": {"model": "dense", "method": "mezo", "eps": 5e-3, "lr": 2.5e-5},
        "QZO, Q4_1": {"model": "q4_1", "method": "qzo"},
    }
    other = {
        "QuZO, fp8": {"model": "fp8", "method": "quzo", "eps": 0.5, "lr": 0.1},
        "QuZO, int4": {"model": "int4", "method": "quzo", "eps": 0.03, "lr": 3e-4},
        "QuZO, nf4": {"model": "nf4", "method": "quzo", "eps": 0.03, "lr": 3e-4},
        "QuZO, int8, Q-RGE2": {"model": "int8", "method": "quzo", "eps": 3.0, "lr": 3.0, "roundings": 2},
        "QuZO, Q4_1, Q-RGE2": {"model": "q4_1", "method": "quzo", "eps": 0.03, "lr": 3e-4, "roundings": 2},
        "ZOQO, int8, as in the paper": {
            "model": "int8",
            "method": "zoqo",
            "eps": 1.0,
            "lr": 1.0,
            "distribution": "uniform",
            "whole_steps": True,
        },
    }
    for name, row in main.items():
        for seed in range(3):
            made[f"{name}, seed {seed}"] = {"kind": "tune", **row, "steps": STEPS, "seed": seed}
    for name, row in other.items():
        made[f"{name}, seed 0"] = {"kind": "tune", **row, "steps": STEPS, "seed": 0}
    return made


def base(name: str) -> Path:
    """The named model, made where it has to be."""
    from gradless import run
    from gradless.training.options import RunOptions

    if name == "q4_1":
        return model_path()
    dense = WORK.dense_folder()
    folder = WORK.runs / "models" / name
    if name != "dense" and not folder.exists():
        run.quantize(run.load_model(dense), folder, RunOptions(**PACKED[name]))
    return dense if name == "dense" else folder


def zero(row: Row) -> Row:
    from gradless import run
    from gradless.training.options import RunOptions

    return run.evaluate(str(base(row["model"])), str(DATA / "dev.tsv"), RunOptions(**WEAK))


def tune(row: Row) -> Row:
    return WORK.tune(row, base(row["model"]), every=100)


def table(done: dict[str, Row]) -> str:
    lines = ["| row | n | accuracy | loss | s a step | peak MB | codes moved a step |", "|---|---|---|---|---|---|---|"]
    for name in WORK.rows:
        row = done.get(name)
        if row is None:
            lines.append(f"| {name} | – | still to run | | | | |")
            continue
        step = f"{row['seconds_a_step']:.2f}" if "seconds_a_step" in row else "–"
        moved = f"{row['moved_a_step']:.3%}" if row.get("moved_a_step") is not None else "–"
        numbers = f"{row['accuracy']:.4f} | {row['loss']:.4f} | {step} | {row['peak_mb']} | {moved}"
        lines.append(f"| {name} | {row['examples']} | {numbers} |")
    for start in dict.fromkeys(name.rsplit(", seed", 1)[0] for name in done if ", seed" in name):
        seeds = [row["accuracy"] for name, row in done.items() if name.rsplit(", seed", 1)[0] == start]
        if len(seeds) > 1:
            lines.append(
                f"| **{start}, {len(seeds)} seeds** | 872 | {statistics.mean(seeds):.4f} ± {statistics.stdev(seeds):.4f} |"
            )
    return "\n".join(lines)


WORK = WorkList(Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune})

if __name__ == "__main__":
    WORK.main(__doc__, table)
