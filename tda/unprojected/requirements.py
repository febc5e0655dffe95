"""What a recipe may not ask of gradients that are not projected, and what to do instead."""

from __future__ import annotations

from tda.errors import RecipeError
from tda.gradients import shapes_of
from tda.layout import is_sharded
from tda.recipe import Recipe
from tda.task import Task


def require_parameter_space(task: Task, recipe: Recipe) -> None:
    """Raises RecipeError for a recipe that has no meaning in the parameter space of a model."""
    gauss_newton = "gauss_newton" if recipe.curvature == "gram" else "link", "gauss_newton"
    names = shapes_of(task.model)
    for broken, what, do in (
        (
            recipe.function not in ("identity", "inverse"),
            f"function={recipe.function!r} needs rows that are stored",
            "index a run, and ask it",
        ),
        (
            recipe.query_share > 0,
            "query_share mixes two curvatures, whose Kronecker factors do not add up",
            "index a run, and ask it",
        ),
        (
            recipe.metric != "any" or task.metric != "euclidean",
            "gradients in parameter space are not scaled by a metric",
            "use metric='any' and a task with metric='euclidean', or index a run, and ask it",
        ),
        (
            recipe.curvature == "diagonal" and recipe.basis != "eigen",
            "the plain diagonal of a curvature depends on the coordinates of the parameters",
            "set basis='eigen': EK-FAC",
        ),
        (
            recipe.curvature != "identity" and recipe.curvature_rows not in gauss_newton,
            f"curvature_rows={recipe.curvature_rows!r}, but in parameter space the curvature is "
            "the Gauss–Newton matrix of the model",
            "set curvature_rows='gauss_newton'",
        ),
        (
            recipe.core is not None,
            "core is chosen among coordinates that are stored",
            "set core=None: conjugate gradients take them all",
        ),
        (
            recipe.curvature == "gram"
            and (
                recipe.blocks != "whole"
                or recipe.rank is not None
                or recipe.normalize in ("train", "both")
            ),
            "conjugate gradients give the whole inverse, of the queries",
            "set blocks='whole', rank=None, normalize='none' or 'query'; or use EK-FAC",
        ),
        (
            recipe.curvature == "gram" and is_sharded(task.model),
            "conjugate gradients take derivatives that a model sharded over processes has not",
            "ask for influence_ekfac; or index a run, and ask it for influence_gn",
        ),
        (
            any(name not in names for name, _ in recipe.layer_weights),
            "layer_weights name a parameter the model does not have",
            "use the names of model.named_parameters()",
        ),
    ):
        if broken:
            raise RecipeError(what, where=f"recipe {recipe.name!r}, tda.attribute", do=do)
