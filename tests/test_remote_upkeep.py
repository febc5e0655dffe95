"""Whatever is done to a run in a folder can be done to one in object storage: the same bytes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from object_storage import Server, Wire
from test_object_storage import contents
from test_upkeep import CHUNK, asked, data, make_task

import tda
from tda.errors import StoreError, TdaError, UnreachableError
from tda.growing import compact, relabel
from tda.repair import repair
from tda.store import Table, remote
from tda.store.files import Place, as_place, list_files, read_file, write_file

OPTIONS: dict[str, Any] = {"proj_dim": 16, "dtype": "float32", "progress": False}


def index(place: str | Place, examples: list[dict[str, Any]] | None = None) -> tda.Run:
    examples = examples or data()
    run = tda.index(make_task(), examples, place, chunk_rows=CHUNK, **OPTIONS)
    run.add_queries(asked(), "q")
    return run


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return index(tmp_path_factory.mktemp("near") / "run").path  # type: ignore[return-value]


def bytes_of(place: Place) -> dict[str, bytes | None]:
    return {key: b for key, b in contents(place).items() if not key.startswith("cache/")}


def test_exactly_what_is_damaged_is_repaired(url: str, near: Path) -> None:
    run = index(url)
    wanted = bytes_of(near)
    assert bytes_of(run.path) == wanted
    flipped, torn = "train/rows/c/0/1/0", "queries/q/loss/c/1/0"
    write_file(run.path / flipped, b"!" + (read_file(run.path / flipped) or b"")[1:])
    write_file(run.path / torn, (read_file(run.path / torn) or b"")[:-1])
    for gone in ("train/done/c1-2.json", "train/id/c/0/0", "train/zarr.json"):
        remote.remove(run.path / gone)
    done = repair(run, data(), {"q": asked()})
    assert {("train", 0, 1), ("train", 1, 2), ("queries/q", 1, 0)} == set(done.computed)
    assert done.after == [] and bytes_of(run.path) == wanted


def test_a_changed_training_set(url: str, tmp_path: Path) -> None:
    far, here = index(url), index(tmp_path / "run")
    for run in (far, here):
        run.delete(["e2", "e9"])
        relabel(run, data(relabelled=7))
        run.restore(["e2"])
    assert bytes_of(far.path) == bytes_of(here.path)
    store = compact(far.path, f"{url}-compacted")
    assert bytes_of(store.path) == bytes_of(compact(here.path, tmp_path / "compacted").path)
    scores = [
        tda.open(path).scores("q", recipe="trak").compute() for path in (store.path, here.path)
    ]
    np.testing.assert_allclose(*scores, rtol=1e-5)


@pytest.mark.slow
def test_workers_write_it_together(url: str, near: Path) -> None:
    with tda.Cluster(workers=2).open():
        run = index(url)
    assert bytes_of(run.path) == bytes_of(near)
    assert run.verify() == []


# ---- a storage that goes away


@pytest.fixture
def wire(s3: Server, url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Wire]:
    one = Wire(s3)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{one.port}")
    yield one
    one.close()


def at_chunk(monkeypatch: pytest.MonkeyPatch, number: int, do: Any) -> None:
    """Before the chunk of that number is written."""
    put, left = Table.put, [number]

    def counted(self: Table, *what: Any) -> Callable[[], None]:
        if left[0] == 0:
            do()
        left[0] -= 1
        return put(self, *what)

    monkeypatch.setattr(Table, "put", counted)


def test_an_interruption_is_waited_for(
    url: str, near: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the retries there are: the command that meets it goes on as if nothing had been."""

    def away() -> None:
        wire.cut()
        threading.Timer(1.0, wire.mend).start()

    at_chunk(monkeypatch, 3, away)
    started = time.monotonic()
    run = index(url)
    assert time.monotonic() - started > 1
    assert bytes_of(run.path) == bytes_of(near)


def test_a_storage_that_comes_back_empty_is_noticed(
    url: str, near: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed and started again while a run is written, which is half gone: that is no run."""
    server = Server()
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)

    def lost() -> None:
        server.kill()
        server.start()

    try:
        with monkeypatch.context() as patch:
            at_chunk(patch, 4, lost)
            with pytest.raises(TdaError) as caught:
                index(url)
        assert caught.value.where is not None
        with pytest.raises(StoreError, match="no part of a run"):
            index(url)
        remote.remove_tree(as_place(url))
        run = index(url)
        assert bytes_of(run.path) == bytes_of(near)
        assert run.verify() == []
    finally:
        server.kill()


def test_one_that_stays_away_is_told_and_the_same_command_goes_on(
    url: str, near: Path, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick: Any = {"max_retries": 2, "retry_timeout": timedelta(seconds=1)}
    with monkeypatch.context() as patch:
        patch.setattr(remote, "_RETRY", quick)
        remote._connected.cache_clear()
        at_chunk(patch, 3, wire.cut)
        with pytest.raises(UnreachableError, match="run the same command again"):
            index(url)
    remote._connected.cache_clear()
    wire.mend()
    marks = [key for key in list_files(as_place(url)) if key.startswith("train/done/c")]
    assert len(marks) == 3
    assert bytes_of(index(url).path) == bytes_of(near)
