"""QuZO, ZOQO, QZO and MeZO on SST-2 with SmolLM2-135M: the integer weights themselves against scales and plain weights.

    python papers/quzo/sst2.py            # do what is still to do; stop and start again at will
    python papers/quzo/sst2.py --table    # print the table from what is committed

A work list: each finished row is one line of papers/quzo/sst2.jsonl. 1000 training rows, the 872 dev rows, batch 16, prompt
`{text} It was`, linear schedule. Packed models are the dequantized SmolLM2 rounded to nearest (`gradless quantize`).
"""

from __future__ import annotations

import sys
from pathlib import Path

from gradless.formats.load import load

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import DATA, WEAK, Row, WorkList, figure, model_path

STEPS, LONG, FIRST_ORDER = 400, 2000, 50
PACKED = {
    "int8": {"bits": 8},
    "int4": {"bits": 4},
    "fp8": {"grid": "fp8"},
    "fp8 a row": {"grid": "fp8", "group_size": "channel"},
    "fp8-e5m2": {"grid": "fp8-e5m2"},
    "nf4": {"grid": "nf4"},
}
PAPER = {"stateless": True, "stride": 1, "span": 1}
"""No residual, and every code tuned by itself."""
ZOQO_PAPER = {"method": "zoqo", "eps": 1.0, "lr": 1.0, "distribution": "uniform", "whole_steps": True, "stride": 1, "span": 1}


def rows() -> dict[str, Row]:
    """Every row of the table, in the order of its importance: three seeds for the main ones."""
    made: dict[str, Row] = {f"zero-shot, {name}": {"kind": "zero", "model": name} for name in ("dense", "q4_1", *PACKED)}
    for name, activations in (("int8", "int8"), ("int4", "int8"), ("fp8 a row", "fp8")):
        made[f"zero-shot, {name}, {activations} activations"] = {"kind": "zero", "model": name, "activations": activations}
    main = {
        "QuZO, int8": {"model": "int8", "method": "quzo"},
        "ZOQO, int8, LoRA": {"model": "int8", "method": "zoqo", "lora": 8, "lr": 1.6933333},
        "QuZO, int4": {"model": "int4", "method": "quzo", "lr": 0.26133333},
        "ZOQO, int8": {"model": "int8", "method": "zoqo", "lr": 1.016, "eps": 8.975},
        "ZOQO, int4": {"model": "int4", "method": "zoqo"},
    }
    other = {
        "QZO, Q4_1": {"model": "q4_1", "method": "qzo"},
        "MeZO, bf16": {"model": "dense", "method": "mezo", "eps": 5e-3, "lr": 2.5e-5},
        "ZOQO, int8, LoRA, eta 3": {"model": "int8", "method": "zoqo", "lora": 8, "lr": 3.048, "eps": 40.64},
        "QuZO, int4, single codes": {"model": "int4", "method": "quzo", "span": 1, "lr": 0.17422, "eps": 0.32667},
        "QuZO, Q4_1": {"model": "q4_1", "method": "quzo"},
        "ZOQO, Q4_1": {"model": "q4_1", "method": "zoqo"},
        "QuZO, int4, int8 activations (W4A8)": {"model": "int4", "method": "quzo", "lr": 0.26133333, "activations": "int8"},
        "QuZO, int8, int8 activations": {"model": "int8", "method": "quzo", "lr": 57.347556, "activations": "int8"},
        "QuZO, fp8": {"model": "fp8", "method": "quzo", "lr": 16.725333},
        "QuZO, fp8, fp8 activations": {"model": "fp8 a row", "method": "quzo", "activations": "fp8"},
        "ZOQO, int4, LoRA of 4 bits": {"model": "int4", "method": "zoqo", "lora": 8, "lora_bits": 4},
        "QuZO, int8, LoRA": {"model": "int8", "method": "quzo", "lora": 8, "lr": 917.56089},
        "QuZO, fp8, a twelfth of the lr": {"model": "fp8", "method": "quzo", "lr": 1.3937778},
        "QuZO, int8, LoRA, a sixteenth of the lr": {"model": "int8", "method": "quzo", "lora": 8, "lr": 57.347556},
        "QuZO, int8, Q-RGE2": {"model": "int8", "method": "quzo", "lr": 57.347556, "roundings": 2},
        "QuZO, int4, Q-RGE2": {"model": "int4", "method": "quzo", "lr": 0.26133333, "roundings": 2},
        "QuZO, int8, stateless, every row": {"model": "int8", "method": "quzo", **PAPER, "eps": 3.0, "lr": 3.0},
        "QuZO, int4, stateless, every row": {"model": "int4", "method": "quzo", **PAPER, "eps": 0.03, "lr": 3e-4},
        "ZOQO, int8, uniform noise": {"model": "int8", "method": "zoqo", "distribution": "uniform"},
        "ZOQO, int8, as in the paper": {"model": "int8", **ZOQO_PAPER},
        "ZOQO, int4, as in the paper": {"model": "int4", **ZOQO_PAPER},
        "QuZO, nf4": {"model": "nf4", "method": "quzo", "lr": 0.2109426},
        "ZOQO, nf4": {"model": "nf4", "method": "zoqo"},
        "QuZO, fp8-e5m2": {"model": "fp8-e5m2", "method": "quzo"},
    }
    for name, row in main.items():
        for seed in range(3):
            made[f"{name}, seed {seed}"] = {"kind": "tune", **row, "steps": STEPS, "seed": seed}
    for bits in (8, 4):
        name = f"straight-through AdamW, int{bits}, {FIRST_ORDER} steps"
        made[name] = {"kind": "ste", "bits": bits, "steps": FIRST_ORDER}
    for seed in range(3):  # at the defaults
        for name in ("QuZO, int4", "ZOQO, int8, LoRA", "QuZO, int8"):
            row = {"kind": "tune", **main[name], "lr": None, "steps": LONG, "seed": seed}
            made[f"{name}, {LONG} steps, seed {seed}"] = row
    for seed in range(3):
        row = {"kind": "tune", **main["QuZO, int8"], "lr": 57.347556, "steps": STEPS, "seed": seed}
        made[f"QuZO, int8, a third of the lr, seed {seed}"] = row
    slow = {"kind": "tune", **main["QuZO, int8"], "lr": 28.673778, "steps": LONG, "seed": 0}
    made[f"QuZO, int8, a sixth of the lr, {LONG} steps, seed 0"] = slow
    made["ZOQO, int8, LoRA, eta 3, 1000 steps, seed 0"] = {"kind": "tune", **other["ZOQO, int8, LoRA, eta 3"], "steps": 1000}
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
        run.quantize(load(dense), folder, RunOptions(**PACKED[name]))
    return dense if name == "dense" else folder


def zero(row: Row) -> Row:
    from gradless import run
    from gradless.training.options import RunOptions

    options = RunOptions(**WEAK, activations=row.get("activations", "bf16"))
    return run.evaluate(str(base(row["model"])), str(DATA / "dev.tsv"), options)


def tune(row: Row) -> Row:
    return WORK.tune(row, base(row["model"]), every=row["steps"] // 4)


def ste(row: Row) -> Row:
    from ste import fake_quantized

    loaded = load(WORK.dense_folder())
    loaded.model = fake_quantized(loaded.model.float(), row["bits"])
    return WORK.first_order(loaded, row["steps"])


def table(done: dict[str, Row]) -> str:
    columns = {
        "n": figure("examples", ""),
        "accuracy": figure("accuracy"),
        "loss": figure("loss"),
        "s a step": figure("seconds_a_step", ".2f"),
        "peak MB": figure("peak_mb", ""),
        "codes moved a step": figure("moved_a_step", ".3%"),
    }
    return "\n".join(WORK.table(done, columns))


WORK = WorkList(Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune, "ste": ste})

if __name__ == "__main__":
    WORK.main(__doc__, table)
