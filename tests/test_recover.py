"""A chunk that a killed writer had put is finished and not computed again, if it is whole."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest
import torch
from stored import CHUNK, MANIFEST, H, N, build, contents, examples, fill, flip, truncate, values

import tda
from tda.errors import StoreError
from tda.examples import Examples
from tda.featurizer import Featurizer
from tda.store import Store, Table, local
from tda.store.manifest import rows_depend_on

OWN = ["", ".node7.json-123"]  # one writer, or a worker among others
PLACE = (1, 1)


class Killed(BaseException):
    """No handler of errors sees a kill -9."""


def planned(path: Path, given: Examples | None = None) -> Table:
    return Store.create(path, MANIFEST).plan("train", given or examples(), H)


def put(table: Table, place: tuple[int, int] = PLACE) -> Callable[[], None]:
    return table.put(*place, *values(place[0], *table.chunk_range(place[1])))


def unfinished(table: Table) -> list[Path]:
    return sorted(table.folder.rglob("*.tmp"))


@pytest.fixture(params=OWN)
def own(request, monkeypatch) -> str:
    monkeypatch.setattr(local, "_own", request.param)
    return request.param


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    return contents(build(tmp_path / "whole").path)


def resumed(path: Path, own: str, monkeypatch) -> Table:
    """The table in the hands of another process."""
    monkeypatch.setattr(local, "_own", "" if own else ".node8-5")
    return planned(path)


def test_what_was_put_is_nothing_to_a_reader_and_finished_by_who_goes_on(
    tmp_path, whole, own, monkeypatch
):
    table = planned(tmp_path / "run")
    put(table)
    assert len(table.missing()) == 6
    assert not table.is_finished(*PLACE)
    with pytest.raises(StoreError, match="not computed yet"):
        table.rows(PLACE[0], CHUNK, CHUNK + 1)
    left = {
        fault.path for fault in Store.open(tmp_path / "run").verify() if "left by" in fault.what
    }
    assert left == {path.relative_to(tmp_path / "run").as_posix() for path in unfinished(table)}
    table = resumed(tmp_path / "run", own, monkeypatch)
    assert table.recover() == 1
    assert PLACE not in table.missing()
    assert not unfinished(table)
    assert len(fill(table)) == 5
    assert contents(tmp_path / "run") == whole
    assert table.recover() == 0


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink])
@pytest.mark.parametrize("which", range(8))
def test_what_is_not_whole_is_computed_again(tmp_path, whole, damage, which):
    """Any file of a chunk, or its mark; a crash may have left zeros, too."""
    table = planned(tmp_path / "run")
    put(table)
    assert len(unfinished(table)) == 8
    damage(unfinished(table)[which])
    assert table.recover() == 0
    assert len(table.missing()) == 6
    assert not unfinished(table)
    fill(table)
    assert contents(tmp_path / "run") == whole


def test_killed_at_any_step_of_finishing_a_chunk_is_finished(tmp_path, whole, own, monkeypatch):
    """Before any file is flushed, renamed or removed; and over a chunk that was damaged."""
    for last in itertools.count():
        path = tmp_path / f"run{last}"
        shutil.copytree(tmp_path / "whole", path)
        table = planned(path)
        (table.folder / "rows/c/1/1/0").unlink()
        finish = put(table)
        steps = iter(range(last))

        def then_killed(action: Callable, steps: Iterator[int] = steps) -> Callable:
            def acting(*given: Any, **more: Any) -> Any:
                if next(steps, None) is None:
                    raise Killed
                return action(*given, **more)

            return acting

        with monkeypatch.context() as patch:
            patch.setattr(local, "_flush", then_killed(local._flush))
            patch.setattr(Path, "replace", then_killed(Path.replace))
            patch.setattr(Path, "unlink", then_killed(Path.unlink))
            try:
                finish()
            except Killed:
                pass
            else:
                break
        table = resumed(path, own, monkeypatch)
        table.recover()
        assert table.missing() == []
        assert contents(path) == whole
    assert last > 20


def moved(left: list[Path], name: Callable[[Path], Path]) -> None:
    for path in left:
        name(path).parent.mkdir(parents=True, exist_ok=True)
        path.rename(name(path))


def test_a_chunk_of_other_data_or_of_another_place_is_not_finished(tmp_path):
    table = planned(tmp_path / "run")
    put(table)
    moved(unfinished(table), lambda p: Path(str(p).replace("c1-1", "c0-1").replace("/1/1", "/0/1")))
    assert len(unfinished(table)) == 8
    assert table.recover() == 0
    other = examples()
    other.digests[CHUNK] += 1
    theirs = planned(tmp_path / "other", other)
    put(table)
    moved(unfinished(table), lambda path: theirs.folder / path.relative_to(table.folder))
    assert len(unfinished(theirs)) == 8
    assert theirs.recover() == 0
    assert len(theirs.missing()) == 6
    assert not unfinished(theirs)


def test_two_workers_leave_a_chunk_and_one_of_them_is_whole(tmp_path, whole, monkeypatch):
    table = planned(tmp_path / "run")
    for name in (".node1-1", ".node2-2", ".node3-3"):
        monkeypatch.setattr(local, "_own", name)
        put(table)
    for name in (".node1-1", ".node3-3"):
        flip(table.folder / f"rows/c/1/1/0{name}.tmp")
    monkeypatch.setattr(local, "_own", "")
    assert table.recover() == 1
    fill(table)
    assert contents(tmp_path / "run") == whole


def test_indexing_killed_while_it_writes_computes_nothing_again(tmp_path, monkeypatch):
    """One chunk is being flushed, the next is put, and then the power of the process is gone."""
    torch.manual_seed(0)
    task = tda.Task(torch.nn.Linear(4, 3), measurement="cross_entropy")
    data = torch.randn(20, 4), torch.arange(20) % 3
    featurize, finish, computed = Featurizer.start, local.finish, [0]

    def index(name: str) -> dict[str, bytes]:
        run = tda.index(
            task, data, tmp_path / name, batch_size=4, chunk_rows=4, proj_dim=8, progress=False
        )
        return contents(run.path)

    def counted(*given: Any, **more: Any) -> Any:
        computed[0] += 1
        return featurize(*given, **more)

    def killed(top: Path, stages: Any) -> None:
        if any(path.name == "c0-1.json" for path in stages[-1]):
            raise Killed
        finish(top, stages)

    undisturbed = index("undisturbed")
    monkeypatch.setattr(Featurizer, "start", counted)
    with monkeypatch.context() as patch:
        patch.setattr(local, "finish", killed)
        with pytest.raises(Killed):
            index("run")
    assert computed == [3]
    assert index("run") == undisturbed
    assert computed == [5]


def test_the_configuration_of_a_chunk_is_the_hash_of_its_json(tmp_path):
    table = build(tmp_path / "run").table("train")
    own = {"dtype": "bfloat16", "dim": table.dim, "hidden": H, "chunk_rows": CHUNK}
    digests = examples().digests
    for checkpoint, chunk in table.places():
        start, stop = table.chunk_range(chunk)
        content = blake2b(digests[start:stop].tobytes(), digest_size=16).hexdigest()
        parts = {**rows_depend_on(table.manifest, checkpoint), **own}
        text = json.dumps(
            {**parts, "rows": [start, stop], "examples": content}, sort_keys=True, indent=1
        )
        mark = table.mark(checkpoint, chunk)
        assert mark is not None
        assert mark.config == blake2b(f"{text}\n".encode(), digest_size=16).hexdigest()
    assert stop == N
