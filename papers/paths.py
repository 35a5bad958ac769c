"""Along which paths first-order tuning needs its gradient: what a method may leave out of what it estimates.

    python papers/paths.py            # do what is still to do; stop and start again at will
    python papers/paths.py --table    # print the table from what is committed

A work list: a finished row is one line of papers/paths.jsonl. AdamW, SmolLM2-135M (fp32, its products in bf16 where the
processor has them), SST-2, 50 steps of 16 of 1000 rows, seed 0, all 872 dev rows. A row says what is tuned, and along which
paths the gradient goes from the answer's token:

    every path      back-propagation
    one hop         on that token from layer to layer, and once, by attention, to the prompt's other tokens
    the token       on that token from layer to layer alone; what it saw of the others counts as given
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gradless.formats.load import load

sys.path.insert(0, str(Path(__file__).parent))

from worklist import Row, WorkList, figure

STEPS = 50
EVERYTHING, LAST_HALF = r".*", r".*\.(1[5-9]|2\d)\."


def rows() -> dict[str, Row]:
    made: dict[str, Row] = {}
    for tuned, pattern, paths, lr in (
        ("all weights", EVERYTHING, "every path", 2e-5),
        ("all weights", EVERYTHING, "one hop", 2e-5),
        ("all weights", EVERYTHING, "the token", 2e-5),
        ("linear layers of the last half", LAST_HALF + r".*_proj", "one hop", 4e-5),
        ("v_proj, o_proj, down_proj of the last half", LAST_HALF + r".*(v|o|down)_proj", "one hop", 4e-5),
        ("o_proj, down_proj of the last half", LAST_HALF + r".*(o|down)_proj", "the token", 4e-5),
    ):
        made[f"{tuned}, {paths}"] = {"kind": "adamw", "tuned": pattern, "paths": paths, "lr": lr}
    return made


def cut(model: Any, paths: str) -> None:
    """Let gradients through a model along these paths only."""
    answers: list[Tensor] = []

    def find(_: Any, _args: Any, given: dict[str, Any]) -> None:
        """Sequences are packed end to end: one's last token comes before a place where positions do not go on."""
        ids = given["position_ids"]
        ends = torch.ones_like(ids, dtype=torch.bool)
        ends[:, :-1] = ids[:, 1:] != ids[:, :-1] + 1
        answers[:] = [ends.unsqueeze(2)]

    def kept(x: Tensor) -> Tensor:
        return torch.where(answers[0], x, x.detach())

    def before(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (kept(args[0]), *args[1:])

    def after(_: Any, _args: Any, x: Tensor) -> Tensor:
        return kept(x)

    if paths == "every path":
        return
    model.register_forward_pre_hook(find, with_kwargs=True)
    for layer in model.model.layers:
        layer.register_forward_pre_hook(before)
        if paths == "the token":
            layer.self_attn.k_proj.register_forward_hook(after)
            layer.self_attn.v_proj.register_forward_hook(after)


def adamw(row: Row) -> Row:

    loaded = load(WORK.dense_folder())
    for name, parameter in loaded.model.named_parameters():
        parameter.requires_grad_(re.match(row["tuned"], name) is not None)
    cut(loaded.model, row["paths"])
    return WORK.first_order(loaded, STEPS, row["lr"], every=STEPS)


def table(done: dict[str, Row]) -> str:
    columns = {"accuracy": figure("accuracy"), "loss": figure("loss")}
    return "\n".join(WORK.table(done, columns))


WORK = WorkList(Path(__file__).resolve(), rows(), {"adamw": adamw})

if __name__ == "__main__":
    WORK.main(__doc__, table)
