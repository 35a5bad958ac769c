"""ZOQO from comparisons alone, the paper's open question, on a language task.

    python papers/zoqo/comparison.py            # do what is still to do
    python papers/zoqo/comparison.py --table    # print the table from what is committed

SmolLM2-135M on 8 bits answers 32 reviews at x + u and again at x - u, a word each. A judge sees the two sheets of answers and
says which one it prefers, or that it cannot say; no loss and no probability reaches the optimizer. (This judge knows the labels
and counts right answers.) The control follows the sign of the loss difference of the same queries.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from gradless.formats.load import load
from gradless.tasks.prepare import prepare

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "quzo"))

from sst2 import base
from worklist import DATA, TRAIN_ROWS, WEAK, Row, WorkList, figure

STEPS, SHEET, ETA = 400, 32, 0.677
"""Steps, reviews a sheet, and ZOQO's default eta for int8 in grid steps."""


def tune(row: Row) -> Row:
    import torch

    from gradless import ZOQO, evaluation, noise, objectives
    from gradless.methods.codes import DEFAULT_STRIDE
    from gradless.training.options import RunOptions

    options = RunOptions(**WEAK)
    loaded = load(base("int8"))
    train = prepare(str(DATA / "train.tsv"), loaded, options, limit=TRAIN_ROWS, shuffled=True).examples
    dev = prepare(str(DATA / "dev.tsv"), loaded, options).examples
    spaces = loaded.spaces("codes", loaded.tunable("codes"), stride=DEFAULT_STRIDE, residual=True)

    def right(answers: list[int]) -> int:
        return sum(answer == example.label for answer, example in zip(answers, asked, strict=True))

    judge = {"answers": lambda plus, minus: right(minus) - right(plus), "losses": None}[row["judged by"]]
    method = ZOQO(spaces, lr=ETA, eps=row["eps"], compare=judge, seed=row["seed"])
    order, ties, curve, began = noise.permutation(row["seed"], 0, len(train)).tolist(), 0, [], time.perf_counter()

    def outcome() -> list[int] | torch.Tensor:
        if judge:
            return [int(score.argmax()) for score in objectives.scores(loaded.model, batch)]
        return objectives.losses(loaded.model, batch)[0].mean()

    for step in range(row["steps"] + 1):
        if step % (row["steps"] // 4) == 0:
            curve.append({"step": step, **evaluation.evaluate(loaded.model, dev, loaded.tokenizer)})
            print(curve[-1], flush=True)
        if step < row["steps"]:
            start = step * SHEET % (len(order) - SHEET)
            asked = [train[i] for i in order[start : start + SHEET]]
            batch = objectives.collate(asked)
            method.param_groups[0]["lr"] = ETA * (1 - step / row["steps"])
            with torch.inference_mode():
                plus, minus = method.step(outcome).losses[0]
            ties += plus == minus
    found = {
        "examples": len(dev),
        "curve": curve,
        "ties": ties / row["steps"],
        "lr": ETA,
        "seconds": time.perf_counter() - began,
    }
    return {**{key: curve[-1][key] for key in ("accuracy", "loss")}, **found}


def rows() -> dict[str, Row]:
    """Seed by seed, so that a pair can be compared early."""
    made = {}
    for seed in range(3):
        for judged in ("answers", "losses"):
            name = f"which {judged} are better, seed {seed}"
            made[name] = {"kind": "tune", "judged by": judged, "steps": STEPS, "seed": seed, "eps": 8.974667}
    return made


def table(done: dict[str, Row]) -> str:
    columns = {"n": "examples", "accuracy": "accuracy", "loss": "loss", "ties": "ties"}
    return "\n".join(WORK.table(done, {title: figure(key, "" if title == "n" else ".4f") for title, key in columns.items()}))


WORK = WorkList(Path(__file__).resolve(), rows(), {"tune": tune})

if __name__ == "__main__":
    WORK.main(__doc__, table)
