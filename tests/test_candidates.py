"""Approximate search returns exact scores of rows that exist, and says how many it missed."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from memory_store import MemoryStore, make_store

from tda.errors import RecipeError, StoreError
from tda.recipes import RECIPES
from tda.scorer import Prepared, TopK, candidates, prepare, top_k
from tda.scorer.candidates import RowIndex, approximate_top_k


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))


def clustered(path: Path, n: int = 3000, dim: int = 16, num_checkpoints: int = 2) -> MemoryStore:
    """Rows around 30 directions, of uneven length; queries near some of them."""
    rng = np.random.default_rng(0)
    store = make_store(
        path,
        num_train=n,
        num_queries=20,
        dim=dim,
        chunk_rows=256,
        num_checkpoints=num_checkpoints,
    )
    centres = rng.normal(size=(num_checkpoints, 30, dim))
    for table in store.tables.values():
        which = rng.integers(0, 30, table.num_rows)
        noise = 0.3 * rng.normal(size=table.values.shape)
        length = np.exp(0.3 * rng.normal(size=(table.num_rows, 1)))
        table.values[:] = (centres[:, which] + noise) * length
    return store


def prepared_for(store: MemoryStore, name: str = "grad_dot") -> Prepared:
    return prepare(store, RECIPES[name], store.queries)


def both(found: TopK, exact: TopK):
    return ((found.proponents, exact.proponents), (found.opponents, exact.opponents))


def overlap(found: TopK, exact: TopK) -> float:
    shares = [
        len(set(f) & set(e)) / len(e)
        for a, b in both(found, exact)
        for f, e in zip(a.indices.tolist(), b.indices.tolist(), strict=True)
    ]
    return float(np.mean(shares))


def scores_of(prepared: Prepared, indices: np.ndarray) -> np.ndarray:
    """Σ_c ⟨Q_c, r_c ∇f_c⟩ in float64 of chosen rows [m, k]."""
    out = np.zeros(indices.shape)
    for c, q in enumerate(prepared.queries):
        rows = prepared.train.values[c] * prepared.row_weights[c].numpy()[:, None]
        out += np.einsum("mk,mjk->mj", q.numpy().astype(np.float64), rows[indices])
    return out


@pytest.mark.parametrize("name", [name for name, r in RECIPES.items() if r.space == "stored"])
def test_flat_search_is_the_exact_search_under_every_recipe(name, tmp_path):
    store = make_store(tmp_path, num_checkpoints=3, num_train=200).with_curvature()
    recipe = dataclasses.replace(RECIPES[name], basis="any", metric="any")
    prepared = prepare(store, recipe, store.queries)
    found, exact = approximate_top_k(store, prepared, 7), top_k(prepared, 7)
    for ours, theirs in both(found, exact):
        np.testing.assert_array_equal(ours.indices, theirs.indices)
        np.testing.assert_array_equal(ours.ids, theirs.ids)
        np.testing.assert_allclose(ours.scores, theirs.scores, rtol=1e-4, atol=1e-6)
    assert found.recall == 1


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
@pytest.mark.parametrize("name", ["grad_dot", "trak"])
def test_candidates_are_ranked_by_their_exact_scores_and_the_recall_is_true(kind, name, tmp_path):
    store = clustered(tmp_path)
    prepared = prepared_for(store, name)
    searched = RowIndex.of(store, prepared, kind)
    assert searched.kind == kind
    found, exact = searched.top_k(prepared, 10), top_k(prepared, 10)
    assert found.recall == pytest.approx(
        overlap(found, exact), abs=1e-12
    )  # 20 queries: all sampled
    assert found.recall >= 0.95
    for ranking, sign in ((found.proponents, 1), (found.opponents, -1)):
        expected = scores_of(prepared, ranking.indices)
        np.testing.assert_allclose(ranking.scores, expected, rtol=1e-4, atol=1e-5)
        assert (np.diff(sign * ranking.scores, axis=1) <= 0).all()
        assert all(len(set(row)) == 10 for row in ranking.indices.tolist())


def test_probing_every_list_is_the_exact_search(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "MIN_RECALL", 2)
    store = clustered(tmp_path)
    prepared = prepared_for(store)
    found, exact = RowIndex.of(store, prepared, "ivf").top_k(prepared, 10), top_k(prepared, 10)
    assert found.recall == 1
    for ours, theirs in both(found, exact):
        np.testing.assert_array_equal(ours.indices, theirs.indices)


def test_more_neighbours_than_a_list_holds_are_found_in_other_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "MIN_RECALL", 0)  # one list is enough for the recall
    store = clustered(tmp_path)
    prepared = prepared_for(store)
    for k in (500, 3000, 10_000):
        found = RowIndex.of(store, prepared, "ivf").top_k(prepared, k)
        for ranking in (found.proponents, found.opponents):
            assert ranking.indices.shape == (20, min(k, 3000))
            assert all(len(set(row)) == min(k, 3000) for row in ranking.indices.tolist())
            assert ranking.indices.min() >= 0
            assert np.isfinite(ranking.scores).all()


def test_equal_scores_are_ordered_by_train_index(tmp_path):
    store = make_store(tmp_path, num_train=60, num_checkpoints=1, dim=4)
    store.train.values[:] = np.tile([1, 0, 0, 0], (1, 60, 1))
    store.train.columns["slope"][:] = 1
    prepared = prepared_for(store)
    found = approximate_top_k(store, prepared, 60)
    for ranking in (found.proponents, found.opponents):
        np.testing.assert_array_equal(ranking.indices, np.tile(np.arange(60), (6, 1)))


@pytest.mark.parametrize("kind", ["ivf", "ivfpq"])
def test_an_index_is_built_and_measured_once_per_store(kind, tmp_path):
    store = clustered(tmp_path).mark()
    prepared = prepared_for(store)
    first = approximate_top_k(store, prepared, 10, kind)
    store.train.reads.clear()
    again = approximate_top_k(store, prepared, 10, kind)
    assert store.train.reads == []
    assert again.recall == first.recall
    np.testing.assert_array_equal(again.proponents.indices, first.proponents.indices)
    in_run = [path.name for path in (tmp_path / "cache").iterdir()]
    assert not any(name.startswith("faiss") for name in in_run)  # a stranger's would be parsed
    for path in [*(tmp_path / "cache").iterdir(), *(tmp_path / "home/tda").iterdir()]:
        path.write_bytes(path.read_bytes()[:-100])
    repaired = approximate_top_k(store, prepared, 10, kind)
    assert store.train.reads != []
    np.testing.assert_array_equal(repaired.opponents.indices, first.opponents.indices)


def test_another_recipe_or_other_rows_get_another_index(tmp_path):
    store = clustered(tmp_path).mark()
    kept = [RowIndex.of(store, prepared_for(store, name), "ivf") for name in ("grad_dot", "trak")]
    assert kept[0].weights != kept[1].weights
    dots = prepared_for(store, "influence")  # the same row weights: the same index
    assert RowIndex.of(store, dots, "ivf").weights == kept[0].weights
    other = store.with_train(values=store.train.values[:, ::-1].copy()).mark()
    prepared = prepared_for(other)
    found, exact = approximate_top_k(other, prepared, 5, "ivf"), top_k(prepared, 5)
    assert overlap(found, exact) >= 0.95


def test_too_few_rows_to_train_on_are_searched_flat(tmp_path):
    store = make_store(tmp_path, num_train=30)
    prepared = prepared_for(store)
    assert RowIndex.of(store, prepared, "ivf").kind == "flat"
    assert RowIndex.of(store, prepared, "ivfpq").kind == "flat"


def test_large_runs_are_compressed(tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "FLAT_BYTES", 1000)
    store = clustered(tmp_path)
    assert RowIndex.of(store, prepared_for(store)).kind == "ivfpq"


def test_a_row_that_is_not_finite_is_refused_not_dropped(tmp_path):
    store = make_store(tmp_path, num_train=60)
    prepared = prepared_for(store)
    store.train.values[1, 42, 0] = np.nan
    with pytest.raises(StoreError, match="training example 42"):
        approximate_top_k(store, prepared, 3)


def test_an_index_of_another_length_is_refused(tmp_path):
    store = clustered(tmp_path)
    prepared = prepared_for(store)
    short = dataclasses.replace(
        RowIndex.of(store, prepared, "ivf"),
        faiss_index=RowIndex.of(
            store.with_train(values=store.train.values[:, :100]),
            dataclasses.replace(
                prepared,
                train=store.with_train(values=store.train.values[:, :100]).train,
                row_weights=prepared.row_weights[:, :100],
            ),
            "ivf",
        ).faiss_index,
    )
    with pytest.raises(StoreError, match="fewer rows"):
        short.top_k(prepared, 200)


@pytest.mark.parametrize("k", [0, 1.5, None])
def test_k_is_a_count(k, tmp_path):
    store = make_store(tmp_path)
    with pytest.raises(RecipeError, match="k is not a count"):
        approximate_top_k(store, prepared_for(store), k)
