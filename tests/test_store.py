"""The store gives back what it was given, in the format it says, and nothing unfinished."""

from __future__ import annotations

import errno
import itertools
import os
import pickle
import random
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from stored import (
    CHUNK,
    DTYPES,
    MANIFEST,
    H,
    N,
    age,
    build,
    contents,
    examples,
    fill,
    values,
)

from tda.errors import StoreError
from tda.examples import Examples
from tda.store import Store, files, local
from tda.store.arrays import COLUMNS
from tda.store.encoding import decode_rows, encode_rows, width
from tda.upkeep import _ROUNDING

FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)


# ---- what goes in comes out


@pytest.mark.parametrize("dtype", DTYPES)
def test_everything_written_is_read_back_within_the_bound_of_its_dtype(tmp_path, dtype):
    table = build(tmp_path / "run", dtype=dtype).table("train")
    for checkpoint in range(2):
        rows, columns, embedding = values(checkpoint, 0, N)
        read = table.rows(checkpoint, 0, N).numpy()
        bound = {
            "float32": 0 * rows,
            "bfloat16": 2.0**-8 * abs(rows),
            "int8": abs(rows).max(axis=1, keepdims=True) * (1 + 1e-5) / 254,
            "int4": abs(rows).max(axis=1, keepdims=True) / 13,  # K numbers are one block
            "ternary": abs(rows).max(axis=1, keepdims=True),
        }[dtype]
        assert read.dtype == np.float32
        assert (abs(read - rows) <= bound).all()
        close = abs(table.embedding(checkpoint, 0, N).numpy() - embedding)
        assert (close <= 2.0**-8 * abs(embedding)).all()
        for name in COLUMNS:
            np.testing.assert_array_equal(table.column(name)[checkpoint], columns[name])
    given_examples = examples()
    np.testing.assert_array_equal(table.column("id"), given_examples.ids)
    np.testing.assert_array_equal(table.column("digest"), given_examples.digests)
    for name, column in given_examples.columns.items():
        np.testing.assert_array_equal(table.column(name), column)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_range_and_any_gather_is_the_same_rows(tmp_path, dtype):
    table = build(tmp_path / "run", dtype=dtype).table("train")
    whole = table.rows(1, 0, N)
    for start in range(N + 1):
        for stop in range(start, N + 1):
            assert torch.equal(table.rows(1, start, stop), whole[start:stop])
    for indices in ([9, 0, 0, 5], [], list(range(N))[::-1], torch.tensor([4, 3])):
        assert torch.equal(table.gather(1, indices), whole[torch.as_tensor(indices).long()])


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_bfloat16_is_the_nearest_ties_to_even(rows):
    bits = rows.view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    stored, scale = encode_rows(torch.from_numpy(rows), "bfloat16")
    assert scale is None
    np.testing.assert_array_equal(stored, nearest)


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_int8_is_within_half_a_step_and_zero_stays_zero(rows):
    stored, scale = encode_rows(torch.from_numpy(rows), "int8")
    assert scale is not None and np.isfinite(scale).all()
    decoded = torch.empty(rows.shape)
    decode_rows(stored, "int8", scale, decoded)
    largest = abs(rows).max(axis=1, keepdims=True)
    assert (abs(decoded.numpy() - rows) <= largest * (1 + 1e-5) / 254 + 1.5e-36).all()
    assert (decoded.numpy()[rows == 0] == 0).all()


@given(hnp.arrays(np.float32, (3, 70), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_int4_is_within_half_a_step_of_its_block_and_comes_back_as_it_is(rows):
    """As a scalar loop over blocks of 32 decodes it; zero stays zero; once more changes nothing."""
    stored, scale = encode_rows(torch.from_numpy(rows), "int4")
    assert scale is None and stored.shape == (3, width(70, "int4")) == (3, 54)
    decoded = torch.empty(rows.shape)
    decode_rows(stored, "int4", None, decoded)
    for row, packed, found in zip(rows, stored, decoded.numpy(), strict=True):
        codes = [int(b) & 15 for b in packed[6:]] + [int(b) >> 4 for b in packed[6:]]
        for block in range(3):
            (step,) = struct.unpack("<f", b"\0\0" + packed[2 * block : 2 * block + 2].tobytes())
            own = slice(32 * block, 32 * block + 32)
            values = [(code - 16 * (code > 7)) * step for code in codes[own]]
            np.testing.assert_array_equal(found[own], np.float32(values[: len(found[own])]))
            most = abs(row[own]).max()
            assert (abs(found[own] - row[own]) <= most / 13 + 1e-35).all()
    assert (decoded.numpy()[rows == 0] == 0).all()
    np.testing.assert_array_equal(encode_rows(decoded, "int4")[0], stored)


@given(hnp.arrays(np.float32, (3, 90), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_ternary_comes_back_as_it_is(rows):
    """As a scalar loop over blocks of 80 decodes it; zero stays zero; once more changes nothing."""
    stored, scale = encode_rows(torch.from_numpy(rows), "ternary")
    assert scale is None and stored.shape == (3, width(90, "ternary")) == (3, 36)
    decoded = torch.empty(rows.shape)
    decode_rows(stored, "ternary", None, decoded)
    for packed, found in zip(stored, decoded.numpy(), strict=True):
        codes = [int(byte) // 3**i % 3 - 1 for byte in packed[4:] for i in range(5)]
        steps = [struct.unpack("<f", b"\0\0" + packed[at : at + 2].tobytes())[0] for at in (0, 2)]
        values = [code * steps[place // 80] for place, code in enumerate(codes)]
        np.testing.assert_array_equal(found, np.float32(values[:90]))
        assert not any(values[90:])
    assert (decoded.numpy()[rows == 0] == 0).all()
    np.testing.assert_array_equal(encode_rows(decoded, "ternary")[0], stored)
    x, found = (y.astype(np.float64)[:, :80] for y in (rows, decoded.numpy()))
    lost, kept = ((x - found) ** 2).sum(1), (found**2).sum(1)
    assert (lost <= _ROUNDING["ternary"] ** 2 * kept + 1e-68).all()


def test_ternary_loses_19_percent_of_normal_numbers_and_most_where_all_counts_keep_alike():
    """x_m = √m − √(m−1): the bound by which `tda verify --deep` tells a row from another."""
    normal = np.random.default_rng(0).normal(size=(500, 80))
    worst = np.diff(np.sqrt(np.arange(81)))[None]
    for x, lost_of_kept in ((normal, 0.186 / 0.814), (worst, 1.0932)):
        rows, decoded = torch.from_numpy(x).float(), torch.empty(x.shape)
        decode_rows(encode_rows(rows, "ternary")[0], "ternary", None, decoded)
        lost, kept = (rows - decoded).square().sum(), decoded.square().sum()
        assert float(lost / kept) == pytest.approx(lost_of_kept, rel=0.02)


@given(hnp.arrays(np.float32, (1, 6), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_ternary_rows_are_the_nearest_there_are(rows):
    """min ‖x − s·q‖² = ‖x‖² − max_q ⟨x, q⟩²/‖q‖² over all 3⁶ q, in float64; s is a bfloat16."""
    stored, _ = encode_rows(torch.from_numpy(rows), "ternary")
    decoded = torch.empty(rows.shape)
    decode_rows(stored, "ternary", None, decoded)
    x, codes = rows[0].astype(np.float64), np.array(list(itertools.product((-1, 0, 1), repeat=6)))
    square = np.maximum((codes**2).sum(1), 1)
    least = (x**2).sum() - ((codes @ x) ** 2 / square).max()
    found = ((x - decoded.numpy()[0].astype(np.float64)) ** 2).sum()
    assert found <= least + (2.0**-16 + 1e-6) * (x**2).sum() + 1e-68


def test_query_sets_are_float32_tables_beside_train_found_by_name(tmp_path):
    store = build(tmp_path / "run", dtype="int8")
    for name in ("test", "a-b_c.d"):
        fill(store.plan(f"queries/{name}", examples(3), H))
    assert Store.open(store.path).queries() == ["a-b_c.d", "test"]
    table = store.table("queries/test")
    assert (table.dtype, table.num_rows, table.num_chunks) == ("float32", 3, 1)
    np.testing.assert_array_equal(table.rows(0, 0, 3).numpy(), values(0, 0, 3)[0])
    assert store.verify() == []


def test_a_table_without_embedding_or_columns_says_so(tmp_path):
    store = Store.create(tmp_path / "run", MANIFEST)
    bare = Examples(examples().ids, examples().digests)
    table = store.plan("train", bare, None)
    assert set(table.columns()) == {"id", "digest", *COLUMNS}
    with pytest.raises(StoreError, match="no embedding"):
        table.embedding(0, 0, 1)
    with pytest.raises(StoreError, match="no column 'label'"):
        table.column("label")


def test_a_pickle_is_a_path_and_a_name_and_works_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = build(Path("run"))
    table = store.table("train")
    table.rows(0, 0, N)
    pickles = pickle.dumps(table), pickle.dumps(store)
    assert max(map(len, pickles)) < 500
    monkeypatch.chdir("/")
    assert torch.equal(
        pickle.loads(pickles[0]).rows(0, 0, N),
        table.__class__(tmp_path / "run", "train").rows(0, 0, N),
    )
    assert pickle.loads(pickles[1]).manifest == store.manifest


# ---- the format


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_format_page_alone_reads_a_run_with_plain_zarr(tmp_path, monkeypatch, dtype):
    store = build(tmp_path / "stores/digits", dtype=dtype)
    page = Path(__file__).parents[1].joinpath("stores/README.md").read_text()
    monkeypatch.chdir(tmp_path)
    reader: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(block, reader)
    table = store.table("train")
    for checkpoint in range(2):
        rows = torch.from_numpy(reader["numbers"]("rows", checkpoint))
        torch.testing.assert_close(rows, table.rows(checkpoint, 0, N), rtol=0, atol=0)
        np.testing.assert_array_equal(
            reader["numbers"]("loss", checkpoint), table.column("loss")[checkpoint]
        )
        embedding = torch.from_numpy(reader["numbers"]("embedding", checkpoint))
        assert torch.equal(embedding, table.embedding(checkpoint, 0, N))
    assert reader["ids"] == table.column("id").tolist()
    assert reader["strings"]("text") == table.column("text").tolist()
    np.testing.assert_array_equal(reader["table"]["image"][:], table.column("image"))


def test_zarr_sees_named_axes_and_writes_the_same_bytes(tmp_path):
    """Zarr's own writer, given the stored numbers, makes the same chunk files."""
    store = build(tmp_path / "run")
    group = zarr.open_group(store.path / "train", mode="r")
    assert {name for name, _ in group.arrays()} == set(store.table("train").specs)
    assert group["rows"].metadata.dimension_names == ("checkpoint", "train", "proj")
    before = contents(store.path / "train")
    shutil.copytree(store.path / "train", tmp_path / "copy")
    copied = zarr.open_group(tmp_path / "copy", mode="r+")
    for name, array in group.arrays():
        shutil.rmtree(tmp_path / "copy" / name / "c")
        copied[name].with_config({"write_empty_chunks": True})[...] = array[...]
    assert contents(tmp_path / "copy") == before


def test_a_checksum_over_a_file_that_ends_in_its_checksum_says_nothing(tmp_path):
    """Why a mark has the checksum of the numbers and not of the file."""
    store = build(tmp_path / "run")
    chunks = [p.read_bytes() for p in store.path.glob("train/*/c/**/*") if p.is_file()]
    assert {files.crc32c(chunk) for chunk in chunks} == {0x48674BC7}
    assert len({files.crc32c(chunk[:-4]) for chunk in chunks}) > 20


def test_the_bytes_do_not_depend_on_the_order_of_writing(tmp_path):
    whole = contents(build(tmp_path / "a").path)
    store = Store.create(tmp_path / "b", MANIFEST)
    table = store.plan("train", examples(), H)
    places = table.missing()
    random.Random(0).shuffle(places)
    fill(table, places[:3])
    resumed = Store.create(tmp_path / "b", MANIFEST).plan("train", examples(), H)
    fill(pickle.loads(pickle.dumps(resumed)), reversed(resumed.missing()))
    fill(resumed, places[:1])  # and once more, what is there already
    assert contents(tmp_path / "b") == whole


def test_a_finished_run_is_not_touched_by_planning_it_again(tmp_path):
    store = build(tmp_path / "run")
    age(store.path)
    again = Store.create(store.path, MANIFEST).plan("train", examples(), H)
    assert again.missing() == []
    assert {file.stat().st_mtime_ns for file in store.path.rglob("*")} == {0}


# ---- nothing unfinished is read


def test_nan_never_leaks_from_a_chunk_that_is_not_there(tmp_path):
    store = Store.create(tmp_path / "run", MANIFEST)
    table = store.plan("train", examples(), H)
    fill(table, [(0, 0), (1, 2)])
    assert torch.isfinite(table.rows(0, 0, CHUNK)).all()
    for read in (
        lambda: table.rows(0, 0, CHUNK + 1),
        lambda: table.rows(1, 0, 1),
        lambda: table.gather(0, [0, 9]),
        lambda: table.embedding(0, CHUNK, N),
        lambda: table.column("loss"),
        table.require_complete,
    ):
        with pytest.raises(StoreError, match="not computed yet") as caught:
            read()
        assert "tda index" in str(caught.value)
    assert len(table.missing()) == 4


def test_data_without_a_mark_are_not_data(tmp_path):
    """Killed between the files and the mark."""
    store = build(tmp_path / "run")
    (store.path / "train/done/c1-1.json").unlink()
    table = store.table("train")
    assert table.missing() == [(1, 1)]
    with pytest.raises(StoreError, match="chunk 1 of checkpoint 1"):
        table.rows(1, 0, N)
    assert [(f.path, f.kind) for f in store.verify()] == [("train/done/c1-1.json", "unmarked")]
    assert fill(table) == [(1, 1)]
    assert store.verify() == []


def test_everything_is_flushed_before_the_mark_appears(tmp_path, monkeypatch):
    store = Store.create(tmp_path / "run", MANIFEST)
    table = store.plan("train", examples(), H)
    events: list[tuple[str, str]] = []
    replace = Path.replace

    def flush(handle: int) -> None:
        events.append(("flush", os.readlink(f"/proc/self/fd/{handle}")))

    def rename(path: Path, target: Path) -> Path:
        events.append(("rename", str(target)))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(Path, "replace", rename)
    fill(table, [(0, 1)])
    mark = table.folder / "done/c0-1.json"
    marked = events.index(("rename", str(mark)))
    for key in table.keys(0, 1):
        path = table.folder / key
        flushed = events.index(("flush", f"{path}.tmp"))
        renamed = events.index(("rename", str(path)))
        folders = [events.index(("flush", str(above)), renamed) for above in path.parents[:2]]
        assert flushed < renamed < min(folders) and max(folders) < marked
    assert events.index(("flush", f"{mark}.tmp")) < marked
    assert ("flush", str(mark.parent)) in events[marked:]


def test_a_mark_never_stands_over_files_that_are_being_replaced(tmp_path, monkeypatch):
    store = build(tmp_path / "run")
    table = store.table("train")

    def fail(path: Path, *given: object) -> None:
        raise OSError(errno.EIO, "broken")

    rows, columns, embedding = values(0, 0, CHUNK)
    for where, name, missing in ((local, "_write", []), (Path, "replace", [(0, 0)])):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, fail)
            with pytest.raises(StoreError, match="cannot write"):
                table.write(0, 0, rows + 1, columns, embedding)
        assert table.missing() == missing
    assert not list(table.folder.rglob("*.tmp"))
