"""Inputs and outputs of chosen linear layers at some tokens of a batch, to read and to shift."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from gradless.layers import Linear


class LayerOutputs:
    """The inputs and outputs of linear layers.

    Args:
        layers: dense or packed layers, by the name of the tensor that each multiplies; each sees all tokens of a batch in their
            order.
    """

    def __init__(self, layers: Mapping[str, Linear]) -> None:
        self.layers = dict(layers)

    @contextmanager
    def read(self, tokens: Tensor) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Yields each layer's inputs and outputs at `tokens`, int64 (n,), in the last forward inside the context: fp32
        (n, columns) and (n, rows), by the layer's name."""
        found = {  # allocated before the forward: in its middle they would split the memory that it frees
            name: (_room(tokens, layer.in_features), _room(tokens, layer.out_features)) for name, layer in self.layers.items()
        }

        def keep(name: str, x: Tensor, y: Tensor) -> None:
            for kept, seen in zip(found[name], (x, y), strict=True):
                kept.copy_(seen[tokens])

        with self._hooked(keep):
            yield found

    @contextmanager
    def shifted(self, tokens: Tensor, by: Callable[[str], Tensor]) -> Iterator[None]:
        """Inside the context forwards add by(name), fp32 (n, rows), to each layer's outputs at `tokens`, int64 (n,)."""

        def shift(name: str, _: Tensor, y: Tensor) -> None:
            y[tokens] = (y[tokens].float() + by(name)).to(y.dtype)

        with self._hooked(shift):
            yield

    @contextmanager
    def _hooked(self, do: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
        """Inside the context forwards call do(name, inputs, outputs) for each layer, both flattened to (tokens, ..)."""
        with ExitStack() as hooks:
            for name, layer in self.layers.items():

                def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
                    do(name, inputs[0].flatten(0, -2), output.view(-1, output.shape[-1]))

                hooks.callback(layer.register_forward_hook(hook).remove)
            yield


def _room(tokens: Tensor, width: int) -> Tensor:
    return torch.empty(len(tokens), width, device=tokens.device)
