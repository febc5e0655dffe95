"""`stores/digits` is what this engine makes of the job that is said to have made it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tda
from tda.run import Run

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "stores" / "digits"
BF16_STEP = 2**-7  # two roundings to 8 bits may differ by one step


@pytest.fixture(scope="module")
def job() -> ModuleType:
    spec = importlib.util.spec_from_file_location("digits_job", ROOT / "jobs" / "digits.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def golden() -> Run:
    return tda.open(GOLDEN)


@pytest.fixture(scope="module")
def remade(job: ModuleType, golden: Run, tmp_path_factory) -> Run:
    """Indexed again from the committed checkpoints."""
    manifest = golden.store.manifest
    path = tmp_path_factory.mktemp("golden") / "digits"
    run = tda.index(
        job.task(str(GOLDEN)),
        job.train_set(),
        path,
        proj_dim=manifest["projection"]["dim"],
        chunk_rows=manifest["chunk_rows"],
        progress=False,
    )
    run.add_queries(job.test_set(golden.store.table("queries/test").num_rows), "test")
    return run


def test_it_is_small_and_whole(golden: Run):
    assert golden.store.verify() == []
    derived = {"cache", "scores", "report.html", "summary.json", "actions.csv"}  # not committed
    derived |= {"value", "values.parquet", "groups.parquet", "top_k.parquet"}
    files = [f for f in GOLDEN.rglob("*") if f.is_file() and derived.isdisjoint(f.parts)]
    assert sum(file.stat().st_size for file in files) < 1_500_000


def test_the_manifest_is_the_same_but_for_versions(golden: Run, remade: Run):
    known, made = ({**run.store.manifest, "versions": None} for run in (golden, remade))
    assert made == known


@pytest.mark.parametrize("name", ["train", "queries/test"])
def test_rows_and_columns_are_the_same(golden: Run, remade: Run, name: str):
    known, made = golden.store.table(name), remade.store.table(name)
    assert {*made.columns()} == {*known.columns(), "input_digest"}  # the run is an older one
    for column in known.columns():
        ours, theirs = made.column(column), known.column(column)
        if ours.dtype == np.float32:
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6, err_msg=column)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=column)
    for checkpoint in range(known.num_checkpoints):
        ours = made.rows(checkpoint, 0, made.num_rows)
        theirs = known.rows(checkpoint, 0, known.num_rows)
        scale = theirs.norm(dim=1, keepdim=True)
        assert float(((ours - theirs) / scale).abs().max()) < BF16_STEP


ANSWERED = [  # of a run without layers, curvature rows, eigenbasis or optimizers
    name
    for name, r in tda.RECIPES.items()
    if (r.blocks, r.basis, r.metric, r.space) == ("whole", "any", "any", "stored")
    and r.curvature_rows != "gauss_newton"
]


@pytest.mark.parametrize("recipe", ANSWERED)
def test_scores_are_the_same(golden: Run, remade: Run, recipe: str):
    ours, theirs = (run.scores("test", recipe).compute() for run in (remade, golden))
    assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.9999


def test_a_query_is_helped_by_its_own_class(golden: Run):
    """What a reader of the report sees first: most of the strongest proponents share the label."""
    train, queries = golden.store.table("train"), golden.store.table("queries/test")
    top = golden.top_k("test", k=1, recipe="influence").proponents.indices[:, 0]
    same = train.column("label")[top] == queries.column("label")
    assert same.mean() > 0.5
