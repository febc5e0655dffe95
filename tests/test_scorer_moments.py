"""Mean and variance over the queries, against the matrix of all scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from memory_store import make_store

from tda.recipes import RECIPES
from tda.scorer import prepare, scores
from tda.scorer.moments import moments, scores_at


@pytest.mark.parametrize("recipe", ["grad_dot", "influence", "trak", "grad_cos", "tracin"])
@pytest.mark.parametrize("num_queries", [1, 6, 60], ids=["one", "few", "more than dimensions"])
def test_moments_are_those_of_the_scores(tmp_path, recipe, num_queries):
    store = make_store(tmp_path, num_queries=num_queries)
    prepared = prepare(store, RECIPES[recipe], store.queries)
    every = scores(prepared).compute().astype(np.float64)
    weights = np.random.default_rng(0).normal(size=(3, num_queries))
    found = moments(prepared, weights)
    size = np.abs(every).max()
    np.testing.assert_allclose(found.mean, every.mean(0), atol=1e-5 * size)
    np.testing.assert_allclose(found.averages, weights @ every, atol=1e-4 * size)
    if num_queries == 1:
        assert np.isnan(found.variance).all()
    else:
        np.testing.assert_allclose(found.variance, every.var(0, ddof=1), rtol=1e-3)


@pytest.mark.parametrize("recipe", ["influence", "trak", "grad_cos"])
def test_scores_of_some_examples_are_those_of_the_matrix(tmp_path, recipe):
    store = make_store(tmp_path)
    prepared = prepare(store, RECIPES[recipe], store.queries)
    every, rows = scores(prepared).compute(), np.array([39, 0, 7, 7, 20])
    found = scores_at(prepared.select(np.array([3, 1])), rows)
    np.testing.assert_allclose(found, every[[3, 1]][:, rows], rtol=1e-4, atol=1e-6)


def test_variance_survives_a_mean_that_dwarfs_it(tmp_path):
    """Σs² − m·s̄² would lose it in float32: the queries are centred first."""
    store = make_store(tmp_path, num_queries=40)
    common = 1e4 * np.ones(store.queries.dim)
    slopes = {"slope": -np.ones_like(store.queries.columns["slope"])}
    values = store.queries.values + common
    shifted = {**store.queries.columns, **slopes}
    asked = replace(store.queries, values=values, columns=shifted)
    store = replace(store, tables={**store.tables, "queries/q": asked})
    train = store.train.values * -store.train.columns["slope"][..., None]
    every = np.mean([q @ t.T for q, t in zip(values, train, strict=True)], axis=0)
    found = moments(prepare(store, RECIPES["grad_dot"], store.queries))
    np.testing.assert_allclose(found.variance, every.var(0, ddof=1), rtol=0.02)
