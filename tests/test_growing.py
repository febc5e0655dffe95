"""What changes in a training set is computed again; what is deleted can be gone for good."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import naive
import numpy as np
import pytest
from test_upkeep import CHUNK, N, asked, computed, data, make_task, without_cache

import tda
from tda.decisions import Marks
from tda.errors import MismatchError, StoreError
from tda.growing import compact, relabel
from tda.store import Table
from tda.upkeep import deep

__all__ = ["computed"]
RECIPES = ("grad_dot", "trak", "influence", "influence_gn")


def index(path: Path, examples: list[dict[str, Any]], dtype: str = "float32") -> tda.Run:
    options: dict[str, Any] = {"proj_dim": 16, "progress": False, "dtype": dtype}
    run = tda.index(make_task(), examples, path, chunk_rows=CHUNK, **options)
    run.add_curvature(examples, num_rows=3 * len(examples))  # every label of every example
    run.add_queries(asked(), "q")
    return run


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return index(tmp_path_factory.mktemp("made") / "run", data()).path


@pytest.fixture
def run(made, tmp_path) -> tda.Run:
    shutil.copytree(made, tmp_path / "run")
    return tda.open(tmp_path / "run", task=make_task())


def same_answers(run: tda.Run, other: tda.Run, tolerance: float = 1e-5) -> None:
    np.testing.assert_array_equal(run.ids, other.ids)
    for recipe in RECIPES:
        found, wanted = (r.scores("q", recipe=recipe).compute() for r in (run, other))
        assert naive.relative_error(found, wanted) < tolerance, recipe


# ---- relabel


def test_a_changed_label_costs_the_chunks_it_is_in(run, tmp_path, computed):
    """Bytes are those of a run indexed with the right label from the first; in the curvature
    table, whose rows are all labels of all examples, only their names depend on it."""
    right = data(relabelled=7)
    wanted = index(tmp_path / "right", right)
    computed.clear()
    done = relabel(run, right)
    assert done.ids.tolist() == ["e7"]
    chunk = 7 // CHUNK
    train = [place for place in done.computed if place[0] == "train"]
    assert train == [("train", 0, chunk), ("train", 1, chunk)]
    curvature = [place for place in done.computed if place[0] == "curvature"]
    assert 2 <= len(curvature) <= 4 < 2 * run.store.table("curvature").num_rows // CHUNK
    found, theirs = without_cache(run.path), without_cache(wanted.path)
    for name in theirs:
        if name.startswith("train/"):
            assert found[name] == theirs[name], name
    same_answers(run, wanted)
    assert run.verify() == [] and deep(run, right, sample=N) == []
    computed.clear()
    assert relabel(run, right).computed == [] and computed == []


def test_an_interrupted_relabelling_is_continued(run, tmp_path, monkeypatch):
    right = data(relabelled=7)

    def killed(*about: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tda.store.planning.write_mark", killed)
        with pytest.raises(KeyboardInterrupt):
            relabel(run, right)
    again = tda.open(run.path, task=make_task())
    with pytest.raises(StoreError):
        again.scores("q").compute()
    relabel(again, right)
    again.add_curvature(right, num_rows=3 * N)
    same_answers(again, index(tmp_path / "right", right))


def test_a_deleted_example_that_is_relabelled_stays_deleted(run):
    run.delete(["e7", "e2"])
    assert relabel(run, data(relabelled=7)).ids.tolist() == ["e7"]
    assert run.deleted.tolist() == ["e2", "e7"]


def test_other_data_are_not_taken_for_changed_ones(run):
    before = without_cache(run.path)
    other = [{**e, "target": (e["target"] + 1) % 3} for e in data()]
    for wrong in (other, data()[:-1]):
        with pytest.raises(MismatchError, match="not the examples"):
            relabel(run, wrong)
    assert without_cache(run.path) == before


def test_what_others_did_since_a_run_was_opened_is_kept(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    early, other = (tda.open(tmp_path / "run", task=make_task()) for _ in range(2))
    other.delete(["e2", "e9"])
    relabel(early, data(relabelled=7))
    assert early.deleted.tolist() == tda.open(early.path).deleted.tolist() == ["e2", "e9"]
    bare = tda.index(make_task(), data(), tmp_path / "bare", chunk_rows=CHUNK, proj_dim=16)
    tda.open(bare.path, task=make_task()).add_curvature(data(), num_rows=3 * N)
    relabel(bare, data(relabelled=7))
    assert tda.open(bare.path).store.manifest["data"].keys() == {"train", "curvature"}


def test_a_run_that_has_grown_elsewhere_asks_to_be_opened_anew(tmp_path):
    task = make_task()
    fewer = tda.Task(task.model, checkpoints=task.checkpoints[:1])
    early = tda.index(fewer, data(), tmp_path / "run", proj_dim=16, progress=False)
    tda.index(task, data(), tmp_path / "run", proj_dim=16, progress=False)
    with pytest.raises(MismatchError, match="2, as many as the run has by now"):
        early.add_queries(asked(), "q")


# ---- compact


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8", "int4", "ternary"])
def test_a_compacted_run_is_one_that_never_held_them(dtype, tmp_path, computed):
    run = index(tmp_path / "run", data(), dtype)
    gone = {"e0", "e5", "e6", "e7", "e22"}
    Marks(run.path).set("e5", "remove", None, "")
    Marks(run.path).set("e8", "keep", None, "fine")
    run.delete(sorted(gone))
    left = [example for example in data() if example["id"] not in gone]
    computed.clear()
    before = without_cache(run.path)
    store = compact(run.path, tmp_path / "new")
    assert computed == [] and without_cache(run.path) == before
    new = tda.open(tmp_path / "new", task=make_task())
    assert new.verify() == [] and new.deleted.size == 0 and "deleted" not in str(store.manifest)
    same_answers(new, run, 1e-5)
    same_answers(new, index(tmp_path / "never", left, dtype), 1e-4 if dtype == "float32" else 0.02)
    assert set(Marks(new.path).all()) == {"e8"}
    assert not any(b"e5" in b for name, b in without_cache(new.path).items() if "/id/" in name)
    grown = tda.index(make_task(), left, new.path, proj_dim=16, dtype=dtype, progress=False)
    assert grown.ids.tolist() == [example["id"] for example in left]  # the same run, complete


def test_a_compaction_that_was_interrupted_goes_on(run, tmp_path, monkeypatch):
    run.delete(["e3", "e4"])
    whole = without_cache(compact(run.path, tmp_path / "at once").path)
    write, left = Table.write, [3]

    def some(self: Table, *what: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        write(self, *what)

    with monkeypatch.context() as patch:
        patch.setattr(Table, "write", some)
        with pytest.raises(KeyboardInterrupt):
            compact(run.path, tmp_path / "new")
    compact(run.path, tmp_path / "new")
    assert without_cache(tmp_path / "new") == whole
    with pytest.raises(StoreError, match="own folder"):
        compact(run.path, run.path)
