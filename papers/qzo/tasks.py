"""QZO on GPTQ 4-bit and AQLM 2-bit checkpoints, beside MeZO at 16 bits and first-order LoRA on the same bases.

    make tools                             # the formats' own tools, which make the checkpoints
    python papers/qzo/tasks.py             # do what is still to do; stop and start again at will
    python papers/qzo/tasks.py --table     # print the table from what is committed

A work list: a finished row is one line of papers/qzo/tasks.jsonl. SST-2, AG News (of which only the dev rows are here to train
on) and RTE train on all rows; CB, BoolQ and COPA on the 32 that are here. GPTQModel wants groups that divide a row: for
SmolLM2, whose rows have 576 columns, that is 64, not 128.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import ROOT, SHARED, TASKS, Row, WorkList, figure

STEPS, SHORT = 1000, 400
MAKE = {"GPTQ": ["gptq", "--samples", "64"], "AQLM": ["aqlm", "--iterations", "6"]}
"""How the bases are made; AQLM's codebooks are a plain k-means fit (see checkpoints.py)."""


def rows() -> dict[str, Row]:
    """Every row of the table: zero-shot, QZO, then what it is held against; a task after the other."""
    made: dict[str, Row] = {}
    for task in TASKS:
        steps = STEPS if task == "SST-2" else SHORT
        for base in MAKE:
            made[f"{task}, {base}, zero-shot"] = {"kind": "zero", "task": task, "base": base}
            for seed in range(3 if task == "SST-2" else 1):
                row = {"kind": "tune", "task": task, "base": base, "steps": steps, "seed": seed}
                made[f"{task}, {base}, QZO, {steps} steps, seed {seed}"] = row
            made[f"{task}, {base}, first-order LoRA, 100 steps"] = {"kind": "lora", "task": task, "base": base, "steps": 100}
        row = {"kind": "tune", "task": task, "base": "dense", "method": "mezo", "steps": steps, "seed": 0}
        made[f"{task}, bf16, MeZO, {steps} steps, seed 0"] = row
    for clip in (1e9, 10.0, 1.0):
        row = {"kind": "tune", "task": "SST-2", "base": "GPTQ", "steps": SHORT, "seed": 0, "clip": clip}
        made[f"SST-2, GPTQ, QZO, {SHORT} steps, C = {clip:g}"] = row
    for lr, eps in ((2e-4, 2e-2), (8e-4, 2e-2), (1.6e-3, 2e-2), (4e-4, 1e-2), (4e-4, 4e-2)):
        row = {"kind": "tune", "task": "SST-2", "base": "GPTQ", "steps": SHORT, "seed": 0, "lr": lr, "eps": eps}
        made[f"SST-2, GPTQ, QZO, {SHORT} steps, lr {lr:g}, eps {eps:g}"] = row
    return made


def base(name: str) -> Path:
    """A base's folder, made once by the format's own tool."""
    dense = WORK.dense_folder()
    if name == "dense":
        return dense
    folder, python = ROOT / "runs" / "papers" / name.lower(), ROOT / ".venv-tools" / "bin" / "python"
    if not folder.exists():
        text = ROOT / "runs" / "papers" / "text.txt"
        lines = [line.partition("\t")[0] for line in (SHARED / "agnews" / "dev.tsv").read_text().splitlines()]
        text.write_text("\n".join(line for line in lines if len(line) > 250))
        command = [str(python), str(Path(__file__).with_name("checkpoints.py")), "make", *MAKE[name]]
        subprocess.run([*command, "--dense", str(dense), "--text", str(text), "--output", str(folder)], check=True)
    return folder


def zero(row: Row) -> Row:
    from gradless import run
    from gradless.training.options import RunOptions

    _, dev, options = TASKS[row["task"]]
    return run.evaluate(str(base(row["base"])), str(dev), RunOptions(**options))


def tune(row: Row) -> Row:
    train, dev, options = TASKS[row["task"]]
    every = row["steps"] // 4
    return WORK.tune({**row, "prompt": options, "train_rows": None}, base(row["base"]), every, train, dev)


def lora(row: Row) -> Row:
    """AdamW on LoRA factors of rank 8 over the base's own weights, frozen: QLoRA with this quantization."""
    from peft import LoraConfig, get_peft_model

    from gradless import run
    from gradless.formats.dense import DenseModel
    from gradless.formats.quantized import dequantized

    loaded = run.load_model(base(row["base"]))
    model = get_peft_model(dequantized(loaded).float(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    return WORK.first_order(DenseModel(model, loaded.tokenizer), row["steps"], lr=1e-3, task=row["task"])


def table(done: dict[str, Row]) -> str:
    columns = {"n": figure("examples", ""), "accuracy": figure("accuracy"), "F1": figure("f1"), "loss": figure("loss")}
    columns |= {"seconds": figure("seconds", ".0f"), "peak MB": figure("peak_mb", "")}
    lines = WORK.table(done, columns)
    for name in MAKE:
        seeds = [f"SST-2, {name}, QZO, {STEPS} steps, seed {seed}" for seed in range(3)]
        found: list[Any] = [done[seed]["accuracy"] for seed in seeds if seed in done]
        if len(found) > 1:
            mean, spread = statistics.mean(found), statistics.stdev(found)
            lines.append(f"| **SST-2, {name}, QZO, mean of {len(found)} seeds** | 872 | {mean:.4f} ± {spread:.4f} | | | | |")
    return "\n".join(lines)


WORK = WorkList(Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune, "lora": lora})

if __name__ == "__main__":
    WORK.main(__doc__, table)
