"""The options of a run: one dataclass is the configuration, the YAML keys and the command line's flags.

Importing this module is cheap: the command line reads it before torch is there.
"""

from __future__ import annotations

from dataclasses import Field, dataclass, fields, replace
from typing import Any

from gradless.errors import GradlessError
from gradless.flags import Range, above_zero, check_ranges, option, whole

CHOICES = ("qzo", "nzo", "ezo", "quzo", "zoqo", "mezo")
CODES = ("quzo", "zoqo")
"""The methods that tune integer codes."""
RATIO, MEZO_RATIO = 0.3, 0.2
"""Of a step's root mean square to a query's, where the step size follows the estimates."""
SHARED = ("qzo", "quzo", "zoqo", "mezo")
"""The methods whose examples share their directions."""
NZO_QUERIES = 8
"""Queries an example, each of two tokens."""
LAST = 1 / 2
"""Of a model's layers those that nzo tunes: there one sensitivity serves all examples."""
INTO_STREAM = ("o_proj", "down_proj")
"""The modules of a layer that nzo tunes: those that write into the residual stream."""

SIZE = above_zero(10**6)
"""Of a step or a perturbation, in whatever unit."""
BITS, GROUPS, COUNT, ROWS = whole(2, 8), whole(1, 1 << 20), whole(1, 10**9), whole(1, 1 << 16)
SEED = whole(0, 2**63 - 1)


def number_or_auto(text: str) -> float | str:
    """What --lr takes."""
    return text if text == "auto" else float(text)


@dataclass
class MethodOptions:
    """How a method searches. `None` takes the method's default for the kind of model (see `defaults`)."""

    method: str = option(
        "qzo",
        "How to search; see RunOptions.",
        choices=CHOICES,
    )
    lr: float | str | None = option(
        None,
        "Step size at the start (zoqo: eta, in grid steps; nzo: by how much a step changes the answers' scores), or auto: from "
        "the estimates' size and --ratio (ezo's default, and mezo's for plain weights), and --eps, where not given, from a "
        "short probe.",
        parse=number_or_auto,
        metavar="N|auto",
        within=SIZE,
    )
    ratio: float | None = option(
        None,
        f"--lr auto: the root mean square of a step, in units of eps (default: {RATIO}, of mezo {MEZO_RATIO}).",
        methods=("qzo", "ezo", "mezo"),
        within=above_zero(10**3),
    )
    eps: float | None = option(None, "Size of a query's perturbation (quzo, and zoqo's mu: in grid steps).", within=SIZE)
    share: float | None = option(
        None,
        "quzo, zoqo: share of the tuned codes that a query moves, instead of --eps.",
        methods=CODES,
        within=above_zero(0.5),
    )
    q: int | None = option(
        None,
        "Queries (directions) a step, each of which costs two forwards (default: 1); nzo: an example, each of which costs two "
        "tokens (default: 8).",
        methods=(*SHARED, "nzo"),
        within=COUNT,
    )
    clip: float = option(
        100.0, "QZO: the largest directional derivative that an update follows.", methods=("qzo",), within=above_zero(10**12)
    )
    part: str | None = option(
        None,
        "Which value of a block is tuned (default: scale, of nzo both); types without an offset, or without codebooks, tune "
        "their scale.",
        choices=("scale", "offset", "both", "codebook"),
        methods=("qzo", "nzo"),
    )
    absolute: bool = option(
        False,
        "Perturb by eps itself (qzo, as in the paper: not relative to each scale; quzo, zoqo: not in grid steps).",
        methods=("qzo", *CODES),
    )
    train_unquantized: bool = option(
        False, "QZO: search the unquantized tensors (norms, biases) in the same step.", methods=("qzo",)
    )
    unquantized_lr: float | None = option(None, "Step size of the unquantized tensors.", needs="train_unquantized", within=SIZE)
    unquantized_eps: float | None = option(
        None, "Size of the unquantized tensors' perturbation.", needs="train_unquantized", within=SIZE
    )
    master: bool = option(
        False, "MeZO: keep fp32 masters of bf16 weights instead of rounding updates stochastically.", methods=("mezo",)
    )
    distribution: str = option(
        "gaussian",
        "Distribution of directions (zoqo: gaussian, which is discretized, or uniform; quzo: gaussian).",
        choices=("gaussian", "rademacher", "uniform"),
        methods=SHARED,
    )
    roundings: int = option(
        1, "QuZO: round a direction once (Q-RGE1) or twice (Q-RGE2).", choices=(1, 2), methods=("quzo",), within=whole(1, 2)
    )
    perturbation_bits: int | None = option(
        None, "QuZO: cut a query's steps to the integers of so many bits (one rounding).", methods=("quzo",), within=BITS
    )
    span: int | None = option(
        None,
        "quzo, zoqo: neighbouring codes that share one coordinate of a direction (default: 32 on evenly spaced grids of up to "
        "16 levels, else 1).",
        methods=CODES,
        within=ROWS,
    )
    whole_steps: bool = option(
        False, "ZOQO: move by a whole grid step at least, as in the paper; no residual then.", methods=("zoqo",)
    )
    hold: bool = option(
        False, "ZOQO: a third forward a step, at x itself; move only where a side of it is lower.", methods=("zoqo",)
    )
    stride: int | None = option(
        None, "quzo, zoqo: tune every n-th row of a weight only (default: 16).", methods=CODES, within=ROWS
    )
    stateless: bool = option(
        False, "quzo, zoqo: round every update at once, as in the papers, and keep no residual (a byte a code).", methods=CODES
    )
    clamp: bool = option(False, "quzo, zoqo: stop at the grid's ends in queries too.", methods=CODES)
    target_modules: str | None = option(
        None,
        "Tune these modules instead of all linear layers: names that their paths end with, or a regular expression.",
        metavar="A,B,..|REGEX",
    )
    exclude_modules: str | None = option(None, "Leave these modules out.", metavar="A,B,..|REGEX")
    weight_decay: float = option(
        0.0, "Decay of the tuned values a step, times lr.", methods=(*SHARED, "ezo"), within=Range(0, 1000)
    )

    @property
    def queries(self) -> int:
        """See `q`."""
        return self.q or (NZO_QUERIES if self.method == "nzo" else 1)

    def check(self) -> None:
        """Refuse values that cannot work, or that the method (where it is still to be chosen, qzo) would not read."""
        check_ranges(self)
        method = "qzo" if self.method == "auto" else self.method
        names = {each.name for each in fields(MethodOptions)}
        for each in (each for each in fields(self) if each.name in names):
            value, methods = getattr(self, each.name), each.metadata.get("methods")
            _check_option(self, each)
            if methods and value != each.default and method not in methods:
                raise GradlessError(f"{each.name} is for {' and '.join(methods)}; {method} does not read it.")
        if isinstance(self.lr, str) and (self.lr != "auto" or method in (*CODES, "nzo")):
            raise GradlessError(f"lr is {self.lr!r}; it is a number, or auto for qzo, ezo and mezo.")
        if self.part == "codebook" and method == "nzo":
            raise GradlessError("nzo tunes what belongs to one row, and a codebook's entries do not; tune them with qzo.")
        if self.ratio is not None and self.lr not in (None, "auto"):
            raise GradlessError("ratio is for --lr auto; leave one of the two out.")
        if self.ratio is not None and self.lr is None and method not in ("ezo", "mezo"):
            raise GradlessError(f"ratio is for a step size that follows the estimates; give --lr auto to {method}.")
        if self.share is not None and (self.eps is not None or self.distribution == "uniform"):
            raise GradlessError("share stands for eps, with gaussian noise; leave --eps and --distribution out, or --share.")
        if self.absolute and method in CODES and (self.eps is None or self.lr is None):
            raise GradlessError(f"{method} has no defaults in units of the weights; give --eps and --lr with --absolute.")
        if self.perturbation_bits is not None and self.roundings != 1:
            raise GradlessError("perturbation_bits goes with one rounding; leave --roundings out, or --perturbation-bits.")


def _check_option(options: MethodOptions, each: Field[Any]) -> None:
    """Refuse what is none of an option's choices, and an option without the one that it goes with."""
    value, choices, needs = getattr(options, each.name), each.metadata.get("choices"), each.metadata.get("needs")
    if choices and value not in (each.default, *choices):
        raise GradlessError(f"{each.name} is {value!r}; it can be {', '.join(map(str, choices))}.")
    if needs and value != each.default and getattr(options, needs) in (None, False):
        flag = needs.replace("_", "-")
        raise GradlessError(f"{each.name} goes with --{flag}; give it too, or leave {each.name} out.")


GRID_CHOICES = ("int", "uint", "fp8", "fp8-e5m2", "nf4")


@dataclass
class RunOptions(MethodOptions):
    """Everything that `gradless tune` takes beside the model and the data."""

    method: str = option(
        "auto",
        "qzo: scales of a quantized model; nzo: scales and offsets, for answers of one word, from perturbed outputs; ezo: "
        "offsets, each example along a direction of its own; quzo, zoqo: integer codes; mezo: plain weights; auto: mezo for "
        "plain weights, nzo where all rows choose among the same few one-token words and no option asks for another, else qzo.",
        choices=("auto", *CHOICES),
    )
    eval: str | None = option(None, "Rows to measure on, as DATA.", metavar="DATA")
    task: str | None = option(None, "A built-in task; without it, or --template, the data's columns decide.", metavar="NAME")
    template: str | None = option(None, "A prompt with {columns}, such as '{text} It was'.", metavar="TEXT")
    labels: str | None = option(None, "Labels and their words, such as 0=terrible,1=great.", metavar="A=B,..")
    split: str = option("train", "Split of a data set that is given by name.")
    eval_split: str = option("validation", "Split of --eval where that is a data set's name.")
    train_rows: int | None = option(None, "Train on this many rows, chosen by the seed.", within=COUNT)
    eval_rows: int | None = option(None, "Measure on the first rows only.", within=COUNT)
    max_length: int | None = option(
        None, "Keep only the last tokens of longer prompts, and of longer conversations.", within=whole(3, 10**9)
    )
    train_on: str = option("all", "The assistant's messages of a conversation that are learned.", choices=("all", "last"))
    steps: int | None = option(None, "Steps to run (1000 unless --max-minutes is given).", within=COUNT)
    max_minutes: float | None = option(
        None, "Stop after so many minutes; the schedule follows the clock.", within=above_zero(10**7)
    )
    batch_size: int = option(16, "Examples in a forward.", within=ROWS)
    accumulate: int = option(1, "Forwards (micro-batches) under one direction.", within=ROWS)
    bits: int | None = option(None, "Quantize a dense folder to so many bits first (2 to 8).", within=BITS)
    grid: str = option(
        "int", "Levels to quantize to: int (symmetric), uint (with an offset), fp8, fp8-e5m2, nf4.", choices=GRID_CHOICES
    )
    group_size: str = option("64", "Weights of a row that share a range, or channel: a range a row.", metavar="N|channel")
    search: bool = option(False, "Choose ranges by squared error.")
    lora: int | None = option(
        None, "quzo, zoqo: tune LoRA adapters of this rank, on a grid, instead of the weights.", within=ROWS
    )
    lora_alpha: float = option(64.0, "An adapter's update is alpha / rank times B A.", needs="lora", within=SIZE)
    lora_bits: int = option(8, "Bits of the adapters' grid (2 to 8).", needs="lora", within=BITS)
    activations: str = option(
        "bf16",
        "What linear layers multiply: bf16 with unpacked weights; int8, token by token, with integer codes; or fp8 with fp8.",
        choices=("bf16", "int8", "fp8"),
    )
    schedule: str = option("linear", "How lr falls.", choices=("linear", "constant", "cosine"))
    eval_every: int = option(200, "Steps between measurements on --eval.", within=COUNT)
    seed: int = option(0, "Decides directions and the order of the data.", within=SEED)
    threads: int | None = option(None, "CPU threads (default: one a core).", within=whole(1, 1024))
    trust_remote_code: bool = option(False, "Let the model's folder run its own Python.")
    output: str = option("runs/latest", "Folder of the tuned model and its journal.", metavar="DIR")
    resume: bool = option(False, "Go on with the run that --output holds.")
    overwrite: bool = option(False, "Replace the run that --output holds.")
    allow_changes: bool = option(False, "Resume although versions, kernels or threads differ; bits may then differ too.")

    def chosen(self, *, quantized: bool, one_word: bool) -> RunOptions:
        """The options with `auto` made a method: whether the model has quantized weights, and whether nzo could tune them on
        these rows."""
        if self.method != "auto":
            return self
        if not quantized:
            return replace(self, method="mezo")
        nzo = one_word and self.lr is None and self.eps is None and self.target_modules is None
        try:
            return replace(self, method="nzo" if nzo else "qzo")
        except GradlessError:  # an option that nzo does not read
            return replace(self, method="qzo")

    @property
    def quantizes(self) -> bool:
        """Whether a dense folder is quantized first."""
        return self.bits is not None or self.grid != "int"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, wherever they came from."""
        self.check()
        for each in fields(self):
            _check_option(self, each)
        if not (self.group_size == "channel" or (self.group_size.isdecimal() and int(self.group_size[:9]) in GROUPS)):
            raise GradlessError(
                f"group_size is {self.group_size!r}; it is a number of weights, at most {GROUPS.most:,}, or channel."
            )
        if self.lora is not None and self.method not in CODES:
            raise GradlessError("lora is for adapters on a grid, which quzo and zoqo tune: choose one of them, or none.")
        if self.lora is not None and self.stride is not None:
            raise GradlessError("stride is for a model's own codes; adapters are tuned whole: leave it out with --lora.")
        if self.quantizes and self.activations == "int8" and not grid_name(self).startswith(("int", "uint")):
            raise GradlessError(f"{self.grid}'s codes are no integers; int8 activations need --grid int or uint.")
        if self.quantizes and self.activations == "fp8" and (not self.grid.startswith("fp8") or self.group_size != "channel"):
            raise GradlessError("fp8 activations need weights of --grid fp8 or fp8-e5m2 with --group-size channel.")


MAY_CHANGE = {"output", "resume", "overwrite", "allow_changes", "eval", "eval_rows", "eval_every", "eval_split"}
MAY_CHANGE |= {"max_minutes", "threads"}
"""What a resumed run may set anew without becoming another run."""


DEFAULTS = {
    "qzo": (8e-3, 6e-2),
    "qzo, codes from zero": (4e-4, 2e-2),
    "qzo, absolute": (1e-7, 1e-3),
    "nzo": (0.6, 0.25),
    "ezo": (RATIO, 1e-2),
    "ezo, scales": (RATIO, 6e-2),
    "quzo": (0.6, 0.35),
    "quzo, few levels": (0.15, 0.5),
    "quzo, lora": (1.6, 1.6),
    "zoqo": (0.04, 0.53),
    "zoqo, few levels": (0.04, 0.53),
    "zoqo, lora": (0.05, 2.4),
    "mezo": (MEZO_RATIO, 1e-3),
    "mezo, floats of a GGUF": (1e-3, 3e-2),
}
"""(lr, or a ratio, and eps) that learn where a user gives none; docs/results.md has the runs behind them."""
AUTO = ("ezo", "ezo, scales", "mezo")
"""Those of `DEFAULTS` that begin with a ratio: steps choose their own size."""


def qzo_default(centred: bool) -> str:
    """Which of `DEFAULTS` is for a tensor's scales; where codes begin at zero these shift a block's mean too."""
    return "qzo" if centred else "qzo, codes from zero"


DEFAULT_GRID = 15.0
"""Steps of the grid that the defaults of quzo and zoqo are for; along longer and shorter ones they reach as far."""
FEW_LEVELS, DEFAULT_SPAN = 16, 32
"""On grids of so few levels neighbouring codes move together: a finer change of what a layer computes than single ones make."""
DEFAULT_STRIDE = 16
"""Of the rows whose codes quzo and zoqo tune."""
PAIR_TOKENS = 1024
"""In batches of up to so many both losses of a query come from one forward; in longer ones unpacking is a small part."""


def grid_name(options: RunOptions) -> str:
    """The name in `grids.GRIDS` of what --grid and --bits ask for together.

    Raises:
        GradlessError: they contradict each other.
    """
    fixed = {"fp8": ("fp8-e4m3", 8), "fp8-e5m2": ("fp8-e5m2", 8), "nf4": ("nf4", 4)}
    if options.grid in fixed:
        name, bits = fixed[options.grid]
        if options.bits not in (None, bits):
            raise GradlessError(f"--grid {options.grid} has {bits} bits, not {options.bits}.")
        return name
    if options.bits is None:
        raise GradlessError("give --bits (2 to 8), or --grid fp8, fp8-e5m2 or nf4.")
    return f"{options.grid}{options.bits}"
