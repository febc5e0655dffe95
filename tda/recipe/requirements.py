"""What a recipe needs of a run: its rows, its layers, its schedule – or an error that says so."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np

from tda.errors import RecipeError, StoreError
from tda.measurements import is_scalar
from tda.training.schedule import learning_rate_sums

if TYPE_CHECKING:
    from tda.recipe import Recipe
    from tda.store import Store, Table

Manifest = Mapping[str, Any]
LAYERS_APART = (  # how to have rows that keep layers apart
    "index into a new folder with projection='kronecker' or 'eigenbasis', which in a "
    "configuration is [projection] kind"
)


def require_rows(manifest: Manifest, recipe: Recipe) -> None:
    """Raises RecipeError if the rows of a run are not what the recipe is made of."""
    where = f"recipe {recipe.name!r}"
    if recipe.space == "parameters":
        raise RecipeError(
            "this recipe works on gradients that are not projected, which no run stores",
            where=where,
            do=f"tda.attribute(task, train, queries, recipe={recipe.name!r}), which has the model",
        )
    kind = manifest.get("projection", {}).get("kind")
    if recipe.basis == "eigen" and kind != "eigenbasis":
        raise RecipeError(
            "this recipe needs rows in the eigenbasis of K-FAC",
            where=where,
            found=f"projection {kind!r}",
            do="index into a new folder with projection='eigenbasis', which in a configuration is "
            "[projection] kind",
        )
    metric = manifest.get("metric", "euclidean")
    if recipe.metric not in ("any", metric):
        raise RecipeError(
            f"this recipe needs gradients in the metric {recipe.metric!r}",
            where=where,
            found=f"metric {metric!r}",
            do=f"index into a new folder with tda.Task(…, metric={recipe.metric!r}) and "
            "checkpoints that have their optimizer's state",
        )
    if metric == "adam_update" and (recipe.curvature, recipe.train) != ("identity", "loss"):
        raise RecipeError(
            "the training rows of this run are updates by Adam, which have neither a curvature "
            "nor a margin",
            where=where,
            found=f"curvature={recipe.curvature!r}, train={recipe.train!r}",
            do="use 'less' or 'grad_dot', or a run of another metric",
        )


def curvature_table(store: Store, recipe: Recipe) -> Table:
    """The table of (example, label) rows; that of the training set where a model has one output.

    Raises RecipeError if the run has none.
    """
    if is_scalar(store.manifest["measurement"]):
        return store.table("train")
    try:
        table = store.table("curvature")
    except StoreError as error:
        raise RecipeError(
            "this recipe needs the run's curvature: gradients for labels drawn from the model",
            where=f"recipe {recipe.name!r}",
            found=error.what,
            do="add it with run.add_curvature(train), or with gauss_newton = true in [index] and "
            "`tda index`",
        ) from error
    table.require_complete()
    return table


def layer_slices(manifest: Manifest, recipe: Recipe) -> dict[str, slice]:
    """The columns of every layer, by name. Raises RecipeError if layers are mixed."""
    layers = manifest.get("layers")
    if not layers:
        raise RecipeError(
            "this recipe needs rows that keep layers apart",
            where=f"recipe {recipe.name!r}",
            found=f"projection {manifest.get('projection', {}).get('kind')!r}",
            do=f"{LAYERS_APART}; or use "
            "dataclasses.replace(recipe, blocks='whole', layer_weights=(), parameters='all')",
        )
    slices = {x["name"]: slice(x["offset"], x["offset"] + x["size"]) for x in layers}
    for name, _ in recipe.layer_weights:
        if name not in slices:
            near = get_close_matches(name, slices, n=1)
            raise RecipeError(
                f"layer_weights name a layer the run does not have: {name!r}",
                where=f"recipe {recipe.name!r}",
                wanted=", ".join(slices),
                do=f"did you mean {near[0]!r}?" if near else None,
            )
    return slices


def layer_alphas(manifest: Manifest, recipe: Recipe) -> dict[str, float]:
    """α of the parameters whose products are weighted, by name; of all others it is 1.

    A model without a matrix keeps its vectors.
    """
    given = dict(recipe.layer_weights)
    if recipe.parameters == "all":
        return given
    shapes = manifest.get("model", {}).get("parameters", {})
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    left_out = vectors if len(vectors) < len(shapes) else []
    return {**dict.fromkeys(left_out, 0.0), **given}


def checkpoint_weights(manifest: Manifest, recipe: Recipe) -> list[float]:
    """w_c: 1/C, or the learning rates. Raises RecipeError if one is not known."""
    checkpoints = manifest["checkpoints"]
    if recipe.checkpoint_weight == "mean":
        return [1 / len(checkpoints)] * len(checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.get("learning_rate") is None:
            raise RecipeError(
                "the learning rate of a checkpoint is not known",
                where=f"recipe {recipe.name!r}, checkpoint {checkpoint['name']!r}",
                wanted="checkpoint_weight='learning_rate' needs one for every checkpoint",
                do="index with checkpoints that carry a learning rate, or use "
                "dataclasses.replace(recipe, checkpoint_weight='mean')",
            )
    return [float(checkpoint["learning_rate"]) for checkpoint in checkpoints]


def segments(manifest: Manifest, recipe: Recipe) -> dict[tuple[int, ...], float]:
    """The segments of training, in order: their checkpoints → τ = Σ_t η_t/(1−β) of their steps.

    Segments are of equal count, up to one. Momentum that is unknown is taken for none.
    Raises RecipeError if learning rates are not known or checkpoints are not of one training.
    """
    checkpoints = manifest["checkpoints"]
    sums = learning_rate_sums(checkpoints)
    if sums is None:
        raise RecipeError(
            "how far training went between checkpoints is not known",
            where=f"recipe {recipe.name!r}",
            wanted="step and learning_rate, or learning_rate_sum, for every checkpoint",
            do="index with tda.Checkpoint(weights, step=…, learning_rate=…)",
        )
    for checkpoint, before, after in zip(checkpoints, [0.0, *sums], sums, strict=False):
        if after <= before:
            raise RecipeError(
                "training cannot be unrolled over checkpoints that do not follow each other",
                where=f"recipe {recipe.name!r}, checkpoint {checkpoint['name']!r}",
                found=f"Σ_t η_t = {after:g} after {before:g}",
                wanted="checkpoints of one training, in order",
                do="index the checkpoints of each training as a run of its own",
            )
    count = min(recipe.segments, len(checkpoints))
    found, before = {}, 0.0
    for indices in np.array_split(np.arange(len(checkpoints)), count):
        last, after = checkpoints[indices[-1]], sums[indices[-1]]
        momentum = 0.0 if last.get("optimizer") == "adam" else last.get("momentum") or 0.0
        found[tuple(indices.tolist())] = (after - before) / (1 - momentum)
        before = after
    return found
