"""What repeats a score: trainings, checkpoints, and parts of a random projection."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from tda.recipe import Recipe

PARTS = 16  # of a projection's dimensions; fewer tell little of its error, more cost more
_RANDOM = ("count_sketch", "rademacher")  # their dimensions are exchangeable


def num_parts(manifest: Any, recipe: Recipe) -> int:
    """Into how many parts the projection is cut: 1 where its parts do not add up to the score."""
    projection = manifest["projection"]
    separable = recipe.curvature == "identity" and recipe.normalize == "none"
    enough = projection["dim"] >= 2 * PARTS
    return PARTS if separable and enough and projection["kind"] in _RANDOM else 1


def trainings(checkpoints: list[dict[str, Any]], recipe: Recipe) -> tuple[list[list[int]], bool]:
    """(checkpoints of every replicate, whether replicates are separate trainings).

    A step that does not grow begins another training; but copies of a checkpoint, with noise on its
    weights, are of the same.
    """
    steps = [checkpoint.get("step") for checkpoint in checkpoints]
    groups = [[0]]
    for index, (before, after) in enumerate(pairwise(steps), start=1):
        if before is not None and after is not None and after <= before:
            groups.append([index])
        else:
            groups[-1].append(index)
    groups = _without_copies(checkpoints, groups)
    if len(groups) > 1:
        return groups, True
    if recipe.checkpoint_weight != "mean" or recipe.function == "unrolled":
        return groups, False
    return [[index] for index in groups[0]], False


def _without_copies(checkpoints: list[dict[str, Any]], groups: list[list[int]]) -> list[list[int]]:
    """The groups, with those that begin with copies of one checkpoint put together."""
    merged: dict[Any, list[int]] = {}
    for position, group in enumerate(groups):
        merged.setdefault(checkpoints[group[0]].get("noise_of", position), []).extend(group)
    return list(merged.values())
