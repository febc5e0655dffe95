"""Damage and a failing disk: refused when read, found by verify, mended by a rerun."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from stored import (
    CHUNK,
    MANIFEST,
    H,
    N,
    age,
    build,
    contents,
    examples,
    fill,
    flip,
    read_everything,
    truncate,
)

from tda.errors import StoreError
from tda.store import Store, local

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
    assert table._reading._chunks._checked
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


# ---- the disk


@pytest.mark.parametrize("after", range(0, 42, 6))
def test_a_full_disk_is_told_and_costs_only_what_was_being_written(
    tmp_path, sound, monkeypatch, after
):
    path = tmp_path / "run"
    left = iter(range(after))
    write = local._write

    def full(target: Path, parts: Any) -> None:
        if next(left, None) is None:
            target.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(target, parts)

    monkeypatch.setattr(local, "_write", full)
    with pytest.raises(StoreError, match="disk is full") as caught:
        build(path)
    assert "free some space" in str(caught.value)
    monkeypatch.setattr(local, "_write", write)
    assert not [name for name in contents(path) if name.endswith(".tmp")] if path.exists() else True
    build(path)
    assert contents(path / "train") == contents(sound / "train")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS])
def test_an_unwritable_folder_is_told(tmp_path, monkeypatch, code):
    def refuse(target: Path, parts: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(local, "_write", refuse)
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
