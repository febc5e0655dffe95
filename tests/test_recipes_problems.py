"""Recipes that need layers or a schedule, on gradients of real models, against the oracle's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest

import tda
from tda.recipe import Recipe

NAMES = ("ridge", "logistic", "reused", "cnn", "in_place", "multi_label", "integers")


def recipes(case: Any) -> dict[str, tuple[Recipe, np.ndarray]]:
    """Recipe and formula, from the gradients `naive` takes by itself."""
    q, t, rates = case.queries, case.train, case.problem.learning_rates
    layers = [
        slice(x["offset"], x["offset"] + x["size"]) for x in case.run.store.manifest["layers"]
    ]
    steps = [weights.step for weights in case.problem.checkpoints]
    times = np.diff([0, *steps]) * rates
    diagonals = [np.diag(np.diag(naive.link_hessian(rows))) for rows in t]
    given = {
        "datainf": naive.datainf(q, t, layers),
        "trackstar": naive.trackstar(q, t, layers),
        "less": naive.less(q, [rows.dl for rows in t], rates),
        "influence_ekfac": naive.with_curvature(q, t, diagonals, 0.1),  # its automatic damping
        "source": naive.source(q, t, [[c] for c in range(len(t))], times),
    }
    free = {"basis": "any", "metric": "any", "parameters": "all"}
    return {name: (replace(tda.RECIPES[name], **free), wanted) for name, wanted in given.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_is_its_formula(name: str, indexed: Callable) -> None:
    case = indexed(name)
    for kind, (recipe, wanted) in recipes(case).items():
        found = case.run.scores(case.problem.queries, recipe).compute()
        assert naive.relative_error(found, wanted) < 2e-5, kind


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("name", ["ridge", "cnn", "multi_label"])
def test_the_largest_directions_are_those_of_the_oracle(
    name: str, rank: int, indexed: Callable
) -> None:
    """Rows are float32, and a direction is known to their rounding over the gap to the next."""
    case = indexed(name)
    wanted = naive.arnoldi(case.queries, case.train, rank)
    spectra = [np.linalg.eigvalsh(naive.link_hessian(rows))[::-1] for rows in case.train]
    gap = min((sigma[rank - 1] - sigma[rank]) / sigma[0] for sigma in spectra)
    recipe = replace(tda.RECIPES["arnoldi"], rank=rank)
    found = case.run.scores(case.problem.queries, recipe).compute()
    assert naive.relative_error(found, wanted) < 1e-6 + 1e-6 / gap
