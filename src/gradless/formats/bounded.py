"""Bounds on a load: a configuration may ask transformers for no more than the weights hold.

A configuration of some hundred bytes can ask for millions of layers or terabytes of weights. Parameters and buffers are
counted while transformers registers them, on the meta device, whatever the configuration calls their sizes. Only numbers that
drive loops before any module exists (in the configuration's classes) are bounded by name. Every error of transformers, its
tokenizers and its validators becomes one sentence here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import ParamSpec, TypeVar

from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from gradless.errors import GradlessError
from gradless.readers.json import read_object, shown_value
from gradless.readers.sentences import said

COUNTS = {"layer": 1000, "depth": 1000, "label": 1 << 16, "head": 1 << 16, "expert": 1 << 16}
"""Part of a name in config.json -> the largest number that such a name may have."""
MOST_PARAMETERS, MOST_VALUES = 1 << 17, 1 << 44
"""Largest number of tensors of a model, and of values in them if nothing else bounds these."""
SPARE_VALUES, SPARE_IN_BUFFERS = 1 << 22, 1 << 26
"""Values that a model may have in addition to those that the file's size allows: in parameters, and in buffers."""
FAULT = "transformers cannot build the model in {}"

P = ParamSpec("P")
R = TypeVar("R")


def bounded(values_a_byte: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Bound the model that a load builds: twice `values_a_byte` values for each byte of its weights, because tied weights
    and loaded ones count twice. The load's only or last positional argument must be a path."""

    def decorated(load: Callable[P, R]) -> Callable[P, R]:
        @wraps(load)
        def loading(*args: P.args, **kwargs: P.kwargs) -> R:
            path = Path(str(kwargs.get("path", args[-1] if args else "")))
            files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
            if (path / "config.json").is_file():
                check_config(path / "config.json")
            with building(path, values=2 * values_a_byte * sum(file.stat().st_size for file in files if file.is_file())):
                return load(*args, **kwargs)

        return loading

    return decorated


def check_config(path: Path) -> None:
    """Refuse a config.json with a number that is larger than any model's.

    Raises:
        GradlessError: it has one, or it cannot be read.
    """
    level: list[tuple[str, object]] = [("", read_object(path, infinities=True))]
    while level:
        name, value = level.pop()
        if isinstance(value, dict):
            level += value.items()
        elif isinstance(value, list):
            level += [(name, each) for each in value]
        elif isinstance(value, int | float):
            for part, most in COUNTS.items():
                if (
                    part in name and "theta" not in name and not value <= most
                ):  # rope_theta is a base of frequencies, not a count
                    raise GradlessError(f"{path}: {name} is {shown_value(value)}; at most {most} are loaded.")


@contextmanager
def building(path: Path, *, values: int = MOST_VALUES, fault: str = FAULT) -> Iterator[None]:
    """Bound the model that transformers builds inside, on the meta device, and turn every error into a sentence.

    Args:
        path: of the model, for messages.
        values: that all parameters may have together; all buffers may have as many, and some more.
        fault: beginning of the sentence for an error of transformers, with {} for the path.

    Raises:
        GradlessError: the model is larger, or transformers raises an error.
    """
    tensors, held, buffered = 0, 0, 0

    def parameter(_module: nn.Module, name: str, made: Tensor | None) -> None:
        nonlocal tensors, held
        if made is not None and made.is_meta:
            tensors, held = tensors + 1, held + made.numel()
            check(tensors > MOST_PARAMETERS, f"more than {MOST_PARAMETERS} tensors")
            check(held > values + SPARE_VALUES, f"{held:,} values up to {name}")

    def buffer(_module: nn.Module, name: str, made: Tensor | None) -> None:
        nonlocal buffered
        if made is not None:
            buffered += made.numel()
            check(buffered > values + SPARE_IN_BUFFERS, f"{buffered:,} values in buffers up to {name}")

    def check(beyond: bool, asked: str) -> None:
        if beyond:
            raise GradlessError(
                f"the configuration of {path} asks for {asked}, far more than there can be; it is damaged, or another model's."
            )

    hooks = [register_module_parameter_registration_hook(parameter), register_module_buffer_registration_hook(buffer)]
    try:
        yield
    except GradlessError:
        raise
    except Exception as error:
        raise GradlessError(unbuildable(path, error, fault)) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # raised by Rust code of tokenizers and safetensors
            raise
        raise GradlessError(unbuildable(path, error, fault)) from error
    finally:
        for hook in hooks:
            hook.remove()


def unbuildable(path: str | Path, error: BaseException, fault: str = FAULT) -> str:
    """A sentence that says why transformers cannot build a model; it begins with `fault`."""
    if "trust_remote_code" in str(error):
        return f"{path} brings Python of its own, which is not run unless you trust it (--trust-remote-code)."
    return f"{fault.format(path)}: {said(error)}"
