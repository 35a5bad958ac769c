"""What a method searches. A space is one named tensor x with two verbs: `view` lets forwards read a moved x without
writing anything, `move` is the one way that writes x."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.errors import GradlessError
from gradless.grids import Grid
from gradless.kernels.reference import f32, stopped
from gradless.tensor import Move, Part, QuantTensor

AT_ONCE = 1 << 17
"""Weights whose slopes are held at once."""


class Space(ABC):
    """One tensor that a method searches.

    Attributes:
        name: unique in the model and stable between runs; with the seed it determines the noise.
        values: the point x itself.
        splits: whether a forward can read x under several moves at once, each by its equal share of the batch.
        owned: whether each token of a batch can read x under a move of its own.
    """

    name: str
    values: Tensor
    splits = owned = False

    @abstractmethod
    def view(self, *moves: Move) -> None:
        """Let forwards read x under the moves, or x itself where there are none."""

    @contextmanager
    def viewed_by(self, owners: Tensor, moves: Sequence[Move]) -> Iterator[None]:
        """Forwards inside read x under the moves: each token of their batch, all of them in order, under the one that `owners`,
        int64 (tokens,), numbers. For a space that can be `owned`."""
        del owners, moves
        raise NotImplementedError

    @abstractmethod
    def move(self, moves: Sequence[Move]) -> int:
        """Write x <- decay * x + coefficient * u, once for each move; returns how many changes of integer codes that were
        (0 where x is continuous)."""

    @property
    def codes(self) -> int:
        """How many integer codes x holds; 0 where it is continuous."""
        return 0

    @contextmanager
    def viewed(self, *moves: Move) -> Iterator[None]:
        """Forwards inside read x under the moves."""
        self.view(*moves)
        try:
            yield
        finally:
            self.view()

    def held(self, move: Move) -> AbstractContextManager[None]:
        """As `viewed`, where many forwards follow: x is moved once for all of them if memory for a second one is small."""
        return self.viewed(move)


def check_finite(spaces: Sequence[Space]) -> None:
    """Refuse to save tuned values that are no model.

    Raises:
        GradlessError: some are infinite or not a number.
    """
    for space in spaces:
        if space.values.is_floating_point() and not space.values.isfinite().all():
            raise GradlessError(
                f"the tuned values of {space.name} are not finite numbers, so they were not written: the run diverged. "
                "Begin it anew with a smaller --lr."
            )


class BlockSpace(Space):
    """The scales (or offsets, or both by one factor) of a packed weight; one fp32 value a block."""

    splits = owned = True

    def __init__(self, tensor: QuantTensor, part: Part | str = Part.SCALE, *, relative: bool = True) -> None:
        tensor.tune(part, relative=relative)
        assert tensor.master is not None
        self.name, self.values, self.tensor = tensor.name, tensor.master, tensor

    def view(self, *moves: Move) -> None:
        self.tensor.views = moves

    @contextmanager
    def viewed_by(self, owners: Tensor, moves: Sequence[Move]) -> Iterator[None]:
        self.tensor.owners = owners
        try:
            with self.viewed(*moves):
                yield
        finally:
            self.tensor.owners = None

    def move(self, moves: Sequence[Move]) -> int:
        kernels.move_blocks(self.tensor, moves)
        return 0

    def slopes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """File rows, and by what each weight in them changes where its tuned value moves by one unit: int64 (n,), and fp32
        (n, columns) in packed order. Weights are linear in what is tuned."""
        tensor, unit = self.tensor, self.tensor.unit()
        ends = [replace(tensor, master=x, views=(), owners=None) for x in (unit, torch.zeros_like(unit))]
        every = torch.arange(tensor.rows, device=tensor.packed.device)
        for rows in torch.split(every, max(1, AT_ONCE // tensor.columns)):
            one, zero = (kernels.dequantize(end, rows, torch.float32)[0] for end in ends)
            yield rows, one - zero

    def mean_square_slope(self) -> float:
        """Of all weights."""
        return sum(float(slopes.square().sum()) for _, slopes in self.slopes()) / (self.tensor.rows * self.tensor.columns)

    def follow(self, rows: Tensor, columns: Tensor, by: float) -> None:
        """Move x along the gradient of <W, G>, G = sum_t rows_t (x) columns_t: x <- x + by * unit * dW/dx . G.

        One value's sum is added up by halves, so that its bits are the same on every device.

        Args:
            rows: fp32 (terms, rows), in the file's order.
            columns: fp32 (terms, columns), in the model's.
            by: how far, in units; rounded to fp32.
        """
        tensor = self.tensor
        assert tensor.master is not None
        device = tensor.packed.device
        rows, columns = rows.to(device), columns.to(device)
        if tensor.column_order is not None:
            columns = columns[:, tensor.column_order]
        group = tensor.columns if tensor.values == 1 else tensor.share * tensor.block.size
        moved = tensor.master.clone()
        unit = tensor.unit()
        for these, slopes in self.slopes():
            total = torch.zeros(len(these), tensor.values, device=device)
            for row, column in zip(rows[:, these], columns, strict=True):
                total = total + row.unsqueeze(1) * _grouped(slopes * column, group)
            moved[these] = tensor.master[these] + unit[these] * (total * f32(by))
        tensor.master.copy_(stopped(tensor, moved))

    @contextmanager
    def held(self, move: Move) -> Iterator[None]:
        master = self.tensor.master
        assert master is not None
        try:
            self.tensor.master = master.clone()
            kernels.move_blocks(self.tensor, [move])
            yield
        finally:
            self.tensor.master = master


def _grouped(x: Tensor, group: int) -> Tensor:
    """Sums over groups of columns, the last of which may be shorter: (n, columns) -> (n, groups)."""
    width = 1 << (group - 1).bit_length()
    x = nn.functional.pad(x, (0, -x.shape[1] % group)).view(len(x), -1, group)
    x = nn.functional.pad(x, (0, width - group))
    while x.shape[2] > 1:
        half = x.shape[2] // 2
        x = x[..., :half] + x[..., half:]
    return x.squeeze(2)


class CodeSpace(Space):
    """The integer codes of a packed weight, or of every n-th row of it, one a weight, in steps of their grid.

    Args:
        tensor: the packed weight; updates write its codes in place.
        stride: tune rows 0, stride, 2 * stride ... in the file's order, and leave the others alone.
        clamp: whether a query stops at the grid's ends as an update does.
        residual: keep what an update's rounding left over, a byte a code, and add it to the next (error feedback). Without
            one every update is rounded stochastically: unbiased too, but each adds noise of its own.
    """

    splits = True

    def __init__(self, tensor: QuantTensor, *, stride: int = 1, clamp: bool = False, residual: bool = False) -> None:
        tensor.tune(Part.CODE)
        tensor.stride, tensor.clamp = stride, clamp
        tensor.residual = None
        if residual:
            shape = torch.Size((tensor.tuned_rows, tensor.columns))
            tensor.residual = kernels.dither(tensor.name, shape).to(tensor.packed.device)
        self.name, self.values, self.tensor = tensor.name, tensor.packed, tensor

    @property
    def codes(self) -> int:
        return self.tensor.tuned_rows * self.tensor.columns

    def view(self, *moves: Move) -> None:
        self.tensor.views = moves

    def move(self, moves: Sequence[Move]) -> int:
        return sum(kernels.move_codes(self.tensor, move) for move in moves)


class GridSpace(Space):
    """A plain tensor whose values are a scale times the levels of a grid: x = scale * levels[codes].

    Args:
        name: of the tensor.
        codes: int16, any shape; updates write them in place.
        grid: the levels; a step is one level up or down, whatever its size.
        scale: of the whole tensor.
        clamp: whether a query stops at the grid's ends. Only a uniform grid has anything to read beyond them.
        residual: as in `CodeSpace`.
    """

    def __init__(
        self, name: str, codes: Tensor, grid: Grid, scale: float, *, clamp: bool = False, residual: bool = False
    ) -> None:
        self.name, self.values, self.grid, self.scale = name, codes, grid, scale
        self.residual = kernels.dither(name, codes.shape).to(codes.device) if residual else None
        self.clamp = clamp or not grid.uniform
        self._view: Move | None = None
        self._shown: Tensor | None = None

    @property
    def codes(self) -> int:
        return self.values.numel()

    def shown(self) -> Tensor:
        """x as a forward reads it now: fp32, of the codes' shape; kept until the next view or move."""
        if self._shown is None:
            codes: Tensor = self.values
            if self._view is not None:
                u = kernels.coordinates(self._view.direction, self.name, codes.numel(), codes.device)
                codes = codes + u.view_as(codes) * self._view.coefficient
            if self.clamp:
                codes = codes.clamp(self.grid.lowest, self.grid.highest)
            self._shown = (codes if self.grid.uniform else self.grid.values(codes)) * self.scale
        return self._shown

    def view(self, *moves: Move) -> None:
        (self._view,) = moves or (None,)
        self._shown = None

    def move(self, moves: Sequence[Move]) -> int:
        return sum(map(self._moved, moves))

    def _moved(self, move: Move) -> int:
        step = kernels.whole_steps(self.name, move, self.values.numel(), self.values.device, self.residual)
        far = len(self.grid.levels)  # from end to end, in whatever integers the codes are
        after = self.grid.step(self.values, step.clamp(-far, far).view_as(self.values).to(self.values.dtype))
        changed = int((after != self.values).sum())
        self.values.copy_(after)
        self._shown = None
        return changed


class DenseSpace(Space):
    """A plain tensor that a model's modules show as a parameter.

    A linear layer or an embedding that models call sees its moved weight only while its own forward runs, so one layer's copy
    exists at a time. Other parameters (norms, biases) are swapped for as long as the view lasts, and so are layers that no
    forward has called: a model may multiply their weights itself, as Mamba its time steps'. The parameter itself is never
    written by a view, so nothing drifts, whatever its type.

    Args:
        name: of the tensor.
        values: bf16 or fp32 values that moves write; a parameter's own data, or a master beside it.
        sites: (module, attribute) of every parameter that shows them; none in a replay.
        show: values -> what the parameters hold, where they differ (a file's own order and offset).
    """

    def __init__(
        self,
        name: str,
        values: Tensor,
        sites: Iterable[tuple[nn.Module, str]] = (),
        show: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if values.dtype not in (torch.float32, torch.bfloat16):
            raise GradlessError(f"{name} is {values.dtype}; load the model in bfloat16 or float32.")
        self.name, self.values, self.show = name, values, show
        self.sites = list(sites)
        self.parameters: dict[tuple[nn.Module, str], nn.Parameter] = {site: getattr(*site) for site in self.sites}
        self._view: Move | None = None
        self._called: set[tuple[nn.Module, str]] = set()
        for site in self.sites:
            if type(site[0]) in (nn.Linear, nn.Embedding):
                site[0].register_forward_pre_hook(self._enter(site))
                site[0].register_forward_hook(self._leave(site), always_call=True)

    def view(self, *moves: Move) -> None:
        (self._view,) = moves or (None,)
        for site in self.sites:
            if site not in self._called:
                self._swap(site)

    def move(self, moves: Sequence[Move]) -> int:
        for move in moves:
            self.values.copy_(kernels.moved(self.values, self.name, move, self.values.dtype, stochastic=True))
        for parameter in self.parameters.values():
            if parameter.data_ptr() != self.values.data_ptr():
                parameter.data.copy_(self._shown(self.values))
        return 0

    def _shown(self, values: Tensor) -> Tensor:
        return values if self.show is None else self.show(values)

    def _swap(self, site: tuple[nn.Module, str]) -> None:
        module, attribute = site
        parameter = self.parameters[site]
        if self._view is not None:
            dtype = parameter.dtype if self.show is None else torch.float32
            moved = self._shown(kernels.moved(self.values, self.name, self._view, dtype)).to(parameter.dtype)
            parameter = nn.Parameter(moved, requires_grad=False)
        module._parameters[attribute] = parameter

    def _enter(self, site: tuple[nn.Module, str]) -> Callable[[nn.Module, Any], None]:
        def enter(_module: nn.Module, _inputs: Any) -> None:
            self._called.add(site)
            if self._view is not None:
                self._swap(site)

        return enter

    def _leave(self, site: tuple[nn.Module, str]) -> Callable[[nn.Module, Any, Any], None]:
        def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
            module._parameters[site[1]] = self.parameters[site]

        return leave


def parameters(
    model: nn.Module, chosen: Callable[[str, nn.Module], bool] | None = None, *, master: bool = False
) -> list[Space]:
    """The parameters of a dense model as spaces.

    Args:
        model: any torch module with fp32 or bf16 parameters.
        chosen: (name, module) -> whether to search it; None: the weights and biases of linear layers, heads left out.
        master: keep an fp32 master beside each bf16 parameter; otherwise updates of bf16 are rounded stochastically.

    Raises:
        GradlessError: nothing was chosen, or a parameter is neither fp32 nor bf16.
    """
    found: list[Space] = []
    for name, sites in parameter_sites(model, chosen).items():
        parameter = getattr(*sites[0])
        values = parameter.data.float() if master and parameter.dtype is not torch.float32 else parameter.data
        found.append(DenseSpace(name, values, sites))
    return found


def parameter_sites(
    model: nn.Module, chosen: Callable[[str, nn.Module], bool] | None = None
) -> dict[str, list[tuple[nn.Module, str]]]:
    """The chosen parameters by their first name: every (module, attribute) that shows each; see `parameters`."""
    chosen = chosen or linear_layers(model)
    names: dict[nn.Parameter, str] = {}
    sites: dict[str, list[tuple[nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            if chosen(name, module):
                sites.setdefault(names.setdefault(parameter, name), []).append((module, attribute))
    if not sites:
        raise GradlessError(f"no parameter of {type(model).__name__} was chosen for tuning.")
    return sites


def linear_layers(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Chooses what gradless trains by default: linear layers of the part that reads text, but not the head that shares or
    mirrors an embedding."""
    get_head: Callable[[], nn.Module] | None = getattr(model, "get_output_embeddings", None)
    head, reads = get_head() if get_head is not None else None, reads_text(model)
    return lambda _name, module: isinstance(module, nn.Linear) and module is not head and module in reads


def reads_text(model: Any) -> set[nn.Module]:
    """The modules that text goes through: all but the encoders of images and sounds, and what brings these into the stream.
    No loss depends on those here, so that a search would only move them about."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or config.get_text_config(decoder=True) is config:
        return set(model.modules())
    return {*model.get_decoder().modules(), model.get_output_embeddings()}
