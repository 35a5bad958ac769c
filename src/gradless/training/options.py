"""The options of a run: one dataclass is the configuration, the YAML keys and the command line's flags.

Importing this module is cheap: the command line reads it before torch is there.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import product

from gradless.errors import GradlessError
from gradless.flags import above_zero, check_values, option, whole
from gradless.methods.recipe import BITS, COUNT, ROWS, SIZE
from gradless.methods.registry import DEFAULT, RECIPES, MethodOptions, check_options

AUTO = "auto"
"""The value of --method that chooses a method for model and data."""
GROUPS = whole(1, 1 << 20)
"""Range of the number of weights of a row that share a range of levels."""
SEED = whole(0, 2**63 - 1)
GRID_CHOICES = ("int", "uint", "fp8", "fp8-e5m2", "nf4")


@dataclass
class RunOptions(MethodOptions):
    """All options of `gradless tune`."""

    method: str = option(
        AUTO,
        "; ".join(f"{each.name}: {each.summary}" for each in RECIPES.values())
        + "; auto: the first that suits model and data: nzo if all rows choose among the same few one-token words and no "
        "option asks for another, qzo for other quantized weights, mezo for plain ones.",
        choices=RECIPES,
    )
    eval: str | None = option(None, "Rows to measure on, as DATA.", metavar="DATA")
    task: str | None = option(None, "A built-in task; without it, or --template, the data's columns decide.", metavar="NAME")
    template: str | None = option(None, "A prompt with {columns}, such as '{text} It was'.", metavar="TEXT")
    labels: str | None = option(None, "Labels and their words, such as 0=terrible,1=great.", metavar="A=B,..")
    split: str = option("train", "Split of a data set that is given by name.")
    eval_split: str = option("validation", "Split of --eval if that is the name of a data set.")
    train_rows: int | None = option(None, "Train on this many rows, chosen by the seed.", within=COUNT)
    eval_rows: int | None = option(None, "Measure on the first rows only.", within=COUNT)
    max_length: int | None = option(
        None, "Keep only the last tokens of longer prompts, and of longer conversations.", within=whole(3, 10**9)
    )
    train_on: str = option("all", "The assistant's messages of a conversation that are learned.", choices=("all", "last"))
    steps: int | None = option(None, "Steps to run (1000 unless --max-minutes is given).", within=COUNT)
    max_minutes: float | None = option(
        None, "Stop after this many minutes; the schedule follows the clock.", within=above_zero(10**7)
    )
    batch_size: int = option(16, "Examples in a forward.", within=ROWS)
    accumulate: int = option(1, "Forwards (micro-batches) under one direction.", within=ROWS)
    bits: int | None = option(None, "Quantize a dense folder to this many bits first (2 to 8).", within=BITS)
    grid: str = option(
        "int", "Levels to quantize to: int (symmetric), uint (with an offset), fp8, fp8-e5m2, nf4.", choices=GRID_CHOICES
    )
    group_size: str = option("64", "Weights of a row that share a range, or channel for one range a row.", metavar="N|channel")
    search: bool = option(False, "Choose ranges by squared error.")
    lora: int | None = option(
        None, "quzo, zoqo: tune LoRA adapters of this rank, on a grid, instead of the weights.", within=ROWS
    )
    lora_alpha: float = option(64.0, "An adapter's update is alpha / rank times B A.", needs="lora", within=SIZE)
    lora_bits: int = option(8, "Bits of the adapters' grid (2 to 8).", needs="lora", within=BITS)
    activations: str = option(
        "bf16",
        "Inputs of linear layers: bf16, for unpacked weights; int8, quantized token by token, for integer codes; fp8, for fp8 "
        "weights.",
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
        """The options with a method in place of `auto`.

        Args:
            quantized: whether the model has quantized weights.
            one_word: whether all rows choose among the same few one-token words.
        """
        if self.method != AUTO:
            return self
        suitable = [each for each in RECIPES.values() if each.suits(self, quantized=quantized, one_word=one_word)]
        for each in suitable[:-1]:
            with suppress(GradlessError):  # an option that it does not read
                return replace(self, method=each.name)
        return replace(self, method=suitable[-1].name)

    def _check_auto(self) -> None:
        """Refuse options that no method which `auto` may choose would read."""
        try:
            check_options(self, DEFAULT)
        except GradlessError:
            for each in RECIPES.values():
                if any(each.suits(self, quantized=q, one_word=w) for q, w in product((True, False), repeat=2)):
                    with suppress(GradlessError):
                        return check_options(self, each.name)
            raise

    @property
    def quantizes(self) -> bool:
        """Whether a dense folder is quantized first."""
        return self.bits is not None or self.grid != "int"

    def __post_init__(self) -> None:
        """Refuse values that cannot work, from flags, YAML and Python alike."""
        check_values(self, fields(self))
        if self.method == AUTO:
            self._check_auto()
        else:
            check_options(self, self.method)
        if not (self.group_size == "channel" or (self.group_size.isdecimal() and int(self.group_size[:9]) in GROUPS)):
            raise GradlessError(
                f"group_size is {self.group_size!r}; it is a number of weights, at most {GROUPS.most:,}, or channel."
            )
        if self.lora is not None and not (self.method in RECIPES and RECIPES[self.method].tunes_codes):
            of_codes = " and ".join(each.name for each in RECIPES.values() if each.tunes_codes)
            raise GradlessError(
                f"lora is for adapters on a grid, which {of_codes} tune; give one of these as --method, or leave --lora out."
            )
        if self.quantizes and self.activations == "int8" and not grid_name(self).startswith(("int", "uint")):
            raise GradlessError(f"{self.grid}'s codes are not integers; int8 activations need --grid int or uint.")
        if self.quantizes and self.activations == "fp8" and (not self.grid.startswith("fp8") or self.group_size != "channel"):
            raise GradlessError("fp8 activations need weights of --grid fp8 or fp8-e5m2 with --group-size channel.")


MAY_CHANGE = {"output", "resume", "overwrite", "allow_changes", "eval", "eval_rows", "eval_every", "eval_split"}
MAY_CHANGE |= {"max_minutes", "threads"}
"""Options that may change when a run is resumed."""


def grid_name(options: RunOptions) -> str:
    """The name in `grids.GRIDS` that --grid and --bits give together.

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
