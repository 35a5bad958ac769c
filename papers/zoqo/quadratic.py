"""ZOQO and QuZO on a convex quadratic over a grid: distance to the optimum against queries, at 8, 4 and 2 bits.

    python papers/zoqo/quadratic.py     # prints the table, draws docs/quadratic.png; a few minutes

    L(x) = 1/2 sum_j h_j (x_j - x*_j)^2,  x_j on the mid-tread grid of b bits over [-1, 1],  64 coordinates, h_j in [0.5, 2]

The optimum x* is off the grid; the grid's best is x* rounded to nearest. Each line is the mean of three seeds. `hold` costs a
third forward a step.
"""

from __future__ import annotations

from pathlib import Path

import torch

from gradless import ZOQO, QuZO, grids
from gradless.methods.quzo.method import eps_of_share
from gradless.methods.zoqo.method import mu_of_share
from gradless.spaces import GridSpace

N, STEPS, SEEDS = 64, 3000, range(3)
SHARE = {8: 0.4, 4: 0.06, 2: 0.03}
"""Share of the codes that a sparse query moves: fewer where a step is longer."""
METHODS = {
    "ZOQO as in the paper: uniform, whole steps": (ZOQO, {"eps": 1.0, "distribution": "uniform", "whole_steps": True}),
    "ZOQO, sparse, whole steps": (ZOQO, {"whole_steps": True}),
    "ZOQO, sparse, eta falling to 0": (ZOQO, {"falling": True}),
    "ZOQO, sparse, whole steps, hold": (ZOQO, {"whole_steps": True, "hold": True}),
    "ZOQO, sparse, eta falling to 0, residual": (ZOQO, {"falling": True, "residual": True}),
    "QuZO, Q-RGE1, lr falling to 0": (QuZO, {"falling": True}),
    "QuZO, Q-RGE1, lr falling to 0, residual": (QuZO, {"falling": True, "residual": True}),
    "QuZO, Q-RGE2, lr falling to 0": (QuZO, {"falling": True, "roundings": 2}),
}


def learning_rate(share: float, s: float) -> float:
    """Of QuZO: a gradient per grid step is h (x - x*) s, and an estimate's length grows with N and with E[u_1^2] / eps^2."""
    eps = eps_of_share(share)
    return 0.3 / (N * s**2 * (1 + 0.8 / eps))


def run(bits: int, method: type, options: dict, seed: int) -> tuple[torch.Tensor, float]:
    """Distances ||x - x*|| / sqrt(N) after every step, and the grid's best one."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.rand(N, generator=generator) * 1.6 - 0.8
    h = 0.5 + 1.5 * torch.rand(N, generator=generator)
    grid, s = grids.mid_tread(bits, -1.0, 1.0)
    space = GridSpace("x", torch.zeros(N, dtype=torch.int16), grid, s, residual=options.get("residual", False))
    falling = options.get("falling", False)
    given = {name: value for name, value in options.items() if name not in ("falling", "residual")}
    if method is QuZO:
        given |= {"eps": eps_of_share(SHARE[bits]), "lr": learning_rate(SHARE[bits], s)}
    else:
        given = {"eps": mu_of_share(SHARE[bits]), "lr": 1.0, **given}
    optimizer = method([space], seed=seed, **given)
    first = optimizer.param_groups[0]["lr"]
    distances = []
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = first * (1 - step / STEPS) if falling else first
        optimizer.step(lambda: float((h * (space.shown() - target).square()).sum() / 2))
        distances.append(float((space.shown() - target).norm() / N**0.5))
    best = grid.values(grid.nearest(target / s)) * s
    return torch.tensor(distances), float((best - target).norm() / N**0.5)


def main() -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    print("| bits | method | lowest distance | last distance | the grid's best | one step |\n|---|---|---|---|---|---|")
    for axis, bits in zip(axes, (8, 4, 2), strict=True):
        for name, (method, options) in METHODS.items():
            runs = [run(bits, method, options, seed) for seed in SEEDS]
            mean, best = torch.stack([d for d, _ in runs]).mean(0), sum(b for _, b in runs) / len(runs)
            print(f"| {bits} | {name} | {mean.min():.4f} | {mean[-1]:.4f} | {best:.4f} | {2 / (2**bits - 1):.4f} |", flush=True)
            axis.plot((2 + options.get("hold", False)) * torch.arange(1, STEPS + 1), mean, label=name, linewidth=1)
        axis.axhline(best, color="black", linestyle=":", label="the grid's best")
        axis.set(title=f"{bits} bits", xlabel="queries", yscale="log", xscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("distance to the optimum (RMS)")
    axes[0].legend(fontsize=6)
    figure.savefig(Path(__file__).parents[2] / "docs" / "quadratic.png", dpi=150)


if __name__ == "__main__":
    main()
