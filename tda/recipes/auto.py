"""``recipe="auto"``: the recipe that foretold retraining best of those a run can answer.

In `jobs/LEADERBOARD.md`: Gauss–Newton over the curvature of the label alone; shrunk towards its
diagonal where the rows are in the eigenbasis of K-FAC; queries by their margin, which weighs
checkpoints better than their loss; λ by the training schedule.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from tda.measurements import has_link
from tda.recipe import CurvatureRows, Recipe
from tda.recipes import get_recipe, influence, influence_gn, influence_shrunk
from tda.store.manifest import CURVATURE, has_table

if TYPE_CHECKING:
    from tda.store import Store

AUTO = "auto"


def recipe_for(store: Store, recipe: str | Recipe) -> Recipe:
    """The recipe of that name, or the recipe itself; "auto": the one `choose` finds."""
    return choose(store) if recipe == AUTO else get_recipe(recipe, AUTO)


def choose(store: Store) -> Recipe:
    """The recipe for a run, whose ``summary`` says why in one line."""
    eigen = store.manifest["projection"]["kind"] == "eigenbasis"
    rows: CurvatureRows = "gauss_newton" if has_table(store.path, CURVATURE) else "link"
    why = "the curvature of every output"
    if rows == "link":
        known = has_link(store.manifest["measurement"])
        why = "the curvature of the label's output" if known else "the empirical Fisher, to rank by"
    if eigen:
        return replace(
            influence_shrunk.RECIPE,
            curvature_rows=rows,
            summary=f"Chosen for rows in the eigenbasis of K-FAC: {why}, shrunk to its diagonal.",
        )
    base = influence_gn.RECIPE if rows == "gauss_newton" else influence.RECIPE
    return replace(
        base,
        query="margin",
        summary=f"Chosen for {store.manifest['projection']['kind']} rows: {why}.",
    )
