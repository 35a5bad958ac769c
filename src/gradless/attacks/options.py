"""The options of an attack: one dataclass is the command line's flags. Importing this is cheap."""

from __future__ import annotations

from dataclasses import dataclass

from gradless.errors import GradlessError
from gradless.flags import above_zero, check_ranges, option, whole


def fraction(text: str) -> float:
    """A number, or a quotient of two, such as 8/255."""
    above, _, below = text.partition("/")
    if below and not float(below):
        raise ValueError(text)
    return float(above) / float(below or 1)


@dataclass
class AttackOptions:
    """Everything that `gradless attack` takes beside the model and the images."""

    eps: float | None = option(
        None, "Radius of the ball around an image, such as 8/255.", parse=fraction, metavar="X|A/B", within=above_zero(10**6)
    )
    method: str = option(
        "zoqo",
        "zoqo: on a grid; signhunter, zo_signsgd: on none, unless --bits is given to the latter.",
        choices=("zoqo", "signhunter", "zo_signsgd"),
    )
    bits: int | None = option(
        None, "Bits of the perturbation's grid over [-eps, eps] (zoqo: 8 unless given).", within=whole(2, 8)
    )
    directions: str = option(
        "chunks", "zoqo: SignHunter's chunks of pixels, or random directions.", choices=("chunks", "random")
    )
    labels_only: bool = option(
        False, "zoqo: use nothing but the class that the model names; begins far outside the ball and shrinks."
    )
    norm: str = option("linf", "Of the ball.", choices=("linf", "l2"))
    pixel_bits: int | None = option(
        None, "Show the model pixels of so many bits only, as image files have them (8).", within=whole(2, 8)
    )
    targeted: bool = option(False, "The labels are classes to be reached.")
    max_queries: int = option(10_000, "An image's budget.", within=whole(1, 10**9))
    max_total_queries: int | None = option(None, "The budget of all images together.", within=whole(1, 10**12))
    batch_size: int = option(
        256, "Images that are attacked side by side, and that a call of the model holds at most.", within=whole(1, 1 << 16)
    )
    repeat: int = option(
        1, "Ask every input so often, each a query, and take the mean: for a model that adds noise.", within=whole(1, 10**6)
    )
    seed: int = option(0, "Of random directions.", within=whole(0, 2**63 - 1))
    rate: float | None = option(
        None, "For a model behind HTTP: at most so many images a second.", metavar="X", within=above_zero(10**9)
    )
    timeout: float = option(
        30.0, "For a model behind HTTP: seconds that a call may take.", metavar="X", within=above_zero(86_400)
    )
    output: str | None = option(None, "Folder for result.npz, report.html and queries.db.", metavar="DIR")
    resume: bool = option(False, "Go on with the attack in --output; nothing is asked twice.")
    overwrite: bool = option(False, "Replace the attack in --output.")

    def check(self) -> None:
        """Refuse values that contradict each other.

        Raises:
            GradlessError: they do.
        """
        check_ranges(self)
        if self.eps is None:
            raise GradlessError("give --eps, the radius of the ball around an image, such as 8/255.")
        if self.output is None:
            raise GradlessError("give --output, a folder for what comes of the attack.")
        if self.directions != "chunks" and self.method != "zoqo":
            raise GradlessError(f"directions are zoqo's choice; {self.method} has its own.")
        if self.labels_only and (self.method != "zoqo" or self.directions != "chunks"):
            raise GradlessError("labels_only is for zoqo with chunks.")
        if self.bits is not None and self.method == "signhunter":
            raise GradlessError("signhunter has no grid; --method zoqo is SignHunter on one.")
