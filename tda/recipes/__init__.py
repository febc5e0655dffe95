"""Every published method the engine knows, one declaration a file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType

from tda.errors import RecipeError
from tda.recipe import Recipe
from tda.recipes import (
    arnoldi,
    d_trak,
    datainf,
    grad_cos,
    grad_dot,
    influence,
    influence_cg,
    influence_ekfac,
    influence_gn,
    influence_shrunk,
    less,
    relatif,
    relatif_l,
    source,
    tracin,
    trackstar,
    trak,
)

_ALL = (
    grad_dot,
    grad_cos,
    tracin,
    less,
    trak,
    d_trak,
    trackstar,
    influence,
    influence_gn,
    influence_ekfac,
    influence_shrunk,
    influence_cg,
    relatif,
    relatif_l,
    datainf,
    arnoldi,
    source,
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({m.RECIPE.name: m.RECIPE for m in _ALL})


def get_recipe(recipe: str | Recipe, *others: str) -> Recipe:
    """The recipe of that name, or the recipe itself; RecipeError with the nearest name if none.

    others: names that the caller knows besides.
    """
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, str) and recipe in RECIPES:
        return RECIPES[recipe]
    names = [*others, *RECIPES]
    near = get_close_matches(str(recipe).lower().replace("-", "_"), names, n=1)
    raise RecipeError(
        "no such recipe",
        found=repr(recipe),
        wanted="a Recipe, or one of " + ", ".join(names),
        do=f"did you mean {near[0]!r}?" if near else None,
    )
