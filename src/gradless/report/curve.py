"""A run's loss and accuracy against its steps, drawn from its journal."""

from __future__ import annotations

import math
from pathlib import Path

from gradless.files import replacing
from gradless.journal import Journal

WINDOW = 50
"""Number of steps in a mean of the training loss."""


def plot_run(journal_path: Path, picture: Path) -> None:
    """Draw the training loss (a mean over 50 steps), the held-out loss and accuracy if they were measured and, if codes are
    tuned, the shares of them that a query moves and that each update changed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    journal = Journal.open(journal_path)
    losses = [estimate.loss for estimate in journal.estimates()]
    measured, moves = journal.evaluations(), journal.moves()
    queried = sorted(set(journal.header["query_shares"]))
    journal.close()
    finite = [loss if math.isfinite(loss) else math.nan for loss in losses]
    means = [sum(finite[max(0, i - WINDOW) : i]) / min(i, WINDOW) for i in range(1, len(finite) + 1)]
    panels = {"height_ratios": [3, 1]} if moves else {}
    figure, axes = plt.subplots(
        1 + bool(moves), figsize=(7, 5.5 if moves else 4), layout="constrained", sharex=True, squeeze=False, **panels
    )
    axis = axes[0, 0]
    axis.plot(finite, color="C0", alpha=0.2, linewidth=0.8)
    axis.plot(means, color="C0", label=f"training loss, mean of {WINDOW} steps")
    axis.set(ylabel="loss")
    if moves:
        axes[1, 0].plot(*zip(*moves, strict=True), color="C3", linewidth=0.8, label="share of the tuned codes moved")
        for share in queried:
            label = "share that a query moves" if share == queried[0] else None
            axes[1, 0].axhline(share, color="C4", linewidth=0.8, linestyle="--", label=label)
        axes[1, 0].set(ylabel="moved", yscale="log")
    axes[-1, 0].set(xlabel="step")
    if measured:
        steps = [row["step"] for row in measured]
        axis.plot(steps, [row["loss"] for row in measured], "o-", color="C1", markersize=4, label="held-out loss")
        if "accuracy" in measured[0]:
            right = axis.twinx()
            right.plot(steps, [row["accuracy"] for row in measured], "s-", color="C2", markersize=4, label="held-out accuracy")
            right.set(ylabel="accuracy")
    figure.legend(loc="outside upper center", ncols=3)
    with replacing(picture) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    plt.close(figure)
