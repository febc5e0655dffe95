"""What repeats a score: trainings, checkpoints, and parts of a random projection."""

from __future__ import annotations

from typing import Any

from tda.recipe import Recipe
from tda.training.schedule import by_training

PARTS = 16  # of a projection's dimensions; fewer tell little of its error, more cost more
_RANDOM = ("count_sketch", "rademacher")  # their dimensions are exchangeable


def num_parts(manifest: Any, recipe: Recipe) -> int:
    """Into how many parts the projection is cut: 1 where its parts do not add up to the score."""
    projection = manifest["projection"]
    separable = recipe.curvature == "identity" and recipe.normalize == "none"
    enough = projection["dim"] >= 2 * PARTS
    return PARTS if separable and enough and projection["kind"] in _RANDOM else 1


def trainings(checkpoints: list[dict[str, Any]], recipe: Recipe) -> tuple[list[list[int]], bool]:
    """(checkpoints of every replicate, whether replicates are separate trainings)."""
    groups = by_training(checkpoints)
    if len(groups) > 1:
        return groups, True
    if recipe.checkpoint_weight != "mean" or recipe.function == "unrolled":
        return groups, False
    return [[index] for index in groups[0]], False
