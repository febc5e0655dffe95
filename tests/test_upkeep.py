"""What is damaged is found and computed again, and no more; what was made of others is noticed."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored import contents, flip, truncate
from torch import nn

import tda
from tda.decisions import Marks
from tda.errors import StoreError
from tda.featurizer import Featurizer
from tda.repair import repair
from tda.upkeep import deep, meaning, verify

N, CHUNK = 23, 6


def data(relabelled: int | None = None) -> list[dict[str, Any]]:
    x = torch.randn(N, 5, generator=torch.Generator().manual_seed(0))
    y = [i % 3 for i in range(N)]
    if relabelled is not None:
        y[relabelled] = (y[relabelled] + 1) % 3
    return [{"input": x[i], "target": y[i], "id": f"e{i}"} for i in range(N)]


def asked() -> list[dict[str, Any]]:
    return [{**example, "id": f"q{i}"} for i, example in enumerate(data()[:4])]


def make_task(scale: float = 1.0, measurement: str = "cross_entropy") -> tda.Task:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    second = {name: value * 1.5 * scale for name, value in first.items()}
    return tda.Task(model, checkpoints=[first, second], measurement=measurement)


@pytest.fixture(scope="module", params=["bfloat16", "float32", "int8", "int4", "ternary"])
def made(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("made") / "run"
    options = {"projection": "eigenbasis", "proj_dim": 16, "progress": False}
    run = tda.index(make_task(), data(), path, chunk_rows=CHUNK, dtype=request.param, **options)
    run.add_curvature(data(), num_rows=20)
    run.add_queries(asked(), "q")

    def retrain(subset: np.ndarray, seed: int) -> np.ndarray:
        return np.full(4, subset.sum() + seed, np.float32)

    design = tda.evaluate.Design(num_subsets=2, seeds=(0, 1))
    tda.evaluate.ground_truth(run, retrain, asked(), design, progress=False)
    Marks(path).set("e1", "remove", None, "")
    Marks(path).set("e2", "keep", None, "why not")
    return path


@pytest.fixture
def run(made, tmp_path) -> tda.Run:
    shutil.copytree(made, tmp_path / "run")
    return tda.open(tmp_path / "run", task=make_task())


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many examples each call of the featurizer was given."""
    sizes: list[int] = []
    start = Featurizer.start

    def counted(self: Featurizer, batch: Any, num_examples: int, train: bool = False) -> Any:
        sizes.append(num_examples)
        return start(self, batch, num_examples, train)

    monkeypatch.setattr(Featurizer, "start", counted)
    return sizes


def without_cache(path: Path) -> dict[str, bytes]:
    return {name: b for name, b in contents(path).items() if not name.startswith("cache/")}


# ---- verify


@pytest.mark.parametrize("gone", ["train", "curvature"])
def test_a_table_that_is_gone_is_missed_and_computed_again(run, gone):
    before = without_cache(run.path)
    shutil.rmtree(run.path / gone)
    (fault,) = verify(run.path)
    assert (fault.path, fault.kind) == (f"{gone}/done/static.json", "missing")
    assert "tda index" in fault.do
    done = repair(run, data())
    assert done.after == [] and {name for name, *_ in done.computed} == {gone}
    assert without_cache(run.path) == before


def test_a_changed_byte_in_any_file_is_found_and_named(run):
    """Tables, bases, manifest, ground truth and decisions: no file is unread."""
    dtype = ("bfloat16", "float32", "int8", "int4", "ternary").index(run.store.manifest["dtype"])
    for name in sorted(without_cache(run.path))[dtype::9]:  # the campaign has all of them
        place = run.path / name
        before = place.read_bytes()
        flip(place, seed=len(name))
        try:
            found = [fault.path for fault in verify(run.path, withdraw=False)]
        except StoreError as error:
            found = [Path(str(error.where)).name]
        assert any(name.endswith(path) for path in found), (name, found)
        place.write_bytes(before)
    assert verify(run.path) == []


def test_a_line_cut_from_between_decisions_is_noticed(run):
    log = run.path / "actions/marks.jsonl"
    first, second = log.read_bytes().splitlines(keepends=True)
    for text, where in ((second, "line 1"), (second + first, "line 1"), (first * 2, "line 2")):
        log.write_bytes(text)
        (fault,) = verify(run.path)
        assert fault.path == "actions/marks.jsonl" and where in fault.what
    log.write_bytes(first + second[:-1])
    assert "cut short" in verify(run.path)[0].what
    value = json.loads(second)
    log.write_bytes(first + json.dumps({**value, "crc32c": None}).encode() + b"\n")
    (fault,) = verify(run.path)
    assert fault.path == "actions/marks.jsonl" and "line 2" in fault.what
    log.write_bytes(b'{"id": "e3", "action": "keep"}\n')  # by hand
    assert verify(run.path) == [] and set(Marks(run.path).all()) == {"e3"}


def test_lines_cut_from_the_end_of_decisions_are_noticed(run):
    log, count = run.path / "actions/marks.jsonl", run.path / "actions/count.jsonl"
    whole = log.read_bytes()
    for left in (whole.splitlines(keepends=True)[0], b""):
        log.write_bytes(left)
        (fault,) = verify(run.path)
        assert fault.path == "actions/marks.jsonl" and "gone from its end" in fault.what
    log.unlink()
    assert "2 decisions are gone" in verify(run.path)[0].what
    log.write_bytes(whole)
    assert verify(run.path) == []
    count.unlink()
    (fault,) = verify(run.path)
    assert fault.path == "actions/count.jsonl"
    Marks(run.path).set("e3", "keep", None, "")
    assert verify(run.path) == []
    before = count.read_bytes()
    Marks(run.path).set("e4", "keep", None, "")
    count.write_bytes(before)  # a crash between the line and its count
    assert verify(run.path) == []


def test_a_damaged_retraining_is_withdrawn_and_trained_again(run):
    trained: list[int] = []

    def retrain(subset: np.ndarray, seed: int) -> np.ndarray:
        trained.append(seed)
        return np.full(4, subset.sum() + seed, np.float32)

    retrain.digest = run_digest(run)  # type: ignore[attr-defined]
    before = without_cache(run.path)
    flip(run.path / "evaluate/half/outputs/c/1/0/0")
    (fault,) = verify(run.path)
    assert fault.kind == "altered" and "again" in fault.do
    design = tda.evaluate.Design(num_subsets=2, seeds=(0, 1))
    tda.evaluate.ground_truth(run, retrain, asked(), design, progress=False)
    assert len(trained) == 1 and without_cache(run.path) == before


def run_digest(run: tda.Run) -> str:
    import json

    return json.loads((run.path / "evaluate/half/manifest.json").read_bytes())["train_function"]


# ---- deep


def test_rows_computed_again_are_those_stored(run):
    """In any order and company, to the rounding of the stored type."""
    run.delete(["e4"])
    assert deep(run, data(), sample=N) == []
    assert deep(run, data(), sample=9, seed=3, batch_size=2) == []


def test_other_weights_are_noticed_at_their_checkpoint(run):
    run.task = make_task(scale=1.05)
    found = deep(run, data(), sample=10)
    assert {d.checkpoint for d in found} == {1} and len({d.id for d in found}) == 10
    assert "other weights" in meaning(found, 10, 2) and "checkpoint 1" in meaning(found, 10, 2)


def test_other_data_are_named(run):
    found = deep(run, data(relabelled=7), sample=N)
    assert {d.id for d in found} == {"e7"} and "other data" in meaning(found, N, 2)


def test_a_row_that_was_altered_and_sealed_again_is_named(run):
    """By who knows the format: checksums agree, the model does not."""
    table = run.store.stored("train")
    start, stop = table.chunk_range(1)
    rows = table.rows(0, start, stop).numpy().copy()
    rows[2] = -rows[2]
    names = ("loss", "p", "slope", "curvature", "grad_norm")
    columns = {name: table.column(name)[0, start:stop] for name in names}
    table.write(0, 1, rows, columns, table.embedding(0, start, stop).numpy())
    assert verify(run.path) == []
    found = deep(run, data(), sample=N)
    assert [(d.id, d.checkpoint, d.where) for d in found] == [(f"e{start + 2}", 0, "row")]
    assert "some rows" in meaning(found, N, 2)


# ---- repair


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
def test_what_is_damaged_is_computed_again_and_nothing_else(run, damage, computed):
    """Rows, columns, curvature, queries: the bytes are those of before."""
    before = without_cache(run.path)
    spoiled = [
        ("train/rows/c/1/2/0", ("train", 1, 2)),
        ("train/loss/c/0/3", ("train", 0, 3)),
        ("curvature/rows/c/0/1/0", ("curvature", 0, 1)),
        ("queries/q/embedding/c/1/0/0", ("queries/q", 1, 0)),
    ]
    for name, _ in spoiled:
        damage(run.path / name)
    done = repair(run, data(), {"q": asked()})
    assert done.after == [] and done.written == []
    assert sorted(done.computed) == sorted(place for _, place in spoiled)
    rows = sum(computed)
    assert rows == CHUNK + N % CHUNK + CHUNK + 4
    assert without_cache(run.path) == before
    assert repair(run, data(), {"q": asked()}).before == [] and sum(computed) == rows


def test_layout_and_bases_are_put_right_without_computing_rows(run, computed):
    before = without_cache(run.path)
    for name in (
        "train/id/c/0/0",
        "train/rows/zarr.json",
        "train/done/static.json",
        "curvature/weight/c/0",
        "queries/q/digest/zarr.json",
        "projection.npz",
    ):
        (run.path / name).unlink()
    left = run.path / "train/rows/c/0/0/0.tmp"
    left.write_bytes(b"half")
    done = repair(run, data(), {"q": asked()})
    assert done.after == [] and done.computed == [] and computed == []
    assert {"projection.npz", "train/rows/c/0/0/0.tmp"} <= set(done.written)
    assert without_cache(run.path) == before


@pytest.mark.parametrize("kind", ["kronecker", "two_stage"])
@pytest.mark.parametrize("dim", [13, 26, 34])
def test_bases_whose_sides_do_not_use_up_the_dimension_are_fitted_again(tmp_path, kind, dim):
    """By the layout of the rows: the dimension that was asked for is no longer known."""
    options = {"projection": kind, "proj_dim": dim, "progress": False}
    run = tda.index(make_task(), data(), tmp_path / "run", **options)
    before = without_cache(run.path)
    (run.path / "projection.npz").unlink()
    done = repair(run, data())
    assert done.after == [] and done.written == ["projection.npz"]
    assert without_cache(run.path) == before


def test_what_cannot_be_computed_is_left_and_said(run):
    flip(run.path / "queries/q/rows/c/0/0/0")
    flip(run.path / "train/rows/c/0/0/0")
    done = repair(run, data())
    assert [place[0] for place in done.computed] == ["train"]
    assert done.written == [] and done.after == [done.before[0]]
    assert done.after[0].path == "queries/q/rows/c/0/0/0" and done.after[0].kind == "altered"


def test_bases_of_other_data_are_not_taken(run):
    (run.path / "projection.npz").unlink()
    other = [{**e, "input": e["input"] * 2} for e in copy.deepcopy(data())]
    with pytest.raises(StoreError, match="cannot be fitted again"):
        repair(run, other)
