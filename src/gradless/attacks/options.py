"""The options of an attack: one dataclass that is also the command line's flags. It imports quickly, without torch."""

from __future__ import annotations

from dataclasses import dataclass

from gradless.errors import GradlessError
from gradless.flags import above_zero, check_ranges, option, whole


def fraction(text: str) -> float:
    """A number, or a quotient such as 8/255."""
    above, _, below = text.partition("/")
    if below and not float(below):
        raise ValueError(text)
    return float(above) / float(below or 1)


@dataclass
class AttackOptions:
    """The options of `gradless attack`, except the model and the images."""

    eps: float | None = option(
        None, "Radius of the ball around an image, such as 8/255.", parse=fraction, metavar="X|A/B", within=above_zero(10**6)
    )
    method: str = option(
        "zoqo",
        "zoqo has a grid, signhunter has none, zo_signsgd has one if --bits is given.",
        choices=("zoqo", "signhunter", "zo_signsgd"),
    )
    bits: int | None = option(
        None, "Bits of the perturbation's grid over [-eps, eps]; zoqo's default is 8.", within=whole(2, 8)
    )
    directions: str = option(
        "chunks", "For zoqo: SignHunter's chunks of pixels, or random directions.", choices=("chunks", "random")
    )
    labels_only: bool = option(
        False, "For zoqo: use only the class that the model names. Begins far outside the ball and shrinks."
    )
    norm: str = option("linf", "Norm of the ball.", choices=("linf", "l2"))
    pixel_bits: int | None = option(
        None, "Round the images that the model sees to pixels of this many bits; image files have 8.", within=whole(2, 8)
    )
    targeted: bool = option(False, "The labels are the classes to be reached.")
    max_queries: int = option(10_000, "Budget of an image.", within=whole(1, 10**9))
    max_total_queries: int | None = option(None, "Budget of all images together.", within=whole(1, 10**12))
    batch_size: int = option(
        256, "Images that are attacked together; also the most images in a call of the model.", within=whole(1, 1 << 16)
    )
    repeat: int = option(
        1,
        "For a model that adds noise: ask every input this many times, a query each, and take the mean.",
        within=whole(1, 10**6),
    )
    seed: int = option(0, "Seed of random directions.", within=whole(0, 2**63 - 1))
    rate: float | None = option(None, "For a model behind HTTP: most images a second.", metavar="X", within=above_zero(10**9))
    timeout: float = option(30.0, "For a model behind HTTP: most seconds for a call.", metavar="X", within=above_zero(86_400))
    output: str | None = option(None, "Folder for result.npz, report.html and queries.db.", metavar="DIR")
    resume: bool = option(False, "Continue the attack in --output; nothing is asked twice.")
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
            raise GradlessError("give --output, a folder for the results of the attack.")
        if self.directions != "chunks" and self.method != "zoqo":
            raise GradlessError(f"directions are zoqo's choice; {self.method} has its own.")
        if self.labels_only and (self.method != "zoqo" or self.directions != "chunks"):
            raise GradlessError("labels_only is for zoqo with chunks.")
        if self.bits is not None and self.method == "signhunter":
            raise GradlessError("signhunter has no grid; --method zoqo is SignHunter on one.")
