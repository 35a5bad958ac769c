"""QuZO, ZOQO and QZO beyond SST-2: RTE, AG News, COPA (32 rows to learn from) and answers to SQuAD's questions.

    python papers/quzo/tasks.py            # do what is still to do; stop and start again at will
    python papers/quzo/tasks.py --table    # print the table from what is committed

A work list as papers/quzo/sst2.py, with its models; each finished row is one line of papers/quzo/tasks.jsonl.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from sst2 import base
from worklist import TASKS, Row, WorkList, figure

STEPS = 400
CHOSEN = ("COPA", "AG News", "RTE", "SQuAD")
WAYS = {
    "QZO, Q4_1": {"model": "q4_1", "method": "qzo"},
    "QuZO, int8": {"model": "int8", "method": "quzo"},
    "ZOQO, int8, LoRA": {"model": "int8", "method": "zoqo", "lora": 8},
}


def rows() -> dict[str, Row]:
    """Zero-shot, then every way, one seed; a task after the other."""
    made: dict[str, Row] = {}
    for task in CHOSEN:
        made[f"{task}, zero-shot, Q4_1"] = {"kind": "zero", "data": task, "model": "q4_1"}
        for way, row in WAYS.items():
            made[f"{task}, {way}"] = {"kind": "tune", "data": task, **row, "steps": STEPS, "seed": 0}
    return made


def zero(row: Row) -> Row:
    from gradless import run
    from gradless.training.options import RunOptions

    _, dev, options = TASKS[row["data"]]
    return run.evaluate(str(base(row["model"])), str(dev), RunOptions(**options))


def tune(row: Row) -> Row:
    train, dev, options = TASKS[row["data"]]
    return WORK.tune({**row, "prompt": options}, base(row["model"]), 200, train, dev)


def table(done: dict[str, Row]) -> str:
    columns = {"n": figure("examples", ""), "accuracy": figure("accuracy"), "F1": figure("f1"), "loss": figure("loss")}
    return "\n".join(WORK.table(done, {**columns, "s a step": figure("seconds_a_step")}))


WORK = WorkList(Path(__file__).resolve(), rows(), {"zero": zero, "tune": tune})

if __name__ == "__main__":
    WORK.main(__doc__, table)
