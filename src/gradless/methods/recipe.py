"""`Recipe`: everything that a run must know of a method beside its equations. Recipes import no torch at their top, because the
command line reads the options of all methods before torch is there."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Protocol, TypeVar

from gradless.errors import GradlessError
from gradless.flags import Range, above_zero, option, whole
from gradless.targets import Kind, Targets

if TYPE_CHECKING:
    from gradless.batch import Batch
    from gradless.formats.checkpoint import Checkpoint
    from gradless.formats.model import TunableModel
    from gradless.methods.base import Group, ZerothOrderOptimizer

RATIO = 0.3
"""Default root mean square of a step, in units of eps, if the step size follows the estimates."""
SIZE = above_zero(10**6)
"""Range of a step size or a perturbation, in any unit."""
Arguments = dict[str, Any]
"""Arguments of a constructor by name, plain values."""
BITS, COUNT, ROWS = whole(2, 8), whole(1, 10**9), whole(1, 1 << 16)


def number_or_auto(text: str) -> float | str:
    """Read the value of --lr."""
    return text if text == "auto" else float(text)


# -- options that several methods read ------------------------------------------------------------------------------------


@dataclass
class SearchOptions:
    """Options that every method reads. None stands for the method's default for the kind of model."""

    lr: float | str | None = option(
        None,
        "Step size at the start (zoqo: eta, in grid steps; nzo: the change of the answers' scores by a step), or auto: it "
        "follows from the size of the estimates and --ratio (the default of ezo, and of mezo for plain weights), and --eps, if "
        "not given, from a short probe.",
        parse=number_or_auto,
        texts=("auto",),
        metavar="N|auto",
        within=SIZE,
    )
    eps: float | None = option(None, "Size of a query's perturbation (quzo, and zoqo's mu: in grid steps).", within=SIZE)
    target_modules: str | None = option(
        None,
        "Tune these modules instead of all linear layers: names that their paths end with, or a regular expression.",
        metavar="A,B,..|REGEX",
    )
    exclude_modules: str | None = option(None, "Leave these modules out.", metavar="A,B,..|REGEX")


@dataclass
class AutoOptions:
    """Step sizes that follow the estimates."""

    ratio: float | None = option(
        None,
        f"--lr auto: the root mean square of a step, in units of eps (default: {RATIO}; mezo: 0.2).",
        within=above_zero(10**3),
    )


@dataclass
class QueryOptions:
    """The number of directions."""

    q: int | None = option(
        None,
        "Queries (directions) a step, each of which costs two forwards (default: 1); nzo: queries an example, each of which "
        "costs two tokens (default: 8).",
        within=COUNT,
    )


@dataclass
class SharedDirections(QueryOptions):
    """Directions that all examples of a batch share."""

    distribution: str = option(
        "gaussian",
        "Distribution of directions (zoqo: gaussian, which is discretized, or uniform; quzo: gaussian).",
        choices=("gaussian", "rademacher", "uniform"),
    )


@dataclass
class DecayOptions:
    """Weight decay."""

    weight_decay: float = option(0.0, "Decay of the tuned values a step, times lr.", within=Range(0, 1000))


@dataclass
class PartOptions:
    """The field of a block."""

    part: str | None = option(
        None,
        "The value of a block that is tuned (default: scale; nzo: both); types without an offset, or without codebooks, tune "
        "their scale.",
        choices=("scale", "offset", "both", "codebook"),
    )


@dataclass
class AbsoluteOptions:
    """The unit of steps."""

    absolute: bool = option(
        False, "Perturb by eps itself (qzo, as in the paper: not relative to each scale; quzo, zoqo: not in grid steps)."
    )


def check_auto(lr: float | str | None, ratio: float | None) -> None:
    """Refuse step sizes that contradict each other, for a method whose steps can choose their own size.

    Raises:
        GradlessError: see above.
    """
    if isinstance(lr, str) and lr != "auto":
        raise GradlessError(f"lr is {lr!r}; it is a number, or auto.")
    if ratio is not None and lr not in (None, "auto"):
        raise GradlessError("ratio is for --lr auto; leave one of the two out.")


CONTINUOUS = ("gaussian", "rademacher")
"""Distributions of directions over continuous values."""


def check_continuous(distribution: str) -> None:
    """Refuse a distribution that does not move continuous values.

    Raises:
        GradlessError: see above.
    """
    if distribution not in CONTINUOUS:
        raise GradlessError(f"directions over continuous values are {' or '.join(CONTINUOUS)}, not {distribution}.")


# -- what a recipe gives ----------------------------------------------------------------------------------------------------


class Defaults(NamedTuple):
    """The default step size and perturbation; docs/results.md has the runs behind them."""

    lr: float
    eps: float
    auto: bool = False
    """Whether lr is a ratio, and steps choose their own size."""


FLOATS = Defaults(1e-3, 3e-2)
"""Defaults for the unquantized tensors of a quantized file."""


OptionsT = TypeVar("OptionsT", bound=SearchOptions)
OptionsT_co = TypeVar("OptionsT_co", bound=SearchOptions, covariant=True)


class Setting(Protocol[OptionsT_co]):
    """A run before its first step, as a recipe sees it."""

    @property
    def model(self) -> TunableModel: ...

    @property
    def options(self) -> OptionsT_co: ...

    @property
    def seed(self) -> int: ...

    @property
    def answer_words(self) -> int:
        """The number of words among which all rows choose, if these are single tokens and the model keeps copies of a token
        apart; else 0."""

    def first_batches(self, rows: int | None = None) -> Sequence[Batch]:
        """The first training rows, in micro-batches; by default one micro-batch."""


@dataclass(frozen=True)
class Setup:
    """How a run searches, in plain values. With the base and the journal's steps it is all that a replay needs.

    Attributes:
        method: the method's name and its constructor's arguments.
        groups: the parameter groups: kind and names of their tensors, and their options.
        eps_factor: the probe's factor for every eps; None without a probe.
    """

    method: Arguments
    groups: list[Group]
    eps_factor: float | None = None


class Recipe(ABC, Generic[OptionsT]):
    """A method's name, options, defaults, parameter groups and calibration, and its entries in plans and cards.

    Attributes:
        name: the value of --method.
        title: the method, its paper and the tuned values, for a model card.
        summary: the tuned values, for --help.
        options: the dataclass of the options that it reads.
        queries: default number of queries.
        tunes_codes: whether it tunes integer codes, and so LoRA adapters on a grid too.
        moves_scales: whether it moves the scales of groups.
        pairs: whether both sides of a query go through one forward if the batch is short.
        tokens_added: number of tokens that it adds to each example.
        held_packed: whether weights stay packed, as in the quantized file.
        ratio: the default of --ratio.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    options: ClassVar[type[SearchOptions]]
    queries: ClassVar[int] = 1
    tunes_codes: ClassVar[bool] = False
    moves_scales: ClassVar[bool] = False
    pairs: ClassVar[bool] = True
    tokens_added: ClassVar[int] = 0
    held_packed: ClassVar[bool] = True
    ratio: ClassVar[float] = RATIO

    @abstractmethod
    def method(self) -> type[ZerothOrderOptimizer]:
        """The method's class."""

    @abstractmethod
    def groups(self, model: TunableModel, options: OptionsT) -> list[Group]:
        """The parameter groups.

        Raises:
            GradlessError: the model has nothing that the method tunes.
        """

    @abstractmethod
    def tunable(self, file: Checkpoint) -> tuple[dict[str, int], str]:
        """The values of a file that the method tunes by default: counts, and a phrase that follows "would tune"."""

    @abstractmethod
    def state_bytes(self, linear: Sequence[tuple[int, int]], blocks: int) -> int:
        """Bytes of the method's state beside the weights, for linear layers (outputs, inputs) with this many blocks in all."""

    def check(self, options: OptionsT) -> None:
        """Refuse options that contradict each other.

        Raises:
            GradlessError: see above.
        """
        if isinstance(options.lr, str):
            raise GradlessError(f"lr is {options.lr!r}; it is a number for {self.name}.")

    def suits(self, options: OptionsT, *, quantized: bool, one_word: bool) -> bool:
        """Whether --method auto may take the method.

        Args:
            options: the run's.
            quantized: whether the model's weights are quantized.
            one_word: whether all rows choose among the same few one-token words.
        """
        del options, quantized, one_word
        return False

    def arguments(self, options: OptionsT) -> Arguments:
        """The constructor's arguments beside groups and seed, as plain values."""
        del options
        return {}

    def copies(self, options: OptionsT) -> int:
        """Number of copies of its answer token that an example needs."""
        del options
        return 0

    def scale_eps(self, *, centred: bool) -> float | None:
        """The default perturbation of scales, relative to each; None if the method does not move scales alone."""
        del centred
        return None

    def setup(self, setting: Setting[OptionsT], earlier: Setup | None = None) -> Setup:
        """How a run searches. If steps choose their own size, a probe sets eps.

        Args:
            setting: the run.
            earlier: the setup with which the run began, if it is resumed; its calibration is not repeated.
        """
        options = setting.options
        method = {"name": self.name, "seed": setting.seed, **self.arguments(options)}
        groups = self.groups(setting.model, options)
        if options.eps or getattr(options, "unquantized_eps", None) or not any(group.get("auto") for group in groups):
            return Setup(method, groups)
        factor = self._probe(setting, Setup(method, groups)) if earlier is None else earlier.eps_factor or 1.0
        return Setup(method, [{**group, "eps": factor * group["eps"]} for group in groups], factor)

    def names(
        self, model: TunableModel, options: OptionsT, kind: Kind, missing: str, *, target: str | None = None
    ) -> list[str]:
        """The names of the tensors of a kind that are tuned.

        Args:
            model: see `groups`.
            options: see `groups`.
            kind: the tensors' kind.
            missing: the error if there are no such tensors.
            target: the modules if the user names none.
        """
        names = model.tunable(kind, Targets(options.target_modules or target, options.exclude_modules))
        if not names:
            raise GradlessError(f"{missing}.")
        return names

    def group(self, options: OptionsT, kind: Kind, names: list[str], defaults: Defaults) -> Group:
        """One group over the named tensors of a kind, with the user's lr and eps, or the defaults."""
        ratio = getattr(options, "ratio", None)
        group: Group = {
            "kind": kind,
            "names": names,
            "lr": defaults.lr if options.lr is None else options.lr,
            "eps": options.eps or defaults.eps,
            "weight_decay": getattr(options, "weight_decay", 0.0),
        }
        if options.lr == "auto" or (options.lr is None and (defaults.auto or ratio is not None)):
            return {**group, "lr": ratio or self.ratio, "auto": True}
        return group

    def _probe(self, setting: Setting[OptionsT], setup: Setup) -> float:
        """The factor for every eps; see `probe.best_factor`."""
        import torch

        from gradless.methods.probe import best_factor

        optimizer = build(setting.model, setup, self.method())
        optimizer.q = optimizer.probe_queries
        batch, *_ = setting.first_batches()

        def derivatives(factor: float) -> torch.Tensor:
            for group, given in zip(optimizer.param_groups, setup.groups, strict=True):
                group["eps"] = factor * given["eps"]
            return torch.tensor([float(plus - minus) / (2 * factor) for plus, minus in optimizer.measure(batch).losses])

        with torch.inference_mode():
            return best_factor(derivatives)


def build(model: TunableModel, setup: Setup, method: type[ZerothOrderOptimizer]) -> ZerothOrderOptimizer:
    """A method over the spaces of a model.

    Args:
        model: the model to search.
        setup: how to search, from `Recipe.setup` or from a journal.
        method: the class that `setup.method` names.
    """
    made = []
    for group in setup.groups:
        of_spaces = {name: value for name, value in group.items() if name in SPACE_OPTIONS}
        of_method = {name: value for name, value in group.items() if name not in SPACE_OPTIONS}
        made.append({**of_method, "spaces": model.spaces(**of_spaces)})
    return method(made, **{name: value for name, value in setup.method.items() if name != "name"})


SPACE_OPTIONS = ("kind", "names", "part", "relative", "master", "clamp", "residual", "stride")
"""The options of a group that its spaces take; the method takes all others."""
