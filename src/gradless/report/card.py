"""The README.md of a run: the tuned model, its settings, and the command that makes it again."""

from __future__ import annotations

import json
from pathlib import Path

from gradless.evaluation import Metrics
from gradless.files import write_text
from gradless.journal import Journal
from gradless.methods.base import Group
from gradless.methods.registry import recipe


def write_card(
    path: Path,
    journal: Journal,
    skipped: int,
    before: Metrics | None,
    after: Metrics | None,
    *,
    model: str,
    target: str,
    data: str,
    held_out: str | None,
) -> None:
    """Write a model card.

    Args:
        path: the README.md to write.
        journal: the run's journal.
        skipped: steps whose loss was not finite.
        before: metrics of the base, if there are held-out rows.
        after: metrics of the tuned model.
        model: the base, as the user named it: a path, or a name on the Hub.
        target: the name of the tuned model in the run's folder.
        data: the training rows, as the user named them.
        held_out: the rows for measurements, likewise; None if there were none.
    """
    header = journal.header
    method, config = header["method"]["name"], header["config"]
    groups = "; ".join(_shown_group(group) for group in header["groups"])
    rows = {
        "base": f"`{model}`, SHA-256 {header['base']}",
        "tuned": recipe(method).title + (" of LoRA adapters" if header["lora"] else ""),
        "settings": f"{groups}; seed {config['seed']}",
        "data": f"`{data}`, task {header['task']}, SHA-256 of the tokens {header['data']}",
        "steps": f"{journal.steps} of batch {config['batch_size']} ({skipped} skipped), {journal.seconds:.0f} s",
    }
    for name, metrics in (("before", before), ("after", after)):
        if metrics:
            rows[name] = ", ".join(f"{key} {metrics[key]:.4f}" for key in ("accuracy", "f1", "loss") if key in metrics)
            rows[name] += f" on {metrics['examples']} rows of `{held_out}`" if name == "before" else ""
    rows["made with"] = ", ".join(f"{name} {version}" for name, version in header["environment"].items())
    front = {"library_name": "gradless", "tags": ["gradless", "zeroth-order", method]}
    front |= {} if Path(model).exists() else {"base_model": model}
    made = "holds the adapters, for the unchanged base" if header["lora"] else "has the format and size of the base"
    lines = [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items()),
        "---",
        f"# {Path(model).name}, tuned with forward passes only",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows.items()),
        "",
        f"`{target}` {made}. `journal.db` holds every step; from it and the base",
        "",
        f"    gradless replay {model} journal.db --output {target}",
        "",
        "makes the same bytes again, without data and without forwards.",
        "",
        "![loss and accuracy against steps](loss.png)",
        "",
    ]
    write_text(path, "\n".join(lines))


def _shown_group(group: Group) -> str:
    shown = {key: value for key, value in group.items() if key not in ("kind", "names")}
    values = (f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items())
    return ", ".join([f"{len(group['names'])} {group['kind']}", *values])
