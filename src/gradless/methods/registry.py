"""All methods by name. A new method needs its folder and a line here."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import TYPE_CHECKING, Any

from gradless.errors import GradlessError
from gradless.methods.ezo.recipe import EZORecipe
from gradless.methods.mezo.recipe import MeZORecipe
from gradless.methods.nzo.recipe import NZORecipe
from gradless.methods.quzo.recipe import QuZORecipe
from gradless.methods.qzo.recipe import QZORecipe
from gradless.methods.recipe import Recipe, SearchOptions, Setup, build
from gradless.methods.zoqo.recipe import ZOQORecipe
from gradless.targets import Kind

if TYPE_CHECKING:
    from gradless.formats.model import TunableModel
    from gradless.methods.base import ZerothOrderOptimizer

RECIPES: dict[str, Recipe[Any]] = {
    each.name: each
    for each in (
        NZORecipe(),
        EZORecipe(),
        QZORecipe(),
        QuZORecipe(),
        ZOQORecipe(),
        MeZORecipe(),
    )
}
"""The methods. --method auto takes the first that suits model and data."""

DEFAULT = QZORecipe.name
"""The method of a `ZOConfig` that names none."""


if TYPE_CHECKING:
    MethodOptions = SearchOptions
else:
    _OPTIONS = {each.name: each for of in (SearchOptions, *(each.options for each in RECIPES.values())) for each in fields(of)}
    MethodOptions = make_dataclass("MethodOptions", [(name, each.type, each) for name, each in _OPTIONS.items()])
    MethodOptions.__doc__ = "The options of all methods: how a run searches."


def recipe(name: str) -> Recipe[Any]:
    """The recipe of a method.

    Raises:
        GradlessError: there is no such method.
    """
    if name not in RECIPES:
        raise GradlessError(f"method is {name!r}; it can be {', '.join(RECIPES)}.")
    return RECIPES[name]


def readers(option: str) -> list[str]:
    """The methods that read an option."""
    return [each.name for each in RECIPES.values() if option in {field.name for field in fields(each.options)}]


def check_options(options: MethodOptions, method: str) -> None:
    """Refuse options that the method does not read, or that contradict each other.

    Raises:
        GradlessError: see above.
    """
    chosen = recipe(method)
    for field in fields(MethodOptions):
        names = readers(field.name)
        if getattr(options, field.name) != field.default and method not in names:
            raise GradlessError(f"{field.name} is for {' and '.join(names)}; {method} does not read it.")
    chosen.check(options)


def setup_of(method: ZerothOrderOptimizer, model: TunableModel) -> Setup:
    """How a method that somebody built searches a model, as a journal keeps it.

    Raises:
        GradlessError: its class is not in the registry, or a group's spaces are not of one kind: no replay could build it.
    """
    names = [each.name for each in RECIPES.values() if each.method() is type(method)]
    if not names:
        raise GradlessError(f"{type(method).__name__} has no recipe in gradless.methods.registry, which a replay would need.")
    arguments = method.arguments
    if not isinstance(arguments.get("distribution", ""), str):
        raise GradlessError(f"a journal keeps directions by name, and {arguments['distribution']} has none; give a named one.")
    groups = []
    for group, spaces in zip(method.param_groups, method.spaces_of, strict=True):
        of_spaces = spaces[0].options
        if any(space.options != of_spaces for space in spaces):
            raise GradlessError("the spaces of one parameter group must be of one kind and have the same options.")
        if of_spaces["kind"] == Kind.PARAMETERS and model.quantized:
            of_spaces = {"kind": Kind.FLOATS}
        tensors = [space.name.removesuffix(".lora_A.weight") for space in spaces if not space.name.endswith(".lora_B.weight")]
        options = {name: value for name, value in group.items() if name not in ("params", "initial_lr")}
        groups.append({**options, **of_spaces, "names": tensors})
    return Setup({"name": names[0], **arguments}, groups)


def build_method(model: TunableModel, setup: Setup) -> ZerothOrderOptimizer:
    """The method that a run set up, or that a journal names, over the spaces of a model; see `recipe.build`."""
    return build(model, setup, recipe(setup.method["name"]).method())
