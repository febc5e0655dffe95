"""A run with deleted examples answers as if they had never been indexed, to rounding; at once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
from conftest import make_task
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import N, build, contents

import tda
from tda import valuation
from tda.errors import DataError, MismatchError, StoreError
from tda.recipes import RECIPES
from tda.store import Store, Table
from tda.store.deleted import Remaining, deleted_positions, with_deleted

GONE = (0, 3, 4, 9)
LEFT = tuple(i for i in range(problems.NUM_TRAIN) if i not in GONE)
OPTIONS: dict[str, Any] = {
    "projection": "identity",
    "dtype": "float32",
    "chunk_rows": 4,
    "gauss_newton": True,
    "progress": False,
}
OF_OTHER_RUNS = {  # other rows, or no store at all
    "less",
    "trackstar",
    "influence_cg",
    "datainf",
    "influence_shrunk",
    "influence_ekfac",
}


@pytest.fixture(scope="module")
def problem() -> problems.Problem:
    return problems.problem("digits_mlp")


@pytest.fixture(scope="module")
def never(problem, tmp_path_factory) -> tda.Run:
    """Without the examples that are deleted from the other."""
    path = tmp_path_factory.mktemp("never") / "run"
    left = problems.Listed([problem.train[i] for i in LEFT])
    run = tda.index(make_task(problem), left, path, **OPTIONS)
    run.add_queries(problem.queries, "q")
    return run


@pytest.fixture(scope="module")
def whole(problem, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    run = tda.index(make_task(problem), problem.train, path, **OPTIONS)
    run.add_queries(problem.queries, "q")
    return path


@pytest.fixture
def run(whole, problem, tmp_path) -> tda.Run:
    shutil.copytree(whole, tmp_path / "run")
    opened = tda.open(tmp_path / "run", task=make_task(problem))
    assert opened.delete(opened.ids[list(GONE)]) == len(GONE)
    return opened


# ---- every answer


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - OF_OTHER_RUNS))
def test_every_recipe_scores_as_without_them(recipe, run, never):
    found, wanted = (r.scores("q", recipe=recipe).compute() for r in (run, never))
    assert naive.relative_error(found, wanted) < 1e-4
    a, b = (r.self_influence(recipe) for r in (run, never))
    assert naive.relative_error(a, b) < 1e-4


def test_the_curvature_of_drawn_rows_is_that_of_the_rest(problem, tmp_path):
    """(1/R') Σ h' x xᵀ over the rows left is the Horvitz–Thompson estimate for the examples left:
    (1/n') Σ_left y/π."""
    run = tda.index(
        make_task(problem),
        problem.train,
        tmp_path / "run",
        **OPTIONS | {"dtype": "float32", "gauss_newton": False},
    )
    run.add_curvature(problem.train, num_rows=40)
    before = run.store.table("curvature")
    n, weight = len(run.ids), before.column("weight").astype(float)
    left = ~np.isin(before.column("example"), run.ids[list(GONE)])
    run.delete(run.ids[list(GONE)])
    after = run.store.table("curvature")
    pi = len(weight) / (n * weight)
    np.testing.assert_allclose(
        after.column("weight") / after.num_rows, 1 / (len(LEFT) * pi[left]), rtol=1e-6
    )
    share = after.column("curvature") / before.column("curvature")[:, left]
    wanted = np.broadcast_to(after.column("weight") / weight[left], share.shape)
    np.testing.assert_allclose(share, wanted, rtol=1e-5)


@pytest.mark.parametrize("approximate", [False, True])
def test_rankings_name_no_deleted_example(run, never, approximate):
    found = run.top_k("q", k=20, recipe="influence", approximate=approximate)
    wanted = never.top_k("q", k=20, recipe="influence")
    assert found.proponents.ids.shape == (problems.NUM_QUERIES, len(LEFT))  # k is clipped to these
    for a, b in ((found.proponents, wanted.proponents), (found.opponents, wanted.opponents)):
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_array_equal(run.ids[a.indices], a.ids)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-3, atol=1e-6)
    near, theirs = (r.baseline_top_k("q", 5).proponents.ids for r in (run, never))
    np.testing.assert_array_equal(near, theirs)


def test_values_and_faults_are_of_the_rest(run, never):
    for of in (
        lambda r: valuation.values(r, "q", RECIPES["influence"]).value,
        lambda r: valuation.knn_shapley_of(r, "q", 3).value,
        lambda r: valuation.duplicates(r, 0.5).ids,
        lambda r: valuation.leakage(r, "q", 0.5).train_ids,
    ):
        found, wanted = of(run), of(never)
        if found.dtype.kind == "U":
            np.testing.assert_array_equal(found, wanted)
        else:
            assert naive.relative_error(found, wanted) < 1e-4


def test_a_run_that_is_open_elsewhere_notices_at_once(whole, tmp_path):
    """Another process deletes: what is asked next, the kept curvature included, is without them."""
    shutil.copytree(whole, tmp_path / "run")
    other = tda.open(tmp_path / "run")
    before = other.scores("q", recipe="influence").compute()
    tda.open(tmp_path / "run").delete(other.ids[list(GONE)])
    found = other.scores("q", recipe="influence").compute()
    assert found.shape == (problems.NUM_QUERIES, len(LEFT))
    assert naive.relative_error(found, before[:, list(LEFT)]) > 1e-3  # another curvature, another n
    tda.open(tmp_path / "run").restore(other.deleted)
    np.testing.assert_array_equal(other.scores("q", recipe="influence").compute(), before)


def test_no_row_is_touched_or_computed(whole, tmp_path):
    """Only the manifest changes, and taking it back gives the same bytes again."""
    shutil.copytree(whole, tmp_path / "run")
    run, before = tda.open(tmp_path / "run"), contents(tmp_path / "run")
    gone = run.ids[list(GONE)]
    assert (run.delete(gone), run.delete(gone[:2])) == (len(GONE), 0)
    np.testing.assert_array_equal(run.deleted, gone)
    after = contents(tmp_path / "run")
    assert {name for name in after if after[name] != before.get(name)} <= {
        "manifest.json",
        "cache/writer",
    }
    assert run.store.verify() == []
    assert (run.restore(gone[:1]), run.restore(gone), run.restore(gone)) == (1, len(GONE) - 1, 0)
    assert contents(tmp_path / "run")["manifest.json"] == before["manifest.json"]


def test_ground_truth_retrains_on_what_is_left(run, problem):
    """Subsets are indices into the whole training set and never hold a deleted example."""
    seen: list[set[int]] = []

    def train(subset: np.ndarray, seed: int) -> np.ndarray:
        seen.append(set(subset.tolist()))
        return np.full(problems.NUM_QUERIES, float(len(subset)))

    design = tda.evaluate.Design(num_subsets=4, seeds=(0,))
    truth = tda.evaluate.ground_truth(run, train, problem.queries, design, progress=False)
    assert truth.masks.shape == (4, len(LEFT)) == (4, len(run.ids))
    assert seen and set().union(*seen) == set(LEFT)
    subset = np.array(LEFT)[np.flatnonzero(truth.masks[0])]
    assert set(subset.tolist()) in seen
    run.restore(run.deleted)
    with pytest.raises(MismatchError, match="another train"):
        tda.evaluate.ground_truth(run, train, problem.queries, design, progress=False)


# ---- what follows


def test_a_run_grows_and_is_resumed_with_its_deleted_examples(problem, whole, tmp_path):
    """`index` is given all examples, deleted or not; those stay deleted."""
    shutil.copytree(whole, tmp_path / "run")
    run = tda.open(tmp_path / "run")
    gone = run.ids[list(GONE)]
    run.delete(gone)
    more = problems.Listed([*problem.train.examples, *problem.queries.examples])
    grown = tda.index(
        make_task(problem), more, tmp_path / "run", **OPTIONS | {"gauss_newton": False}
    )
    assert set(grown.deleted) == set(gone) and len(grown.ids) == len(more) - len(gone)
    with pytest.raises(MismatchError) as caught:
        tda.index(
            make_task(problem),
            problems.Listed([problem.train[i] for i in LEFT]),
            tmp_path / "run",
            **OPTIONS,
        )
    assert "deleted" in str(caught.value.do)


def test_what_cannot_be_deleted_is_refused_by_name(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    run = tda.open(tmp_path / "run")
    for refused in (run.delete, run.restore):
        with pytest.raises(DataError, match="'nobody'"):
            refused([run.ids[0], "nobody"])
    with pytest.raises(DataError, match="no training example would be left"):
        run.delete(run.ids)
    assert run.deleted.size == 0


# ---- the view


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Store:
    return build(tmp_path_factory.mktemp("built") / "run")


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_a_table_without_rows_is_its_rest(data, built):
    """Every way to read it gives the stored values at the positions that are left."""
    gone = data.draw(st.sets(st.integers(0, N - 1), max_size=N - 1))
    left = np.setdiff1d(np.arange(N), sorted(gone))
    stored, table = built.stored("train"), Remaining(built.stored("train"), left)
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(left))] * 2)))
    for checkpoint in range(2):
        every = stored.rows(checkpoint, 0, N)
        torch.testing.assert_close(table.rows(checkpoint, start, stop), every[left[start:stop]])
        torch.testing.assert_close(
            table.embedding(checkpoint, start, stop),
            stored.embedding(checkpoint, 0, N)[left[start:stop]],
        )
        some = data.draw(st.lists(st.integers(0, len(left) - 1), max_size=4))
        torch.testing.assert_close(table.gather(checkpoint, some), every[left[some]])
    for name in table.columns():
        whole, axis = stored.column(name), int(stored.specs[name].per_checkpoint)
        np.testing.assert_array_equal(table.column(name), np.take(whole, left, axis))
    np.testing.assert_array_equal(table.entries("id", range(len(left))), table.column("id"))
    for wrong in (lambda: table.rows(0, 0, len(left) + 1), lambda: table.gather(0, [len(left)])):
        with pytest.raises(IndexError):
            wrong()


def test_whatever_is_read_of_a_table_can_be_read_of_what_is_left(tmp_path):
    """The view lacks nothing but what writes."""
    view = Remaining(build(tmp_path / "run").stored("train"), np.array([1, 2]))
    writing = {"write", "mark", "marks", "keys", "places", "chunk_range", "num_chunks"}
    writing |= {"is_finished", "put", "recover"}
    public = {name for name in vars(Table) if not name.startswith("_")}
    assert {name for name in public if not hasattr(view, name)} == writing


@settings(max_examples=100, deadline=None)
@given(st.sets(st.integers(0, 99)))
def test_positions_are_spelled_and_read_back(gone):
    manifest = {"data": {"train": {"num_rows": 100}}}
    positions = np.array(sorted(gone), np.int64)
    spelled = with_deleted(manifest, positions)
    np.testing.assert_array_equal(deleted_positions(spelled, Path("run")), positions)
    assert with_deleted(spelled, positions[:0]) == manifest


@pytest.mark.parametrize(
    "text",
    ["", "5 3", "3 3", "3-2", "100", "0-100", "-1", "1-1 1", "x", "1  2", "٣", 7, ["1"], "9" * 40],
)
def test_a_list_of_deleted_examples_that_makes_no_sense_is_refused(text):
    manifest = {"data": {"train": {"num_rows": 100, "deleted": text}}}
    with pytest.raises(StoreError, match="deleted examples"):
        deleted_positions(manifest, Path("run"))
