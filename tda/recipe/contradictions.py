"""What a recipe may not say: numbers out of range, and fields that cannot both be meant."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda.recipe import Recipe


def wrong_numbers(recipe: Recipe) -> list[tuple[bool, str, str]]:
    """(is wrong, what – the field's name first –, what is wanted) of every number of a recipe."""
    weights = recipe.layer_weights
    pairs = isinstance(weights, tuple) and all(
        isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in weights
    )
    return [
        (
            recipe.damping != "auto" and not _at_least_zero(recipe.damping),
            "damping is not a number ≥ 0",
            "'auto', or a multiple of the mean eigenvalue of the curvature such as 0.1",
        ),
        (
            not _at_least_zero(recipe.query_share) or recipe.query_share > 1,
            "query_share is not a share",
            "a number from 0 (training set only) to 1 (queries only)",
        ),
        (
            not _at_least_zero(recipe.shrinkage) or recipe.shrinkage > 1,
            "shrinkage is not a share",
            "a number from 0 (H as it is) to 1 (its diagonal)",
        ),
        (
            recipe.rank is not None and not _count(recipe.rank),
            "rank is not a count",
            "None for all eigenvalues, or a whole number ≥ 1",
        ),
        (
            recipe.core is not None and not _count(recipe.core),
            "core is not a count",
            "None for all coordinates, or a whole number ≥ 1",
        ),
        (not _count(recipe.segments), "segments is not a count", "a whole number ≥ 1"),
        (
            not pairs
            or not all(_at_least_zero(weight) for _, weight in weights)
            or len({name for name, _ in weights}) < len(weights),
            "layer_weights are not one number ≥ 0 a layer",
            "a tuple of pairs (name of a layer, weight), each layer once",
        ),
    ]


def _at_least_zero(number: Any) -> bool:
    real = isinstance(number, int | float) and not isinstance(number, bool)
    return real and math.isfinite(number) and number >= 0


def _count(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1


def contradictions(recipe: Recipe) -> list[tuple[bool, str, str]]:
    """(is broken, what, what to do) of every pair of fields that cannot both be meant."""
    return [
        *_of_the_curvature(recipe),
        *_of_the_function(recipe),
        *_of_the_norms(recipe),
        *_of_the_sums(recipe),
        *_of_the_run(recipe),
    ]


def _of_the_curvature(recipe: Recipe) -> list[tuple[bool, str, str]]:
    none = recipe.curvature == "identity"
    gauss_newton = recipe.curvature_rows == "gauss_newton"
    return [
        (
            none and recipe.function != "identity",
            f"function={recipe.function!r} needs a curvature, but curvature='identity'",
            "set curvature='gram' or 'diagonal', or function='identity'",
        ),
        (
            not none and recipe.function == "identity",
            f"curvature={recipe.curvature!r} has no effect under function='identity'",
            "set function='inverse', or curvature='identity'",
        ),
        (
            none and recipe.damping != "auto",
            "damping has no effect without a curvature",
            "leave damping='auto', or set curvature='gram' and function='inverse'",
        ),
        (
            none and recipe.blocks != "whole",
            "blocks='layer' has no effect without a curvature",
            "leave blocks='whole', or set curvature='gram' and function='inverse'",
        ),
        (
            none and recipe.query_share != 0,
            "query_share has no effect without a curvature",
            "leave query_share=0, or set curvature='gram' and function='inverse'",
        ),
        (
            recipe.shrinkage != 0 and recipe.curvature != "gram",
            f"shrinkage has no effect on curvature={recipe.curvature!r}",
            "set curvature='gram', or shrinkage=0",
        ),
        (
            recipe.core is not None
            and (recipe.curvature, recipe.blocks, recipe.shrinkage > 0) != ("gram", "whole", True),
            "core is what is left of a shrunk curvature that is whole",
            "set curvature='gram', blocks='whole' and a shrinkage, or core=None",
        ),
        (
            gauss_newton and recipe.query_share != 0,
            "query_share mixes in the curvature of the queries, which have no rows for other "
            "labels than their own",
            "set curvature_rows='link' or 'loss', or query_share=0",
        ),
    ]


def _of_the_function(recipe: Recipe) -> list[tuple[bool, str, str]]:
    unrolled = recipe.function == "unrolled"
    inverses = recipe.function == "mean_of_inverses"
    return [
        (
            recipe.rank is not None and recipe.function != "inverse",
            f"rank has no meaning under function={recipe.function!r}",
            "set function='inverse', or rank=None",
        ),
        (
            recipe.segments != 1 and not unrolled,
            f"segments have no meaning under function={recipe.function!r}",
            "set function='unrolled', or segments=1",
        ),
        (
            inverses and recipe.curvature == "diagonal",
            "mean_of_inverses is of whole terms h_i ∇f_i∇f_iᵀ, not of their diagonals",
            "set curvature='gram', or function='inverse'",
        ),
        (
            inverses and recipe.curvature_rows == "gauss_newton",
            "mean_of_inverses needs one row an example, but gauss_newton has one a label",
            "set curvature_rows='link' or 'loss', or function='inverse'",
        ),
        (
            inverses and recipe.shrinkage != 0,
            "mean_of_inverses is of single terms h_i ∇f_i∇f_iᵀ, which nothing shrinks",
            "set shrinkage=0, or function='inverse'",
        ),
        (
            inverses and recipe.damping == 0,
            "damping=0 asks mean_of_inverses for inverses of matrices of rank one",
            "use damping='auto' or a positive multiple of the mean eigenvalue such as 0.1",
        ),
        (
            unrolled and recipe.query_share != 0,
            "training is unrolled with the curvature it had, in which no query took part",
            "set query_share=0, or function='inverse'",
        ),
        (
            unrolled and recipe.normalize != "none",
            "function='unrolled' takes queries and training examples at different checkpoints, "
            "so it has no norm",
            "set normalize='none', or function='inverse'",
        ),
        (
            unrolled and recipe.combine == "product_of_means",
            "product_of_means is a mean over checkpoints, function='unrolled' a sum over segments",
            "set combine='mean_of_products', or function='inverse'",
        ),
        (
            unrolled and recipe.checkpoint_weight != "mean",
            "function='unrolled' has the learning rates within; weighted by them again "
            "it would count each twice",
            "set checkpoint_weight='mean', or function='identity'",
        ),
    ]


def _of_the_norms(recipe: Recipe) -> list[tuple[bool, str, str]]:
    mixed = recipe.curvature == "gram" and recipe.blocks == "whole"
    return [
        (
            recipe.norm == "step" and recipe.normalize == "none",
            "norm='step' has no effect under normalize='none'",
            "set normalize='train', or norm='metric'",
        ),
        (
            recipe.norm == "step" and recipe.curvature == "identity",
            "norm='step' has no effect without a curvature: both norms are ‖g‖",
            "set curvature='gram' and function='inverse', or norm='metric'",
        ),
        (
            recipe.weighs_layers and recipe.normalize != "none" and mixed,
            "layers of unlike weight leave no norm where the curvature mixes them: "
            "gᵀ(α∘Fg) may be < 0",
            "set blocks='layer', or normalize='none'; or layer_weights=() and parameters='all'",
        ),
    ]


def _of_the_sums(recipe: Recipe) -> list[tuple[bool, str, str]]:
    product = recipe.combine == "product_of_means"
    return [
        (
            product and recipe.checkpoint_weight != "mean",
            "product_of_means multiplies two means over checkpoints; weighted by learning rates "
            "it would count each learning rate twice",
            "set checkpoint_weight='mean', or combine='mean_of_products'",
        ),
        (
            product and recipe.normalize in ("train", "both"),
            "product_of_means keeps the weights of a training example apart from its gradient, "
            "so its F-norm at a checkpoint is not defined",
            "set normalize='none' or 'query', or combine='mean_of_products'",
        ),
    ]


def _of_the_run(recipe: Recipe) -> list[tuple[bool, str, str]]:
    updates = recipe.metric == "adam_update"
    return [
        (
            updates and recipe.train != "loss",
            "metric='adam_update' has the updates that the gradients of the loss cause",
            "set train='loss', or another metric",
        ),
        (
            updates and recipe.curvature != "identity",
            "metric='adam_update' has updates for training rows, which make no curvature",
            "set curvature='identity' and function='identity', or another metric",
        ),
    ]
