"""QZO on GPTQ 4-bit and AQLM 2-bit checkpoints, beside MeZO at 16 bits and first-order LoRA on the same bases.

    make tools                             # the formats' own tools, which make the checkpoints
    python papers/qzo/tasks.py             # do what is still to do; stop and start again at will
    python papers/qzo/tasks.py --table     # print the table from what is committed

A work list: a finished row is one line of papers/qzo/tasks.jsonl. SST-2, AG News (of which only the dev rows are here to train
on) and RTE train on all rows; CB, BoolQ and COPA on the 32 that are here. GPTQModel wants groups that divide a row: for
SmolLM2, whose rows have 576 columns, that is 64; gemma-3-270m has the papers' 128.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

from gradless.formats.load import load

sys.path.insert(0, str(Path(__file__).parents[1]))

from worklist import ROOT, SHARED, TASKS, Row, WorkList, figure

STEPS = 400
MAKE: dict[str, tuple[str, list[str]]] = {
    "bf16": ("SmolLM2", []),
    "GPTQ": ("SmolLM2", ["gptq", "--samples", "64"]),
    "AQLM": ("SmolLM2", ["aqlm", "--iterations", "6", "--samples", "200"]),
    "gemma3 bf16": ("gemma3", []),
    "gemma3 GPTQ": ("gemma3", ["gptq", "--group", "128", "--samples", "64"]),
}
"""Of each base its model, and how it is quantized; AQLM's codebooks are a fit of our own (see checkpoints.py)."""
MAIN = ("SST-2", "RTE", "AG News")
"""The tasks of the larger model's rows."""
Q = f"QZO, {STEPS} steps"
FEWER_STEPS = {"AG News": 200, "RTE": 100, "CB": 100, "BoolQ": 50, "COPA": 100, "SQuAD": 50}
"""Tasks of long rows, and those of which so few are here to train on that more steps only repeat them."""
LONGEST = ("BoolQ", "SQuAD")
"""Tasks of the longest rows: half as many steps on AQLM."""
FIRST_ORDER = {"RTE": 25, "BoolQ": 25, "SQuAD": 10}
"""Steps of first-order LoRA where they are not 50: in tasks of long rows they are the longest of all."""


def halved(steps: int, task: str, base: str) -> int:
    """Half of the steps, where a row would take longest."""
    return steps // 2 if base == "AQLM" and task in LONGEST else steps


def rows() -> dict[str, Row]:
    """Every row of the table: zero-shot, QZO, then what it is held against; a task after the other."""
    made: dict[str, Row] = {}

    def tuned(task: str, base: str, name: str, steps: int = STEPS, **options: Any) -> None:
        made[f"{task}, {base}, {name}"] = {"kind": "tune", "task": task, "base": base, "steps": steps, "seed": 0, **options}

    def zero_shot(task: str, base: str) -> None:
        made[f"{task}, {base}, zero-shot"] = {"kind": "zero", "task": task, "base": base}

    def by_lora(task: str, base: str) -> None:
        steps = halved(FIRST_ORDER.get(task, 50), task, base)
        made[f"{task}, {base}, first-order LoRA, {steps} steps"] = {"kind": "lora", "task": task, "base": base, "steps": steps}

    for task in TASKS:
        for base in ("GPTQ", "AQLM"):
            zero_shot(task, base)
            steps = halved(FEWER_STEPS.get(task, STEPS), task, base)
            for seed in range(3 if task == "SST-2" else 1):
                tuned(task, base, f"QZO, {steps} steps, seed {seed}", seed=seed, steps=steps)
            by_lora(task, base)
        zero_shot(task, "bf16")
        steps = FEWER_STEPS.get(task, STEPS)
        tuned(task, "bf16", f"MeZO, {steps} steps, seed 0", method="mezo", steps=steps, lr=1e-5)
    for clip in (1.0, 0.3):
        tuned("SST-2", "GPTQ", f"{Q}, C = {clip:g}", clip=clip)
    for lr, eps in ((4e-4, 2e-2), (4e-3, 6e-2), (1.6e-2, 6e-2), (3.2e-2, 6e-2), (8e-3, 2e-2), (8e-3, 1.2e-1)):
        tuned("SST-2", "GPTQ", f"{Q}, lr {lr:g}, eps {eps:g}", lr=lr, eps=eps)
    for task in MAIN:
        zero_shot(task, "gemma3 GPTQ")
        steps = STEPS if task == "SST-2" else FEWER_STEPS[task] // 2
        for seed in range(3 if task == "SST-2" else 1):
            tuned(task, "gemma3 GPTQ", f"QZO, {steps} steps, seed {seed}", seed=seed, steps=steps)
        by_lora(task, "gemma3 GPTQ")
        tuned(task, "gemma3 bf16", f"MeZO, {steps} steps, lr 2e-6, seed 0", method="mezo", steps=steps, lr=2e-6)
    return made


def base(name: str) -> Path:
    """A base's folder, made once by the format's own tool."""
    model, how = MAKE[name]
    dense = WORK.dense_folder(model)
    if not how:
        return dense
    folder, python = ROOT / "runs" / "papers" / name.lower().replace(" ", "-"), ROOT / ".venv-tools" / "bin" / "python"
    if not folder.exists():
        text = ROOT / "runs" / "papers" / "text.txt"
        lines = [line.partition("\t")[0] for line in (SHARED / "agnews" / "dev.tsv").read_text().splitlines()]
        text.write_text("\n".join(line for line in lines if len(line) > 250))
        command = [str(python), str(Path(__file__).with_name("checkpoints.py")), "make", *how]
        subprocess.run([*command, "--dense", str(dense), "--text", str(text), "--output", str(folder)], check=True)
    return folder


def zero(row: Row) -> Row:
    from gradless import run
    from gradless.training.options import RunOptions

    _, dev, options = TASKS[row["task"]]
    return run.evaluate(str(base(row["base"])), str(dev), RunOptions(**options))


def measured_every(row: Row) -> int:
    """Steps between a row's measurements; of curves of other tasks than SST-2 nothing is drawn."""
    times = {"tune": 4, "lora": 2}[row["kind"]] if row["task"] == "SST-2" else 1
    return int(row["steps"]) // times


def tune(row: Row) -> Row:
    train, dev, options = TASKS[row["task"]]
    return WORK.tune({**row, "prompt": options, "train_rows": None}, base(row["base"]), measured_every(row), train, dev)


def lora(row: Row) -> Row:
    """AdamW on LoRA factors of rank 8 over the base's own weights, frozen: QLoRA with this quantization."""
    from peft import LoraConfig, get_peft_model

    from gradless.formats.dense import DenseModel
    from gradless.formats.quantized import dequantized

    loaded = load(base(row["base"]))
    model = get_peft_model(dequantized(loaded).float(), LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    adapted = DenseModel(model, loaded.tokenizer)
    return WORK.first_order(adapted, row["steps"], lr=1e-3, task=row["task"], every=measured_every(row))


def table(done: dict[str, Row]) -> str:
    columns = {"n": figure("examples", ""), "accuracy": figure("accuracy"), "F1": figure("f1"), "loss": figure("loss")}
    columns |= {"seconds": figure("seconds", ".0f"), "peak MB": figure("peak_mb", "")}
    lines = WORK.table(done, columns)
    drawn = [name for name in WORK.rows if name.startswith("SST-2") and "curve" in done.get(name, ())]
    drawn = [name for name in drawn if "C =" not in name and "eps " not in name]
    WORK.draw(drawn, ROOT / "docs" / "qzo-checkpoints.png", ("loss", "accuracy"))
    return "\n".join(lines)


WORK = WorkList(Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune, "lora": lora})

if __name__ == "__main__":
    WORK.main(__doc__, table)
