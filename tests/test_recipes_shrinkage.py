"""Curvature between its whole and its diagonal, and the recipe that a run chooses for itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
import torch
from memory_store import exact_rows, make_store
from sklearn.datasets import load_digits
from torch import nn

import tda
from tda.errors import RecipeError
from tda.recipes import RECIPES
from tda.recipes.auto import choose
from tda.report import collect
from tda.scorer import prepare, scores, self_influence

SHRUNK = replace(RECIPES["influence_shrunk"], curvature_rows="link", basis="any", core=None)


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


@pytest.mark.parametrize("core", [1, 5, 11, 12, 40])
@pytest.mark.parametrize("num_train", [7, 40], ids=["dual", "primal"])
def test_beyond_its_core_a_curvature_is_diagonal(core, num_train, tmp_path):
    """H_jl = 0 for j ≠ l unless both H_jj and H_ll are among the largest of the diagonal."""
    store = make_store(tmp_path, num_checkpoints=2, num_train=num_train, dim=12)
    recipe = replace(SHRUNK, shrinkage=0.25, core=core, damping=0.3)
    queries, train = exact_rows(store, "queries/q"), exact_rows(store)
    wanted, lengths = 0.0, 0.0
    for q, t in zip(queries, train, strict=True):
        H = naive.link_hessian(t)
        apart = np.argsort(-np.diag(H))[core:]
        inverse = np.linalg.inv(masked(0.75 * H + 0.25 * np.diag(np.diag(H)), apart, 0.3))
        wanted = wanted + q.margin @ inverse @ -t.dl.T / num_train / 2
        lengths = lengths + np.einsum("ij,jk,ik->i", t.margin, inverse, -t.dl) / num_train / 2
    assert naive.relative_error(matrix(store, recipe), wanted) < 1e-5
    assert naive.relative_error(self_influence(store, recipe), lengths) < 1e-5


def masked(H: np.ndarray, apart: np.ndarray, damping: float) -> np.ndarray:
    """H with these coordinates alone, and λ = damping · tr(H)/k."""
    kept = H.copy()
    kept[apart, :] = kept[:, apart] = 0
    kept[apart, apart] = H[apart, apart]
    return kept + damping * np.trace(H) / len(H) * np.eye(len(H))


def test_a_curvature_with_a_core_is_kept_and_read_back(tmp_path):
    store = make_store(tmp_path, num_checkpoints=1, dim=12).mark()
    recipe = replace(SHRUNK, core=5)
    first, again = matrix(store, recipe), matrix(store, recipe)
    np.testing.assert_array_equal(first, again)
    assert naive.relative_error(matrix(store, replace(recipe, core=12)), first) > 1e-3


@pytest.mark.parametrize(
    "changes", [{"core": 0}, {"core": 5, "blocks": "layer"}, {"core": 5, "shrinkage": 0.0}], ids=str
)
def test_a_core_that_means_nothing_is_refused(changes):
    with pytest.raises(RecipeError, match="core"):
        replace(SHRUNK, **changes)


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


@pytest.mark.parametrize(
    ("measurement", "amounts"), [("squared_error", True), ("mean_squared_error", False)]
)
def test_amounts_are_told_only_where_the_curvature_is_that_of_the_loss(
    tmp_path, measurement, amounts
):
    """Of a loss that is no known function of an output H is the empirical Fisher matrix."""
    x = torch.randn(20, 4)
    data = x, x.sum(1, keepdim=True)
    task = tda.Task(nn.Linear(4, 1), measurement=measurement)
    run = tda.index(task, data, tmp_path / "a", proj_dim=30, progress=False)
    run.add_queries(data, "q")
    assert ("empirical Fisher" in run.recipe("auto").summary) is not amounts
    assert collect(run, recipe="influence").removal.in_loss is amounts
    run.add_curvature(data)
    assert "empirical Fisher" not in run.recipe("auto").summary
    assert collect(run, recipe="influence_gn").removal.in_loss


def test_unprojected_shrinkage_is_its_formula(tmp_path):
    """With every coordinate kept, a run and conjugate gradients solve one system."""
    run, train, test = digits_run(tmp_path / "a", projection="eigenbasis", proj_dim=10**6)
    recipe = replace(RECIPES["influence_shrunk"], shrinkage=1.0, core=None, damping=0.5)
    exact = tda.attribute(run.task, train, test, recipe, progress=False)
    ekfac = replace(RECIPES["influence_ekfac"], query="margin", damping=0.5, parameters="all")
    factored = tda.attribute(run.task, train, test, ekfac, progress=False)
    assert naive.relative_error(exact, factored) < 2e-3  # conjugate gradients stop at 1e-3
