"""What a method searches. A space is one named tensor x with two verbs: `view` lets forwards read a moved x without writing
it, and `move` writes it. One other function writes x: `BlockSpace.move_along_outer_product`, for a gradient that is known as an
outer product.

Over 400 lines, because the kinds of spaces are read side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TypeGuard

import torch
from torch import Tensor, nn

from gradless import kernels
from gradless.errors import GradlessError
from gradless.grids import Grid
from gradless.kernels.reference import f32, stopped
from gradless.targets import Kind
from gradless.tensor import UNMOVED, Move, PackedWeight, Part, TunedCodes, Views
from gradless.types import Config, LanguageModel, Modules

SLOPES_AT_ONCE = 1 << 17
"""The number of slopes in memory at once."""


class Space(ABC):
    """One tensor that a method searches.

    Attributes:
        name: unique in the model and stable between runs; with the seed it determines the noise.
        values: the point x itself.
        supports_paired_views: whether a forward can read x under several moves at once, each by its equal share of the batch.
        supports_per_token_views: whether each token of a batch can read x under a move of its own.
    """

    name: str
    values: Tensor
    supports_paired_views = supports_per_token_views = False

    @abstractmethod
    def view(self, *moves: Move) -> None:
        """Let forwards read x under the moves, or x itself if there are none."""

    @contextmanager
    def viewed_per_example(self, example_of_token: Tensor, moves: Sequence[Move]) -> Iterator[None]:
        """Inside the context, token i of a forward reads x under `moves[example_of_token[i]]`.

        Args:
            example_of_token: int64, (tokens,). The forward must see all tokens of the batch, in order.
            moves: one for each example; for a batch and its copy, one for each example of both.

        Raises:
            NotImplementedError: the space does not support it (`supports_per_token_views`).
        """
        raise NotImplementedError

    @abstractmethod
    def move(self, moves: Sequence[Move]) -> int:
        """Write x <- decay * x + coefficient * u, once for each move.

        Returns:
            How many changes of integer codes that were; 0 if x is continuous.
        """

    @property
    def codes(self) -> int:
        """How many integer codes x holds; 0 if it is continuous."""
        return 0

    @property
    def options(self) -> dict[str, object]:
        """The options of `TunableModel.spaces` that make such a space, its `Kind` under "kind" included, as plain values."""
        raise NotImplementedError

    @contextmanager
    def viewed(self, *moves: Move) -> Iterator[None]:
        """Inside the context forwards read x under the moves."""
        self.view(*moves)
        try:
            yield
        finally:
            self.view()

    def materialized(self, move: Move) -> AbstractContextManager[None]:
        """As `viewed`, for many forwards: x is moved once for all of them if memory for a second x is small."""
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
    """The scales (or offsets, or both by one factor) of a packed weight, one fp32 value a block; or its codebooks' entries."""

    supports_paired_views = supports_per_token_views = True

    def __init__(self, weight: PackedWeight, part: Part | str = Part.SCALE, *, relative: bool = True) -> None:
        weight.tune(part, relative=relative)
        self.name, self.values, self.weight, self._part = weight.name, weight.tuned_values.values, weight, Part(part)

    @property
    def options(self) -> dict[str, object]:
        return {"kind": Kind.BLOCKS, "part": str(self._part), "relative": self.weight.tuned_values.relative}

    def view(self, *moves: Move) -> None:
        self.weight.views = Views(moves)

    @contextmanager
    def viewed_per_example(self, example_of_token: Tensor, moves: Sequence[Move]) -> Iterator[None]:
        self.weight.views = Views(tuple(moves), example_of_token)
        try:
            yield
        finally:
            self.weight.views = UNMOVED

    def move(self, moves: Sequence[Move]) -> int:
        kernels.move_blocks(self.weight, moves)
        return 0

    @contextmanager
    def materialized(self, move: Move) -> Iterator[None]:
        with self.weight.read_at(self.weight.tuned_values.values.clone()):
            kernels.move_blocks(self.weight, [move])
            yield

    def slopes(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The change of each weight if its tuned value moves by one unit (weights are linear in what is tuned), a few rows at a
        time: file rows, int64 (n,), and slopes, fp32 (n, columns) in packed order."""
        weight, unit = self.weight, self.weight.unit()
        at_one, at_zero = weight.at(unit), weight.at(torch.zeros_like(unit))
        every = torch.arange(weight.rows, device=weight.packed.device)
        for rows in torch.split(every, max(1, SLOPES_AT_ONCE // weight.columns)):
            one, zero = (kernels.dequantize(end, rows, torch.float32)[0] for end in (at_one, at_zero))
            yield rows, one - zero

    def mean_square_slope(self) -> float:
        """The mean over all weights."""
        return sum(float(slopes.square().sum()) for _, slopes in self.slopes()) / (self.weight.rows * self.weight.columns)

    def move_along_outer_product(self, rows: Tensor, columns: Tensor, by: float) -> None:
        """Move x along the gradient of <W, G>, G = sum_t rows_t (x) columns_t: x <- x + by * unit * dW/dx . G.

        One value's sum is added up by halves, so that its bits are the same on every device.

        Args:
            rows: fp32 (terms, rows), in the file's order.
            columns: fp32 (terms, columns), in the model's order.
            by: how far, in units; rounded to fp32.
        """
        weight, values = self.weight, self.weight.tuned_values.values
        rows, columns = rows.to(values.device), columns.to(values.device)
        if weight.column_order is not None:
            columns = columns[:, weight.column_order]
        moved = values.clone()
        unit = weight.unit()
        for these, slopes in self.slopes():
            total = torch.zeros(len(these), weight.values_per_row, device=values.device)
            for row, column in zip(rows[:, these], columns, strict=True):
                total = total + row.unsqueeze(1) * _summed(slopes * column, weight.columns_per_value)
            moved[these] = values[these] + unit[these] * (total * f32(by))
        values.copy_(stopped(weight, moved))


def _summed(x: Tensor, group: int) -> Tensor:
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
        weight: the packed weight; updates write its codes in place.
        stride: tune rows 0, stride, 2 * stride ... in the file's order, and leave the others alone.
        clamp: whether a query stops at the grid's ends as an update does.
        residual: keep the rest of an update's rounding, a byte a code, and add it to the next update (error feedback).
            Without one every update is rounded stochastically: unbiased too, but each adds noise of its own.

    Raises:
        GradlessError: the weight's codes are no steps of a grid.
    """

    supports_paired_views = True

    def __init__(self, weight: PackedWeight, *, stride: int = 1, clamp: bool = False, residual: bool = False) -> None:
        self.weight = weight.in_blocks()
        self.weight.tuned = tuned = TunedCodes(stride, clamp)
        if residual:
            shape = torch.Size((self.weight.tuned_rows, self.weight.columns))
            tuned.residual = kernels.on("cpu").dither(weight.name, shape).to(weight.packed.device)
        self.name, self.values = weight.name, weight.packed

    @property
    def options(self) -> dict[str, object]:
        tuned = self.weight.tuned
        assert isinstance(tuned, TunedCodes)
        return {"kind": Kind.CODES, "stride": tuned.stride, "clamp": tuned.clamp, "residual": tuned.residual is not None}

    @property
    def codes(self) -> int:
        return self.weight.tuned_rows * self.weight.columns

    def view(self, *moves: Move) -> None:
        self.weight.views = Views(moves)

    def move(self, moves: Sequence[Move]) -> int:
        ops = kernels.on(self.weight.packed.device)
        return sum(ops.move_codes(self.weight, move) for move in moves)


class GridSpace(Space):
    """A plain tensor whose values are a scale times the levels of a grid: x = scale * levels[codes].

    Args:
        name: the tensor's name.
        codes: int16, any shape; updates write them in place.
        grid: the levels; a step is one level up or down, whatever its size.
        scale: the one scale of the tensor.
        clamp: whether a query stops at the grid's ends. Only a uniform grid has anything to read beyond them.
        residual: as in `CodeSpace`.
    """

    def __init__(
        self, name: str, codes: Tensor, grid: Grid, scale: float, *, clamp: bool = False, residual: bool = False
    ) -> None:
        self.name, self.values, self.grid, self.scale = name, codes, grid, scale
        self.residual = kernels.on("cpu").dither(name, codes.shape).to(codes.device) if residual else None
        self.clamp = clamp or not grid.uniform
        self._view: Move | None = None
        self._shown: Tensor | None = None

    @property
    def codes(self) -> int:
        return self.values.numel()

    @property
    def options(self) -> dict[str, object]:
        return {"kind": Kind.CODES, "clamp": self.clamp, "residual": self.residual is not None}

    def shown(self) -> Tensor:
        """x as a forward reads it now: fp32, in the codes' shape; kept until the next view or move."""
        if self._shown is None:
            codes: Tensor = self.values
            if self._view is not None:
                u = kernels.on(codes.device).coordinates(self._view.direction, self.name, codes.numel(), codes.device)
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
        step = kernels.on(self.values.device).whole_steps(
            self.name, move, self.values.numel(), self.values.device, self.residual
        )
        far = len(self.grid.levels)  # from end to end, in whatever integers the codes are
        after = self.grid.step(self.values, step.clamp(-far, far).view_as(self.values).to(self.values.dtype))
        changed = int((after != self.values).sum())
        self.values.copy_(after)
        self._shown = None
        return changed


class DenseSpace(Space):
    """A plain tensor that a model's modules hold as a parameter.

    A linear layer or an embedding that models call sees its moved weight only while its own forward runs, so one layer's copy
    exists at a time. Other parameters (norms, biases) are swapped for as long as the view lasts, and so are layers that no
    forward has called: a model may multiply their weights itself, as Mamba its time steps'. The parameter itself is never
    written by a view, so nothing drifts, whatever its type.

    Args:
        name: the tensor's name.
        values: bf16 or fp32 values that moves write; a parameter's own data, or an fp32 copy beside it.
        sites: (module, attribute) of every parameter that holds them; none in a replay.
        show: turns values into the parameters' own, if they differ (a file's own order and offset).
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

    @property
    def options(self) -> dict[str, object]:
        copied = all(parameter.dtype is not self.values.dtype for parameter in self.parameters.values())
        return {"kind": Kind.PARAMETERS, "master": copied}

    def view(self, *moves: Move) -> None:
        (self._view,) = moves or (None,)
        for site in self.sites:
            if site not in self._called:
                self._swap(site)

    def move(self, moves: Sequence[Move]) -> int:
        ops = kernels.on(self.values.device)
        for move in moves:
            self.values.copy_(ops.moved(self.values, self.name, move, self.values.dtype, stochastic=True))
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
            moved = kernels.on(self.values.device).moved(self.values, self.name, self._view, dtype)
            parameter = nn.Parameter(self._shown(moved).to(parameter.dtype), requires_grad=False)
        module._parameters[attribute] = parameter

    def _enter(self, site: tuple[nn.Module, str]) -> Callable[[nn.Module, object], None]:
        def enter(_module: nn.Module, _inputs: object) -> None:
            self._called.add(site)
            if self._view is not None:
                self._swap(site)

        return enter

    def _leave(self, site: tuple[nn.Module, str]) -> Callable[[nn.Module, object, object], None]:
        def leave(module: nn.Module, _inputs: object, _output: object) -> None:
            module._parameters[site[1]] = self.parameters[site]

        return leave


def dense_spaces(
    model: Modules, chosen: Callable[[str, nn.Module], bool] | None = None, *, master: bool = False
) -> list[Space]:
    """The parameters of a dense model as spaces.

    Args:
        model: any torch module with fp32 or bf16 parameters.
        chosen: (name, module) -> whether to search it; None: the weights and biases of linear layers, heads left out.
        master: keep an fp32 copy beside each bf16 parameter; otherwise updates of bf16 are rounded stochastically.

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
    model: Modules, chosen: Callable[[str, nn.Module], bool] | None = None
) -> dict[str, list[tuple[nn.Module, str]]]:
    """The chosen parameters by their first name: every (module, attribute) that holds each; see `dense_spaces`."""
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


def linear_layers(model: Modules) -> Callable[[str, nn.Module], bool]:
    """A test for the modules that gradless trains by default: linear layers of the part that reads text, but not the head that
    shares or mirrors an embedding."""
    get_head: Callable[[], nn.Module] | None = getattr(model, "get_output_embeddings", None)
    head, reads = get_head() if get_head is not None else None, reads_text(model)
    return lambda _name, module: isinstance(module, nn.Linear) and module is not head and module in reads


def reads_text(model: Modules) -> set[nn.Module]:
    """The modules that text goes through: all but the encoders of images and sounds, and their projections into the stream.
    No loss depends on those here, so a search would only move them about."""
    if not _has_encoders(model):
        return set(model.modules())
    head = model.get_output_embeddings()
    return {*model.get_decoder().modules(), *([] if head is None else [head])}


def _has_encoders(model: Modules) -> TypeGuard[LanguageModel]:
    """Whether it is a language model with encoders of images or sounds."""
    config: Config | None = getattr(model, "config", None)
    return config is not None and hasattr(config, "get_text_config") and config.get_text_config(decoder=True) is not config
