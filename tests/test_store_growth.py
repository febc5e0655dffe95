"""A run may grow, and only by what belongs to it; everything else is refused by name."""

from __future__ import annotations

import copy
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stored import (
    CHUNK,
    DTYPES,
    MANIFEST,
    ODD_IDS,
    H,
    K,
    N,
    build,
    contents,
    examples,
    fill,
    values,
)

from tda.errors import DataError, GradientError, MismatchError, StoreError
from tda.examples import Examples
from tda.store import Store, Table, local


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """The same run made at once with three more examples."""
    return build(tmp_path_factory.mktemp("longer") / "run", n=13).path


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, Table]:
    """By dtype: a run with nothing computed. Only for writes that are refused."""
    folder = tmp_path_factory.mktemp("planned")
    stores = {d: Store.create(folder / d, {**MANIFEST, "dtype": d}) for d in DTYPES}
    return {dtype: store.plan("train", examples(), H) for dtype, store in stores.items()}


# ---- growing


@pytest.mark.parametrize("n", [12, 17])
def test_appended_examples_leave_the_bytes_of_a_run_made_at_once(tmp_path, n):
    """Only chunks whose examples changed are computed; strings may be longer than before."""
    store = build(tmp_path / "grown")
    table = Store.create(store.path, MANIFEST).plan("train", examples(n), H)
    assert {chunk for _, chunk in fill(table)} == set(range(N // CHUNK, -(-n // CHUNK)))
    build(tmp_path / "once", n=n)
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")
    assert Store.open(store.path).verify() == []


@pytest.mark.parametrize("writes", range(0, 42, 6))
def test_an_append_interrupted_anywhere_is_continued(tmp_path, sound, longer, monkeypatch, writes):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    left = iter(range(writes))
    write = local._write

    def fail(target: Path, parts: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(target, parts)

    monkeypatch.setattr(local, "_write", fail)
    try:
        fill(Store.create(path, MANIFEST).plan("train", examples(13), H))
    except KeyboardInterrupt:
        interrupted = True
    else:
        interrupted = False
    monkeypatch.undo()
    assert interrupted
    store = Store.create(path, MANIFEST)
    other = examples(13)
    other.digests[0] += 1
    with pytest.raises(MismatchError):
        store.plan("train", other, H)
    fill(store.plan("train", examples(13), H))
    assert store.verify() == []
    shutil.rmtree(path / "queries")
    assert contents(path) == contents(longer)


def test_an_added_checkpoint_is_missing_everywhere_and_the_rest_is_kept(tmp_path):
    first, second = MANIFEST["checkpoints"]
    store = build(tmp_path / "grown", checkpoints=[first])
    fill(store.plan("queries/q", examples(3), H))
    before = contents(store.path / "train/rows/c")
    for _ in range(2):  # the second time it is there
        store.add_checkpoint(second)
    assert len(Store.open(store.path).manifest["checkpoints"]) == 2
    assert {fault.kind for fault in store.verify()} == {"missing"}
    assert store.table("train").missing() == [(1, 0), (1, 1), (1, 2)]
    assert store.table("queries/q").missing() == [(1, 0)]
    assert contents(store.path / "train/rows/c") == before
    assert torch.isfinite(store.table("train").rows(0, 0, N)).all()
    fill(store.table("train"))
    fill(store.table("queries/q"))
    fill(build(tmp_path / "once").plan("queries/q", examples(3), H))
    assert contents(tmp_path / "grown") == contents(tmp_path / "once")
    with pytest.raises(MismatchError, match="another checkpoint 'second'"):
        store.add_checkpoint({**second, "digest": "other"})


# ---- opened with something else


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("model.digest", lambda m: m["model"].update(digest="other")),
        ("checkpoints[1].digest", lambda m: m["checkpoints"][1].update(digest="other")),
        ("number of checkpoints", lambda m: m["checkpoints"].pop()),
        ("checkpoints[0].digest", lambda m: m["checkpoints"].pop(0)),
        ("measurement.name", lambda m: m["measurement"].update(name="other")),
        ("projection.dim", lambda m: m["projection"].update(dim=K + 1)),
        ("projection.seed", lambda m: m["projection"].update(seed=1)),
        ("projection.kind", lambda m: m["projection"].update(kind="identity")),
        ("layers", lambda m: m.pop("layers")),
        ("dtype", lambda m: m.update(dtype="int8")),
        ("chunk_rows", lambda m: m.update(chunk_rows=CHUNK + 1)),
    ],
)
def test_another_manifest_is_refused_by_the_name_of_its_first_other_field(sound, field, change):
    other = copy.deepcopy(MANIFEST)
    change(other)
    before = contents(sound)
    with pytest.raises(MismatchError) as caught:
        Store.create(sound, other)
    assert f"another {field}" in caught.value.what
    assert caught.value.do and "new folder" in caught.value.do
    assert contents(sound) == before


def test_other_versions_are_the_same_run(sound):
    assert Store.create(sound, {**MANIFEST, "versions": {"torch": "3"}}).queries() == ["q"]


def test_another_format_is_refused_with_a_note(tmp_path, sound):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    text = (path / "manifest.json").read_text().replace('"format": 1', '"format": 2')
    (path / "manifest.json").write_text(text)
    for open_run in (lambda: Store.open(path), lambda: Store.create(path, MANIFEST)):
        with pytest.raises(StoreError, match="format 2") as caught:
            open_run()
        assert caught.value.wanted == "format 1" and caught.value.do
    with pytest.raises(StoreError, match="format 3"):
        Store.create(tmp_path / "new", {**MANIFEST, "format": 3})


@pytest.mark.parametrize(
    ("index", "change"),
    [
        (4, lambda e: e.ids.__setitem__(4, "renamed")),
        (7, lambda e: e.digests.__setitem__((7, 3), 99)),
        (2, lambda e: e.columns["label"].__setitem__(2, 9)),
        (5, lambda e: e.columns["source"].__setitem__(5, "else")),
    ],
)
def test_other_data_are_refused_by_the_first_other_example(sound, index, change):
    other = examples()
    change(other)
    before = contents(sound)
    with pytest.raises(MismatchError) as caught:
        Store.open(sound).plan("train", other, H)
    assert f"example {index} is {str(other.ids[index])!r}" in str(caught.value.found)
    assert caught.value.do and "new folder" in caught.value.do
    assert contents(sound) == before


def test_fewer_examples_or_another_embedding_are_refused(sound):
    store = Store.open(sound)
    with pytest.raises(MismatchError, match=re.escape(repr(ODD_IDS[8]))):
        store.plan("train", examples(8), H)
    with pytest.raises(MismatchError, match="embedding"):
        store.plan("train", examples(), None)
    with pytest.raises(MismatchError, match="columns"):
        store.plan("train", Examples(examples().ids, examples().digests), H)
    with pytest.raises(MismatchError, match="new name"):
        store.plan("queries/q", examples(2), H)


# ---- what cannot be stored


@pytest.mark.parametrize("name", ["../x", "", ".hidden", "a/b", "a b", "é", "x" * 101, "a\n"])
def test_a_query_set_has_a_name_that_is_safe_as_a_folder(sound, name):
    store = Store.open(sound)
    for refused in (
        lambda: store.plan(f"queries/{name}", examples(), H),
        lambda: store.table(name),
    ):
        with pytest.raises(DataError, match="no name for a query set"):
            refused()


def test_a_table_that_is_not_there_is_named(tmp_path, sound):
    with pytest.raises(StoreError, match="no query set 'other'") as caught:
        Store.open(sound).table("queries/other")
    assert "q" in str(caught.value.found)
    with pytest.raises(StoreError, match="no run"):
        Store.open(tmp_path)
    with pytest.raises(StoreError, match="nothing is indexed"):
        Store.create(tmp_path / "new", MANIFEST).table("train")


def test_a_folder_that_is_no_run_is_not_written_to(tmp_path):
    (tmp_path / "data/train/cats").mkdir(parents=True)
    with pytest.raises(StoreError, match="no part of a run"):
        Store.create(tmp_path / "data", MANIFEST)
    assert contents(tmp_path) == {}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("place", "bad"),
    [("rows", np.nan), ("rows", -np.inf), ("loss", np.inf), ("p", np.inf), ("embedding", np.nan)],
)
def test_a_number_that_is_not_finite_is_refused_by_the_id_of_its_example(
    planned, dtype, place, bad
):
    rows, columns, embedding = copy.deepcopy(values(0, CHUNK, 2 * CHUNK))
    ({"rows": rows, "embedding": embedding} | columns)[place][1] = bad
    with pytest.raises(GradientError, match=re.escape(repr(ODD_IDS[CHUNK + 1]))):
        planned[dtype].write(0, 1, rows, columns, embedding)
    assert contents(planned[dtype].folder / "rows/c") == {}


def test_a_probability_may_be_undefined(tmp_path):
    table = Store.create(tmp_path / "run", MANIFEST).plan("train", examples(), H)
    rows, columns, embedding = values(0, 0, CHUNK)
    table.write(0, 0, rows, {**columns, "p": columns["p"] * np.nan}, embedding)
    assert table.missing()[0] == (0, 1)


@pytest.mark.parametrize("dtype", ["bfloat16", "int4", "ternary"])
def test_a_finite_number_that_bfloat16_cannot_hold_is_refused(planned, dtype):
    table = planned[dtype]
    rows, columns, embedding = copy.deepcopy(values(0, 0, CHUNK))
    rows[2, 0] = np.finfo(np.float32).max
    with pytest.raises(GradientError, match="too large for bfloat16"):
        table.write(0, 0, rows, columns, embedding)


@pytest.mark.parametrize(("number", "what"), [(np.nan, "not finite"), (np.inf, "too large")])
def test_an_embedding_that_comes_rounded_is_refused_for_what_it_is(planned, number, what):
    rows, columns, embedding = copy.deepcopy(values(0, 0, CHUNK))
    embedding[2, 0] = number
    with pytest.raises(GradientError, match=f"embedding of example.*{what}"):
        planned["bfloat16"].put(0, 0, rows, columns, torch.from_numpy(embedding).bfloat16())


def test_a_chunk_of_another_shape_is_refused(planned):
    table = planned["bfloat16"]
    rows, columns, embedding = values(0, 0, CHUNK)
    for given_chunk in (
        (rows[:-1], columns, embedding),
        (rows[:, :-1], columns, embedding),
        (rows, columns, None),
        (rows, {"loss": columns["loss"]}, embedding),
        (rows, {**columns, "other": columns["loss"]}, embedding),
    ):
        with pytest.raises(StoreError):
            table.write(0, 0, *given_chunk)
    with pytest.raises(IndexError):
        table.write(0, 3, rows, columns, embedding)
    assert len(table.missing()) == 6


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ids": np.array([], str), "digests": np.zeros((0, 16), np.uint8)}, "empty"),
        ({"ids": np.array(["a", "\ud800"])}, "not Unicode"),
        ({"columns": {"image": np.zeros((2, 3, 3), np.float32)}}, "'image' cannot be stored"),
        ({"columns": {"source": np.array([None, 1], object)}}, "'source' cannot be stored"),
        ({"columns": {"label": np.zeros(3)}}, "another length"),
        ({"columns": {"loss": np.zeros(2)}}, "needs"),
    ],
)
def test_data_that_cannot_be_stored_are_refused(tmp_path, change, says):
    parts = {"ids": np.array(["a", "b"]), "digests": np.zeros((2, 16), np.uint8), "columns": {}}
    store = Store.create(tmp_path / "run", MANIFEST)
    with pytest.raises(DataError, match=says):
        store.plan("train", Examples(**{**parts, **change}), None)
