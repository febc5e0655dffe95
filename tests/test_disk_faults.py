"""A disk that is really full, and one that is really read-only: nothing finished is lost."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import stored

from tda.errors import StoreError
from tda.store import Store
from tda.store.lock import sole_writer

N = 30


@pytest.fixture
def disk(tmp_path) -> Iterator[tuple[Path, Callable[[str], None]]]:
    """A small file system of its own, and what mounts it again with other options."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a file system needs root")

    def again(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)

    yield folder, again
    subprocess.run(["umount", "-l", str(folder)], check=True)


def build(path: Path) -> Store:
    return stored.build(path, N, chunk_rows=1)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_full_disk_costs_the_chunk_being_written_and_no_other(disk, tmp_path):
    folder, again = disk
    path = folder / "run"
    for size in ("1m", "2m"):
        again(f"size={size}")
        with pytest.raises(StoreError, match="the disk is full") as caught:
            build(path)
        assert "free some space and run the same command again" in str(caught.value)
        assert not list(folder.rglob("*.tmp"))
    table = Store.open(path).table("train")
    finished = [place for place in table.places() if place not in table.missing()]
    assert finished
    again("size=8m")
    assert {fault.kind for fault in Store.open(path).verify()} <= {"missing", "unmarked"}
    for checkpoint, chunk in finished:
        table.rows(checkpoint, chunk, chunk + 1)
    before = contents(path)
    build(path)
    after = contents(path)
    assert all(after[key] == before[key] for key in before if "/c/" in key or "/done/c" in key)
    assert after == contents(build(tmp_path / "undisturbed").path)


def test_a_read_only_disk_is_read_and_a_write_is_refused(disk):
    folder, again = disk
    again("size=8m")
    store = build(folder / "run")
    again("ro")
    assert store.verify() == []
    assert store.table("train").rows(0, 0, N).shape == (N, stored.K)
    with (
        sole_writer(folder / "run"),  # nothing to keep apart
        pytest.raises(StoreError, match="cannot be written") as caught,
    ):
        stored.fill(store.table("train"), [(0, 0)])
    assert "may write" in str(caught.value)
    with pytest.raises(StoreError, match="cannot be written"):
        build(folder / "other")
    again("rw")
    assert store.verify() == []
