"""The store gives back what it was given or says what is wrong with it; nothing in between."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tda.data import Examples
from tda.errors import DataError, GradientError, MismatchError, StoreError
from tda.store import Store, Table, files
from tda.store.arrays import COLUMNS
from tda.store.encoding import decode_rows, encode_rows

N, K, H, CHUNK = 10, 6, 5, 4
DTYPES = ("bfloat16", "float32", "int8")
MANIFEST: dict[str, Any] = {
    "format": 1,
    "model": {"name": "net", "digest": "m"},
    "checkpoints": [
        {"name": "first", "step": 10, "learning_rate": 0.1, "digest": "a"},
        {"name": "second", "step": 20, "learning_rate": None, "digest": "b"},
    ],
    "measurement": {"name": "cross_entropy", "digest": "c", "has_margin": True},
    "projection": {"kind": "count_sketch", "dim": K, "seed": 0},
    "layers": [{"name": "fc", "offset": 0, "size": K}],
    "dtype": "bfloat16",
    "chunk_rows": CHUNK,
    "versions": {"torch": "2"},
}
FLOATS = st.floats(-(2.0**127), 2.0**127, width=32)
ODD_IDS = [
    "../../etc/passwd",
    "é/ü 日本 🙂",
    "a\0b",
    "<b>&\"'",
    "",
    ".",
    "CON",
    "x" * 40,
    "\n",
    "-rf",
]


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch):
    """What reaches the disk is tested by its order; waiting for the disk proves nothing here."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def examples(n: int = N) -> Examples:
    digests = np.random.default_rng(1).integers(0, 256, (100, 16), dtype=np.uint8)[:n]
    ids = np.array((ODD_IDS + [f"id{i}" for i in range(90)])[:n])
    columns = {
        "label": np.arange(n) % 3,
        "source": np.array([f"source {i % 2}" for i in range(n)]),
        "text": np.array(["text " * (i % 4) for i in range(n)]),
        "image": np.random.default_rng(2).integers(0, 256, (100, 3, 2), dtype=np.uint8)[:n],
    }
    return Examples(ids, digests, columns)


def values(checkpoint: int, start: int, stop: int) -> tuple[np.ndarray, dict, np.ndarray]:
    """What a featurizer would compute: a function of checkpoint and example alone."""
    draw = np.random.default_rng(checkpoint).normal(size=(100, K + H + len(COLUMNS)))
    draw = draw[start:stop].astype(np.float32)
    columns = {name: draw[:, K + H + i] for i, name in enumerate(COLUMNS)}
    return draw[:, :K], columns, draw[:, K : K + H]


def fill(table: Table, places: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
    """Compute and write ``places`` (by default what is missing); returns them."""
    done = table.missing() if places is None else list(places)
    for checkpoint, chunk in done:
        table.write(checkpoint, chunk, *values(checkpoint, *table.chunk_range(chunk)))
    return done


def build(path: Path, n: int = N, **changes: Any) -> Store:
    store = Store.create(path, {**copy.deepcopy(MANIFEST), **changes})
    fill(store.plan("train", examples(n), H))
    return store


def contents(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def read_everything(path: Path) -> None:
    """Every public read of a run."""
    store = Store.open(path)
    for name in ("train", *(f"queries/{query_set}" for query_set in store.queries())):
        table = store.table(name)
        for column in table.columns():
            table.column(column)
        for checkpoint in range(table.num_checkpoints):
            table.rows(checkpoint, 0, table.num_rows)
            table.embedding(checkpoint, 0, table.num_rows)


def age(path: Path) -> None:
    """Let every file look old: what has been checked is then not checked again while it is."""
    for file in path.rglob("*"):
        os.utime(file, ns=(0, 0))


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
    stored, scale = encode_rows(rows, "bfloat16")
    assert scale is None
    np.testing.assert_array_equal(stored, nearest)


@given(hnp.arrays(np.float32, (3, 4), elements=FLOATS))
@settings(max_examples=50, deadline=None)
def test_int8_is_within_half_a_step_and_zero_stays_zero(rows):
    stored, scale = encode_rows(rows, "int8")
    assert scale is not None and np.isfinite(scale).all()
    decoded = torch.empty(rows.shape)
    decode_rows(stored, scale, decoded)
    largest = abs(rows).max(axis=1, keepdims=True)
    assert (abs(decoded.numpy() - rows) <= largest * (1 + 1e-5) / 254 + 1.5e-36).all()
    assert (decoded.numpy()[rows == 0] == 0).all()


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

    def fail(path: Path, parts: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(files, "_write", fail)
    rows, columns, embedding = values(0, 0, CHUNK)
    with pytest.raises(StoreError, match="cannot write"):
        table.write(0, 0, rows + 1, columns, embedding)
    assert table.missing() == [(0, 0)]


# ---- damage

KINDS = [
    "manifest.json",
    "train/rows/c/1/2/0",
    "train/loss/c/0/0",
    "train/id/c/0/0",
    "train/digest/c/1/0",
    "train/image/c/0/0/0",
    "train/label/zarr.json",
    "train/done/static.json",
    "train/done/c1-0.json",
    "queries/q/rows/c/0/0/0",
    "queries/q/done/c0-0.json",
]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A finished run with a query set; copied by those who damage it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        store = build(tmp_path_factory.mktemp("sound") / "run")
        fill(store.plan("queries/q", examples(3), H))
    return store.path


@pytest.fixture(scope="module")
def longer(tmp_path_factory) -> Path:
    """The same run made at once with three more examples."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        return build(tmp_path_factory.mktemp("longer") / "run", n=13).path


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> dict[str, Table]:
    """By dtype: a run with nothing computed. Only for writes that are refused."""
    folder = tmp_path_factory.mktemp("planned")
    stores = {d: Store.create(folder / d, {**MANIFEST, "dtype": d}) for d in DTYPES}
    return {dtype: store.plan("train", examples(), H) for dtype, store in stores.items()}


def flip(path: Path, seed: int = 0) -> None:
    """Another byte at a random place."""
    chance = random.Random(seed)
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= chance.randrange(1, 256)
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flip": flip,
    "truncate": truncate,
    "delete": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", KINDS)
def test_damage_to_any_file_is_refused_found_and_mended(tmp_path, sound, name, damage):
    """Every read refuses; verify names it; verify and a rerun give back the same bytes."""
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    DAMAGES[damage](path / name)
    with pytest.raises(StoreError) as caught:
        read_everything(path)
    assert caught.value.do
    if name == "manifest.json":
        if damage == "delete":
            Store.create(path, MANIFEST).plan("train", examples(), H)
            assert contents(path) == contents(sound)
        return
    faults = Store.open(path).verify()
    assert name in {fault.path for fault in faults}
    expected = {
        "flip": {"altered"},
        "truncate": {"torn", "altered"},
        "delete": {"missing", "unmarked"},
    }
    assert {fault.kind for fault in faults} <= expected[damage]
    store = Store.create(path, MANIFEST)
    redone = fill(store.plan("train", examples(), H))
    redone += fill(store.plan("queries/q", examples(3), H))
    assert len(redone) <= 1, "more than the damaged chunk was computed again"
    assert contents(path) == contents(sound)
    assert store.verify() == []


@given(st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_verify_finds_every_altered_byte(sound, data):
    """Any byte of any file, any other value."""
    name = data.draw(st.sampled_from(sorted(contents(sound))))
    path = sound / name
    intact = path.read_bytes()
    place = data.draw(st.integers(0, len(intact) - 1))
    mask = data.draw(st.integers(1, 255))
    path.write_bytes(intact[:place] + bytes([intact[place] ^ mask]) + intact[place + 1 :])
    try:
        faults = Store(sound, MANIFEST).verify(withdraw=False)
    finally:
        path.write_bytes(intact)
    assert [fault.path for fault in faults] == [name]


def test_a_byte_altered_after_it_was_read_is_refused_too(tmp_path, sound):
    """A checked file is not checked again while it stays as it is – and is when it changes."""
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    age(path)
    table = Store.open(path).table("train")
    table.rows(0, 0, N)
    assert table._checked
    flip(path / "train/rows/c/0/1/0")
    with pytest.raises(StoreError, match="altered"):
        table.rows(0, 0, N)
    table.rows(0, 0, CHUNK)


def test_a_whole_chunk_in_the_place_of_another_is_refused(tmp_path, sound):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    shutil.copy(path / "train/rows/c/0/0/0", path / "train/rows/c/0/1/0")
    with pytest.raises(StoreError, match="altered"):
        Store.open(path).table("train").rows(0, CHUNK, N)


def test_an_error_of_reading_names_the_file_and_the_cure(tmp_path, sound):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    flip(path / "train/rows/c/0/1/0")
    with pytest.raises(StoreError) as caught:
        Store.open(path).table("train").gather(0, [5])
    assert caught.value.where == path / "train/rows/c/0/1/0"
    assert f"tda verify {path}" in str(caught.value) and "rerun `tda index`" in str(caught.value)


def test_verify_names_what_interrupted_writers_left_and_foreign_files(tmp_path, sound):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    left = ["manifest.json.tmp", "train/done/c0-0.json.tmp", "train/rows/c/0/0/0.tmp", "train/odd"]
    for name in left:
        (path / name).write_bytes(b"")
    (path / "cache").mkdir()
    (path / "cache/anything").write_bytes(b"")
    faults = Store.open(path).verify()
    assert sorted((fault.path, fault.kind) for fault in faults) == [
        (n, "unmarked") for n in sorted(left)
    ]


def test_verify_finds_an_altered_projection(tmp_path):
    digest = "cae66941d9efbd404e4d88758ea67670"  # blake2b, 16 bytes, of nothing
    projection = {**MANIFEST["projection"], "bases_digest": digest}
    store = build(tmp_path / "run", projection=projection)
    assert [fault.kind for fault in store.verify()] == ["missing"]
    (store.path / "projection.npz").write_bytes(b"")
    assert store.verify() == []
    (store.path / "projection.npz").write_bytes(b"x")
    assert [fault.kind for fault in store.verify()] == ["altered"]


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
    write = files._write

    def fail(target: Path, parts: Any) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt
        write(target, parts)

    monkeypatch.setattr(files, "_write", fail)
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
        ("checkpoints", lambda m: m["checkpoints"].pop()),
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


def test_a_finite_number_that_bfloat16_cannot_hold_is_refused(planned):
    table = planned["bfloat16"]
    rows, columns, embedding = copy.deepcopy(values(0, 0, CHUNK))
    rows[2, 0] = np.finfo(np.float32).max
    with pytest.raises(GradientError, match="too large for bfloat16"):
        table.write(0, 0, rows, columns, embedding)


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


# ---- the disk


@pytest.mark.parametrize("after", range(0, 42, 6))
def test_a_full_disk_is_told_and_costs_only_what_was_being_written(
    tmp_path, sound, monkeypatch, after
):
    path = tmp_path / "run"
    left = iter(range(after))
    write = files._write

    def full(target: Path, parts: Any) -> None:
        if next(left, None) is None:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(target, parts)

    monkeypatch.setattr(files, "_write", full)
    with pytest.raises(StoreError, match="disk is full") as caught:
        build(path)
    assert "free some space" in str(caught.value)
    monkeypatch.setattr(files, "_write", write)
    assert not [name for name in contents(path) if name.endswith(".tmp")] if path.exists() else True
    build(path)
    assert contents(path / "train") == contents(sound / "train")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_an_unwritable_folder_is_told(tmp_path, monkeypatch, code):
    def refuse(target: Path, parts: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(files, "_write", refuse)
    with pytest.raises(StoreError, match="cannot be written") as caught:
        Store.create(tmp_path / "run", MANIFEST)
    assert "may write" in str(caught.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError):
        Store.create(tmp_path / "file", MANIFEST)


def test_a_run_that_may_only_be_read_is_read_and_verified(tmp_path, sound, monkeypatch):
    path = tmp_path / "run"
    shutil.copytree(sound, path)
    flip(path / "train/rows/c/0/1/0")
    monkeypatch.setattr(os, "access", lambda *_: False)
    before = contents(path)
    faults = Store.open(path).verify()
    assert [fault.kind for fault in faults] == ["altered"]
    assert "make the folder writable" in faults[0].do
    assert contents(path) == before
