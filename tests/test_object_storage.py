"""A run in object storage is the run on a disk: same bytes, same answers, same refusals.

Against a real S3 server (moto's) on this machine.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stored
import torch
from object_storage import SECRETS, Wire

from tda.decisions import Marks
from tda.errors import ConfigError, StoreError, UnreachableError
from tda.store import Store, Table, kept, remote
from tda.store.files import (
    Place,
    Remote,
    as_place,
    crc32c,
    list_files,
    read_file,
    write_file,
)
from tda.store.remote import traffic

ARRAYS = 7  # with a checkpoint axis: rows, five columns, embedding


@pytest.fixture(autouse=True)
def _storage(url) -> None:
    """Credentials and a cache of its own for every test."""


@pytest.fixture
def far(url) -> Store:
    return stored.build(as_place(url))


@pytest.fixture
def near(tmp_path) -> Store:
    return stored.build(tmp_path / "near")


def contents(place: Place) -> dict[str, bytes | None]:
    """What lies there, not what is kept of it here."""
    if isinstance(place, Path):
        return {key: (place / key).read_bytes() for key in list_files(place)}
    answers = ((key, remote.get(place / key)) for key in list_files(place))
    return {key: None if found is None else bytes(found[0]) for key, found in answers}


def asked(before: Counter[str]) -> Counter[str]:
    return traffic - before


def forget(tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "kept", ignore_errors=True)


# ---- the same run


def test_a_run_in_object_storage_is_byte_for_byte_the_run_on_a_disk(far, near):
    assert contents(far.path) == contents(near.path)
    assert far.verify() == []


def test_what_is_read_is_what_a_disk_holds(far, near):
    there, here = far.table("train"), near.table("train")
    assert there.missing() == []
    for checkpoint in range(2):
        np.testing.assert_array_equal(there.rows(checkpoint, 1, 9), here.rows(checkpoint, 1, 9))
        picked = [9, 0, 3, 3]
        np.testing.assert_array_equal(
            there.gather(checkpoint, picked), here.gather(checkpoint, picked)
        )
    for name in here.columns():
        np.testing.assert_array_equal(there.column(name), here.column(name))
    np.testing.assert_array_equal(there.entries("text", [3, 1]), here.entries("text", [3, 1]))


def test_a_run_may_grow_there(url, tmp_path):
    short, long = stored.examples(6), stored.examples(13)
    for place in (as_place(url), tmp_path / "near"):
        store = Store.create(place, stored.MANIFEST)
        stored.fill(store.plan("train", short, stored.H))
        stored.fill(Store.open(place).plan("train", long, stored.H))
        stored.fill(store.plan("queries/q", stored.examples(3), stored.H))
    assert contents(as_place(url)) == contents(tmp_path / "near")
    assert Store.open(as_place(url)).queries() == ["q"]


def test_tables_pickle_as_their_place_and_without_secrets(far):
    data = pickle.dumps([far, far.table("train")])
    again, table = pickle.loads(data)
    assert str(again.path) == str(far.path)
    assert table.rows(0, 0, 1).shape == (1, stored.K)
    assert not [secret for secret in SECRETS.values() if secret.encode() in data]


def test_plain_zarr_reads_it_by_the_specification(far, near, monkeypatch):
    """By the blocks of stores/README.md: the first, then the one that opens the table elsewhere."""
    root = Path(__file__).parents[1]
    page = (root / "stores/README.md").read_text(encoding="utf-8")
    monkeypatch.chdir(root)
    reader: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)[0], reader)
    block = re.findall(r"```py\n(.*?)```", page, flags=re.DOTALL)[0]
    exec(block.replace("s3://bucket/runs/digits", str(far.path)), reader)
    for checkpoint in range(2):
        wanted = near.table("train").rows(checkpoint, 0, stored.N).numpy()
        np.testing.assert_array_equal(reader["numbers"]("rows", checkpoint), wanted)
    assert reader["strings"]("id") == near.table("train").column("id").tolist()


def test_the_profile_in_stores_can_be_read():
    place = as_place(str(Path(__file__).parents[1] / "stores/minio.toml/digits"))
    assert str(place) == "s3://runs/tda/digits"


# ---- what it costs


def test_a_chunk_costs_its_files_a_mark_and_the_mark_taken_back(url):
    store = Store.create(as_place(url), stored.MANIFEST)
    table = store.plan("train", stored.examples(), stored.H)
    table.column("digest"), table.column("id")
    before = Counter(traffic)
    for chunk in range(2):
        table.write(0, chunk, *stored.values(0, *table.chunk_range(chunk)))
    spent = asked(before)
    assert spent["PUT"] == 2 * (ARRAYS + 1)
    assert spent["DELETE"] == 2
    assert spent["GET"] == spent["HEAD"] == spent["LIST"] == 0


def test_a_second_reader_downloads_nothing(far, tmp_path):
    def read() -> Counter[str]:
        before = Counter(traffic)
        table = Store.open(far.path).table("train")
        table.require_complete()
        table.rows(0, 0, stored.N), table.rows(1, 0, stored.N), table.column("loss")
        return asked(before)

    forget(tmp_path)
    first, second = read(), read()
    assert first["GET"] > 10
    assert second["GET"] == second["down"] == second["PUT"] == 0
    assert second["LIST"] <= 3 and second["HEAD"] <= 4
    stored.fill(Table(far.path, "train"), [(1, 0)])  # the same bytes, put again
    assert read()["down"] < 3000  # the mark alone is new


def test_one_row_is_not_paid_with_a_chunk(url, tmp_path):
    changes = {"chunk_rows": 64, "projection": {"kind": "count_sketch", "dim": 4096, "seed": 0}}
    store = Store.create(as_place(url), {**stored.MANIFEST, **changes})
    table = store.plan("train", stored.examples(64), None)
    rows = np.random.default_rng(0).normal(size=(64, 4096)).astype(np.float32)
    columns = stored.values(0, 0, 64)[1]
    table.write(0, 0, rows, columns)
    forget(tmp_path)
    table = store.table("train")
    table._reading.marks_at_first  # noqa: B018
    before = Counter(traffic)
    found = table.gather(0, [40, 3, 41]).numpy()
    spent = asked(before)
    np.testing.assert_allclose(found, rows[[40, 3, 41]], rtol=2**-8)
    assert spent["GET"] == 3 and spent["LIST"] == spent["HEAD"] == 0
    assert spent["down"] == 3 * 4096 * 2 + 4
    before = Counter(traffic)
    table.gather(0, [40])
    assert asked(before) == {"GET": 1, "down": 4096 * 2}  # the rest was checked above
    table.rows(0, 0, 64)
    before = Counter(traffic)
    table.gather(0, [5])
    assert not asked(before)


@pytest.mark.parametrize("kind", ["torn", "other", "gone"])
def test_a_row_of_another_file_than_was_marked_is_refused(url, tmp_path, kind):
    changes = {"chunk_rows": 64, "projection": {"kind": "count_sketch", "dim": 4096, "seed": 0}}
    store = Store.create(as_place(url), {**stored.MANIFEST, **changes})
    table = store.plan("train", stored.examples(64), None)
    columns = stored.values(0, 0, 64)[1]
    table.write(0, 0, np.ones((64, 4096), np.float32), columns)
    key = "train/rows/c/0/0/0"
    data = bytearray(read_file(store.path / key) or b"")
    if kind == "gone":
        remote.remove(store.path / key)
    elif kind == "torn":
        write_file(store.path / key, bytes(data[:-8]))
    else:  # whole and sound in itself, as of another run
        other = bytes(len(data) - 4)
        write_file(store.path / key, other + crc32c(other).to_bytes(4, "little"))
    forget(tmp_path)
    with pytest.raises(StoreError, match=r"missing|torn|altered"):
        store.table("train").gather(0, [5])


def test_copies_are_bounded_and_a_damaged_one_is_fetched_again(far, tmp_path, monkeypatch):
    forget(tmp_path)
    wanted = far.table("train").rows(0, 0, 4)
    copies = [path for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    for path in copies:
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    np.testing.assert_array_equal(far.table("train").rows(0, 0, 4), wanted)
    assert far.table("train").missing() == []
    monkeypatch.setenv("TDA_CACHE_GB", "0.000002")
    monkeypatch.setattr(kept, "_unscanned", float("inf"))
    for checkpoint in range(2):
        far.table("train").rows(checkpoint, 0, stored.N)
    sizes = [path.stat().st_size for path in (tmp_path / "kept").rglob("*") if path.is_file()]
    assert sum(sizes) < 3000


def test_an_append_puts_only_what_is_new(url):
    store = Store.create(as_place(url), stored.MANIFEST)
    store.plan("train", stored.examples(60), stored.H)
    documents = len([key for key in list_files(as_place(url) / "train") if "zarr.json" in key])
    before = Counter(traffic)
    store.plan("train", stored.examples(64), stored.H)
    columns = 7  # id, digests, label, source, text, image: a chunk of four rows each
    assert asked(before)["PUT"] == columns + documents + 2  # the mark and the manifest


def test_who_reads_on_finds_the_next_chunks_here(url, tmp_path):
    store = Store.create(as_place(url), stored.MANIFEST)
    stored.fill(store.plan("train", stored.examples(60), stored.H))
    forget(tmp_path)
    table = store.table("train")
    before = Counter(traffic)
    whole = torch.cat([table.rows(0, start, start + 4) for start in range(0, 60, 4)])
    # Each chunk once; the marks of both checkpoints, and the digests they are compared with.
    assert asked(before)["GET"] == 15 + 2 * 15 + 15
    assert torch.equal(whole, table.rows(0, 0, 60))


# ---- faults


@pytest.mark.parametrize("kind", ["missing", "torn", "altered"])
def test_damage_is_found_by_verify_and_by_the_read(far, near, tmp_path, kind):
    key = "train/rows/c/0/1/0"
    data = read_file(near.path / key)
    changed = {"missing": None, "torn": data[:-1], "altered": b"!" + data[1:]}[kind]
    if changed is None:
        remote.remove(far.path / key)
    else:
        write_file(far.path / key, changed)
    forget(tmp_path)
    table = far.table("train")
    with pytest.raises(StoreError, match=kind):
        table.rows(0, 4, 8)
    assert [(fault.path, fault.kind) for fault in far.verify()] == [(key, kind)]
    assert stored.fill(Table(far.path, "train")) == [(0, 1)]
    assert contents(far.path) == contents(near.path)


def test_two_writers_of_a_chunk_are_one_and_other_content_is_refused(far, near):
    table = Table(far.path, "train")
    threads = [
        threading.Thread(target=table.write, args=(0, 0, *stored.values(0, 0, 4))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(far.path) == contents(near.path)
    from tda.store.files import create_file

    create_file(far.path / "once", b"one")
    create_file(far.path / "once", b"one")
    with pytest.raises(StoreError, match="another process"):
        create_file(far.path / "once", b"other")


@pytest.fixture
def wire(s3, monkeypatch) -> Iterator[Wire]:
    one = Wire(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.port}")
    quick: Any = {"max_retries": 1, "retry_timeout": timedelta(seconds=1)}
    monkeypatch.setattr(remote, "_RETRY", quick)
    yield one
    one.close()


@pytest.mark.parametrize("packets", [7, 25, 60])
def test_a_network_that_is_cut_loses_nothing(url, near, wire, packets):
    def build() -> Store:
        return stored.build(as_place(url))

    wire.cut(after=packets)
    with pytest.raises(UnreachableError) as caught:
        build()
    assert "run the same command again" in str(caught.value)
    assert not [secret for secret in SECRETS.values() if secret in str(caught.value)]
    wire.mend()
    finished = len([key for key in list_files(as_place(url)) if "/done/c" in key])
    store = build()
    assert contents(store.path) == contents(near.path)
    assert finished <= 6


def test_a_network_that_is_cut_is_no_damage(far, wire):
    table = far.table("train")
    wire.cut()
    for doing in (far.verify, lambda: Store.open(far.path), table.missing):
        with pytest.raises(UnreachableError):
            doing()
    wire.mend()
    assert far.verify() == []


@pytest.mark.parametrize("status", [500, 503])
def test_a_storage_that_answers_slow_down_is_asked_again(near, s3, url, status):
    s3.answer(status, 6)
    store = stored.build(as_place(url))
    assert contents(store.path) == contents(near.path)


def test_no_access_says_so_and_nothing_secret(s3, url):
    s3.answer(403, 1)
    with pytest.raises(UnreachableError, match="refuses access") as caught:
        Store.open(as_place(url))
    assert "AWS_ACCESS_KEY_ID" in caught.value.do
    assert caught.value.__cause__ is None
    assert not [secret for secret in SECRETS.values() if secret in str(caught.value)]


def test_what_an_error_quotes_is_cleared_of_secrets():
    text = (
        f"403 for https://b/x?X-Amz-Credential={SECRETS['AWS_ACCESS_KEY_ID']}%2Fus&X-Amz-Signature"
        f"=abc123 <?xml?><Error><Code>SignatureDoesNotMatch</Code><StringToSign>"
        f"{SECRETS['AWS_SECRET_ACCESS_KEY']}</StringToSign></Error>"
    )
    said = remote.error_said(RuntimeError(text))
    assert "403" in said and "(SignatureDoesNotMatch)" in said
    assert not [part for part in (*SECRETS.values(), "abc123") if part in said]


def test_no_secret_is_stored_anywhere(far, tmp_path):
    far.table("train").rows(0, 0, 4)
    kept_here = [p.read_bytes() for p in (tmp_path / "kept").rglob("*") if p.is_file()]
    everything = b"".join([*filter(None, contents(far.path).values()), *kept_here])
    assert not [secret for secret in SECRETS.values() if secret.encode() in everything]


def test_a_bucket_that_is_not_there_is_told():
    with pytest.raises(UnreachableError, match="no such bucket"):
        stored.build(as_place("s3://nowhere/run"))
    with pytest.raises(StoreError, match="there is no run"):
        Store.open(as_place("s3://bucket/nothing/here"))


# ---- places


@pytest.mark.parametrize(
    "bad",
    ["s3://", "s3://bucket", "s3://bucket/../x", "s3://key:secret@bucket/run", "s3://bucket/r?x=1"],
)
def test_a_place_is_a_bucket_and_a_prefix(bad):
    with pytest.raises(ConfigError) as caught:
        as_place(bad)
    assert "secret@" not in str(caught.value)


def test_a_storage_profile_names_a_place(far, tmp_path, s3, monkeypatch):
    file = tmp_path / "lab.toml"
    bucket, _, rest = str(far.path).rpartition("/")
    options = {"endpoint": s3.url, "allow_http": True, "region": "us-east-1"}
    lines = [f"{name} = {json.dumps(value)}" for name, value in options.items()]
    file.write_text(f'url = "{bucket}"\n[options]\n' + "\n".join(lines))
    for name in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP", "AWS_REGION"):
        monkeypatch.delenv(name)
    place = as_place(f"{file}/{rest}")
    assert isinstance(place, Remote)
    assert Store.open(place).verify() == []
    assert pickle.loads(pickle.dumps(Store.open(place))).table("train").num_rows == stored.N
    file.write_text(f'url = "{tmp_path}"')
    assert as_place(f"{file}/run") == tmp_path / "run"
    file.write_text('url = "s3://bucket/x"\n[options]\nsecret_access_key = "hush"')
    with pytest.raises(ConfigError, match="no secrets") as caught:
        as_place(f"{file}/run")
    assert "hush" not in str(caught.value)


def test_decisions_of_many_readers_are_kept(far):
    readers = [Marks(far.path) for _ in range(3)]
    threads = [
        threading.Thread(target=each.set, args=(f"id{i}", "remove", None, ""))
        for i, each in enumerate(readers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(Marks(far.path).all()) == {"id0", "id1", "id2"}
    assert [mark.revision for mark in Marks(far.path).all().values()] == [1, 2, 3]
