"""Rotary positions of a GGUF file, as transformers states them.

The meaning is llama.cpp's. Each frequency of the base is divided by its factor, if a tensor holds one (Llama 3's `rope_freqs`,
Phi's `rope_factors_*`). Then it is scaled, by the same number for all (linear) or by a ramp between that number and 1 (yarn).
Cosines and sines are multiplied by one more number. So every scaling is a divisor for each frequency and that number, which is
what transformers' "longrope" states.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gradless.formats.gguf_config import Statement

FACTORS = "rope_freqs.weight"
PAIR = ("rope_factors_short.weight", "rope_factors_long.weight")
SCALINGS = ("none", "linear", "yarn", "longrope")
RAMP = {
    "yarn_beta_fast": (32.0,),
    "yarn_beta_slow": (1.0,),
    "yarn_log_multiplier": (0.0,),
    "yarn_ext_factor": (-1.0, 1.0),
    "yarn_attn_factor": (1.0,),
}
"""Key of yarn's ramp -> the values that change nothing."""
FIXED = ("yarn_ext_factor", "yarn_attn_factor")
"""Keys of `RAMP` that no architecture here reads."""


@dataclass(frozen=True)
class Rope:
    """The rotary positions that a file states.

    Attributes:
        base: of the frequencies.
        dimensions: number of rotating dimensions of a head.
        scale: factor of positions, 1 / `rope.scaling.factor`.
        original: the context length of training, before it was extended.
        ramp: (fast, slow) of yarn: a frequency with at least `fast` rotations over `original` is kept, one with at most `slow`
            is scaled. None for the other scalings.
        attention: factor of cosines and sines, without yarn's share of it.
        factors: divisors of the frequencies up to `original` positions, (dimensions / 2,).
        long_factors: divisors in longer sequences.
    """

    base: float
    dimensions: int
    scale: float
    original: int
    ramp: tuple[float, float] | None
    attention: float
    factors: Tensor | None = None
    long_factors: Tensor | None = None

    @classmethod
    def read(cls, stated: Statement, dimensions: int, context: int, *, ramps: bool, factors: str) -> Rope:
        """Take the keys of `rope.` and the tensors of factors.

        Args:
            stated: the file's metadata.
            dimensions: number of rotating dimensions of a head.
            context: the model's stated context length.
            ramps: whether the architecture reads the keys of yarn's ramp; llama.cpp ignores them in others.
            factors: "none", "pair" (two sets, whatever the scaling is called), or "either": one, or two in longrope.
        """
        scaling = stated.word("rope.scaling.type", "linear")
        if scaling not in SCALINGS:
            raise stated.refused(f"states rope.scaling.type = {scaling!r} (known are {', '.join(SCALINGS)})")
        old = stated.number("rope.scale_linear", 0.0)
        factor = stated.number("rope.scaling.factor", 0.0) or old or 1.0
        if factor < 0:
            raise stated.refused(f"states rope.scaling.factor = {factor}")
        for key, usual in RAMP.items():
            if not ramps or key in FIXED:
                stated.expect(f"rope.scaling.{key}", *usual)
        fast, slow = (
            stated.number(f"rope.scaling.{key}", RAMP[key][0], above=0) for key in ("yarn_beta_fast", "yarn_beta_slow")
        )
        power = stated.number("rope.scaling.yarn_log_multiplier", 0.0)
        if power < 0:
            raise stated.refused(f"states rope.scaling.yarn_log_multiplier = {power}")
        attention = stated.number("rope.scaling.attn_factor", 1.0)
        if scaling == "yarn":
            attention *= _magnitude(factor) / _magnitude(factor, power) if power else _magnitude(factor)
            attention /= 1 + 0.1 * math.log(factor)
        found = [name for name in (FACTORS, *PAIR) if name in stated.file.tensors]
        wanted = {"none": (), "pair": PAIR, "either": PAIR if scaling == "longrope" else (FACTORS,)}[factors]
        if found and found != list(wanted):
            raise stated.refused(f"has {' and '.join(found)}, where its architecture reads {' and '.join(wanted) or 'none'}")
        short, long = (stated.vector(name, dimensions // 2) for name in (found[0], found[-1])) if found else (None, None)
        return cls(
            base=stated.number("rope.freq_base", 10_000.0, above=1),
            dimensions=dimensions,
            scale=1.0 if scaling == "none" else 1 / factor,
            original=stated.size("rope.scaling.original_context_length", context),
            ramp=(fast, slow) if scaling == "yarn" else None,
            attention=attention,
            factors=short,
            long_factors=long,
        )

    def parameters(self, *, linear: bool = True) -> dict[str, object]:
        """transformers' `rope_parameters`; `linear` says whether the model knows the type of that name."""
        stated: dict[str, object] = {"rope_theta": self.base}
        scales, attention = self._scales(), self.attention
        if self.ramp is not None:
            attention *= 1 - 0.1 * math.log(self.scale)
        if self.factors is self.long_factors is None and self.ramp is None and attention == 1:
            if self.scale == 1:
                return stated | {"rope_type": "default"}
            if linear:
                return stated | {"rope_type": "linear", "factor": 1 / self.scale}
        short, long = (
            ((torch.ones(()) if factors is None else factors) / scales).tolist()
            for factors in (self.factors, self.long_factors)
        )
        return stated | {
            "rope_type": "longrope",
            "short_factor": short,
            "long_factor": long,
            "attention_factor": attention,
            "original_max_position_embeddings": self.original,
        }

    def of_windows(self, base: float, scale: float) -> Rope:
        """The positions of the layers with a sliding window."""
        return replace(self, base=base, scale=scale)

    @property
    def limit(self) -> int | None:
        """Largest length for which the first set of factors holds, or None if it holds for all."""
        same = self.factors is self.long_factors or (
            self.factors is not None and self.long_factors is not None and torch.equal(self.factors, self.long_factors)
        )
        return None if same else self.original

    def _scales(self) -> Tensor:
        """The factor of each frequency: fp64, (dimensions / 2,)."""
        scales = torch.full((self.dimensions // 2,), self.scale, dtype=torch.float64)
        if self.ramp is None:
            return scales
        first, last = (
            self.dimensions * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.base)) for turns in self.ramp
        )
        low, high = max(0, math.floor(first)), min(self.dimensions - 1, math.ceil(last))
        at = torch.arange(self.dimensions // 2, dtype=torch.float64)
        kept = 1 - ((at - low) / max(0.001, high - low)).clamp(0, 1)
        return scales * (1 - kept) + kept


def _magnitude(factor: float, power: float = 1.0) -> float:
    """yarn's growth of queries and keys with the growth of the context."""
    return 1.0 if factor <= 1 else 0.1 * power * math.log(factor) + 1
