"""Quantized first-order tuning, QuZO's baseline: the straight-through estimator (LLM-QAT, Liu et al., 2023, arXiv 2305.17888).

Every linear layer keeps an fp32 weight that the optimizer moves. A forward reads it rounded to the grid, and the backward pass
treats the rounding as the identity.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from gradless.grids import Grid, integers, round_trip, scale_and_offset
from gradless.spaces import linear_layers


class StraightThrough(nn.Module):
    """w -> the nearest values of a symmetric grid, group by group; the gradient passes as if it were not there."""

    def __init__(self, grid: Grid, group_size: int) -> None:
        super().__init__()
        self.grid, self.group_size = grid, group_size

    def forward(self, w: Tensor) -> Tensor:
        groups = w.detach().view(-1, self.group_size)
        rounded = round_trip(groups, self.grid, *scale_and_offset(groups, self.grid)).view_as(w)
        return w + (rounded - w).detach()


def fake_quantized(model: Any, bits: int, group_size: int = 64) -> Any:
    """Let the forwards of a dense model read its linear layers' weights rounded to so many bits; in place."""
    chosen = linear_layers(model)
    for name, module in list(model.named_modules()):
        if chosen(name, module):
            parametrize.register_parametrization(module, "weight", StraightThrough(integers(bits), group_size))
    return model
