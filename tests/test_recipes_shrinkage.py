"""Curvature between its whole and its diagonal, and the recipe that a run chooses for itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from memory_store import make_store
from sklearn.datasets import load_digits
from torch import nn

import tda
from tda.errors import RecipeError
from tda.recipes import RECIPES
from tda.recipes.auto import choose
from tda.scorer import prepare, scores

SHRUNK = replace(RECIPES["influence_shrunk"], curvature_rows="link", basis="any")


def matrix(store: Any, recipe: tda.Recipe) -> np.ndarray:
    return scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")


def test_no_shrinkage_is_the_whole_curvature_and_all_of_it_the_diagonal(tmp_path):
    store = make_store(tmp_path, num_checkpoints=2)
    for share, curvature in ((0.0, "gram"), (1.0, "diagonal")):
        found = matrix(store, replace(SHRUNK, shrinkage=share))
        plain = replace(SHRUNK, shrinkage=0.0, curvature=curvature)
        assert naive.relative_error(found, matrix(store, plain)) < 1e-5


def test_every_share_keeps_the_trace_and_so_the_damping(tmp_path):
    store = make_store(tmp_path)
    used = {
        prepare(store, replace(SHRUNK, shrinkage=share, damping=0.1), store.queries).damping[0]
        for share in (0.0, 0.3, 0.7)
    }
    assert max(used) - min(used) <= 1e-12 * max(used)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "auto"])
def test_a_shrinkage_that_is_no_share_is_refused(share):
    with pytest.raises(RecipeError, match="shrinkage"):
        replace(SHRUNK, shrinkage=share)


@pytest.mark.parametrize(
    "changes", [{"curvature": "diagonal"}, {"function": "mean_of_inverses"}], ids=str
)
def test_shrinkage_of_what_does_not_shrink_is_refused(changes):
    with pytest.raises(RecipeError, match="shrinkage"):
        replace(SHRUNK, **changes)


def digits_run(folder: Any, **index: Any) -> tuple[tda.Run, Any, Any]:
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images[:60] / 16, dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 6), nn.Tanh(), nn.Linear(6, 10))
    train, test = (images[:50], labels[:50]), (images[50:], labels[50:60])
    run = tda.index(tda.Task(model), train, folder, progress=False, dtype="float32", **index)
    return run, train, test


def test_a_run_chooses_by_its_rows_and_says_why(tmp_path):
    run, train, test = digits_run(tmp_path / "a", projection="eigenbasis", proj_dim=40)
    assert choose(run.store).curvature_rows == "link"
    run.add_curvature(train, progress=False)
    chosen = run.recipe("auto")
    assert (chosen.name, chosen.curvature_rows) == ("influence_shrunk", "gauss_newton")
    assert "eigenbasis" in chosen.summary
    found = run.scores(test, recipe="auto").compute()
    np.testing.assert_array_equal(found, run.scores(test, recipe="influence_shrunk").compute())


def test_without_an_eigenbasis_the_choice_is_the_whole_curvature(tmp_path):
    run, train, _ = digits_run(tmp_path / "a", proj_dim=30)
    assert (run.recipe("auto").name, run.recipe("auto").query) == ("influence", "margin")
    run.add_curvature(train, progress=False)
    assert run.recipe("auto").name == "influence_gn"


def test_unprojected_shrinkage_is_its_formula(tmp_path):
    """With every coordinate kept, a run and conjugate gradients solve one system."""
    run, train, test = digits_run(tmp_path / "a", projection="eigenbasis", proj_dim=10**6)
    recipe = replace(RECIPES["influence_shrunk"], shrinkage=1.0, damping=0.5)
    exact = tda.attribute(run.task, train, test, recipe, progress=False)
    ekfac = replace(RECIPES["influence_ekfac"], query="margin", damping=0.5)
    factored = tda.attribute(run.task, train, test, ekfac, progress=False)
    assert naive.relative_error(exact, factored) < 2e-3  # conjugate gradients stop at 1e-3
