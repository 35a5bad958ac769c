"""All methods by name. A new method needs its folder and a line here."""

from __future__ import annotations

from dataclasses import fields, make_dataclass
from typing import TYPE_CHECKING, Any

from gradless.errors import GradlessError
from gradless.flags import check_choices, check_ranges
from gradless.methods.ezo.recipe import EZORecipe
from gradless.methods.mezo.recipe import MeZORecipe
from gradless.methods.nzo.recipe import NZORecipe
from gradless.methods.quzo.recipe import QuZORecipe
from gradless.methods.qzo.recipe import QZORecipe
from gradless.methods.recipe import Recipe, SearchOptions, Setup, build
from gradless.methods.zoqo.recipe import ZOQORecipe

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
    MethodOptions = make_dataclass("MethodOptions", [], bases=tuple(dict.fromkeys(each.options for each in RECIPES.values())))
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
    """Refuse values that cannot work, and options that the method does not read.

    Raises:
        GradlessError: see above.
    """
    chosen = recipe(method)
    check_ranges(options)
    for field in fields(MethodOptions):
        check_choices(options, field)
        names = readers(field.name)
        if getattr(options, field.name) != field.default and method not in names:
            raise GradlessError(f"{field.name} is for {' and '.join(names)}; {method} does not read it.")
    chosen.check(options)


def build_method(model: TunableModel, setup: Setup) -> ZerothOrderOptimizer:
    """The method that a run set up, or that a journal names, over the spaces of a model; see `recipe.build`."""
    return build(model, setup, recipe(setup.method["name"]).method())
