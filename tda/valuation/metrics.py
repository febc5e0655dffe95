"""What values are for: the loss of the queries, their margin, or how often they are right.

    loss        −∇ℓ_q                     a lower loss
    margin      ∇f_q,  f = log(p/(1−p))   a larger margin
    accuracy    p(1−p) ∇f_q = ∇p_q        p of the right label: the share of right answers, were
                                          they drawn as the model predicts. The share of largest
                                          p that are right has no gradient; this is what moves it

All are multiples of the gradient ∇f that a run holds. Another measurement is another f, and takes
another index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from tda.errors import RecipeError
from tda.recipe import Recipe

Metric = Literal["loss", "margin", "accuracy"]


def for_metric(recipe: Recipe, metric: str | None, measurement: Mapping[str, Any]) -> Recipe:
    """The recipe with the queries' gradient that the metric asks for; None leaves its own.

    measurement: of the run's manifest. Raises RecipeError where the run cannot tell.
    """
    if metric is None:
        return recipe
    name = measurement["name"]
    known = ", ".join(get_args(Metric))
    if metric == name:
        metric = "loss"
    if metric not in get_args(Metric):
        raise RecipeError(
            f"this run cannot tell values for {metric!r}",
            found=f"gradients of {name}",
            wanted=known,
            do=f"for another measurement index into a new folder with measurement={metric!r}",
        )
    if metric == "loss":
        return replace(recipe, query="loss")
    if not measurement.get("has_margin"):
        raise RecipeError(
            f"{name} has no margin", found=f"metric {metric!r}", wanted="loss",
            do="index into a new folder with cross_entropy or binary_cross_entropy",
        )  # fmt: skip
    if metric == "accuracy" and recipe.normalize in ("query", "both"):
        raise RecipeError(
            "accuracy weighs queries, and this recipe makes them all as long",
            where=f"recipe {recipe.name!r}",
            do="choose a recipe that does not normalise queries, such as influence",
        )
    return replace(recipe, query="margin")


def query_weights(table: Any, recipe: Recipe, metric: str | None) -> np.ndarray | None:
    """Of the metric's gradient in the recipe's ``[checkpoint, query]`` float64; None for 1."""
    if metric != "accuracy":
        return None
    p = table.column("p").astype(np.float64)
    if not np.isfinite(p).all():
        raise RecipeError("these queries have no probability of being right", found="p undefined")
    if recipe.function == "unrolled":  # every query is taken at the last checkpoint
        p = np.broadcast_to(p[-1], p.shape)
    return p * (1 - p)
