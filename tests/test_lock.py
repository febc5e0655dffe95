"""One process at a time writes a run; whoever died holds nothing, whoever lives loses nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tda.errors import StoreError
from tda.store import lock, remote
from tda.store.files import Place, Remote, as_place, read_file, stat_file, write_file
from tda.store.lock import Holder, sole_writer, waiting

NAME = "cache/writer"
_HOLD = """
import sys
from tda.store.files import as_place
from tda.store.lock import sole_writer
with sole_writer(as_place(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch) -> None:
    for name, seconds in {"BEAT": 0.1, "LEASE": 1.0, "_POLL": 0.05}.items():
        monkeypatch.setattr(lock, name, seconds)


@pytest.fixture(params=["folder", "bucket"])
def run(request, tmp_path) -> Place:
    if request.param == "folder":
        return tmp_path / "run"
    return as_place(request.getfixturevalue("url"))


def put(run: Place, holder: Holder) -> None:
    """As another machine does it: in place."""
    if isinstance(run, Remote):
        write_file(run / NAME, holder.to_bytes())
    else:
        (run / NAME).parent.mkdir(parents=True, exist_ok=True)
        with (run / NAME).open("r+b" if (run / NAME).exists() else "wb") as file:
            file.write(holder.to_bytes().ljust(1024))


def elsewhere(beat: int = 0) -> Holder:
    """A holder on another machine, whose clock is wrong by thirty years."""
    me = Holder.me()
    return replace(me, host="node7", machine="another", since="1996-01-01T00:00:00", beat=beat)


def test_the_second_is_refused_with_the_name_of_the_first_until_that_is_killed(run):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", _HOLD, str(run)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            with pytest.raises(StoreError) as caught, sole_writer(run):
                pass
            assert f"process {process.pid} on {os.uname().nodename}, since 2" in str(caught.value)
            assert "--wait" in caught.value.do
        finally:
            process.kill()
    started = time.monotonic()
    with sole_writer(run):
        holder = Holder.parse(read_file(run / NAME))
        assert holder is not None and holder.process == os.getpid()
    assert time.monotonic() - started < lock.LEASE


def test_waiting_goes_on_when_the_first_is_done(run, capsys):
    order: list[str] = []

    def second() -> None:
        with waiting(), sole_writer(run):
            order.append("second")

    thread = threading.Thread(target=second)
    with sole_writer(run):
        thread.start()
        time.sleep(0.5)
        order.append("first")
    thread.join(20)
    assert order == ["first", "second"]
    assert f"waiting for process {os.getpid()}" in capsys.readouterr().err


def test_a_lease_that_stands_still_is_taken_over_and_only_then(run, capsys):
    """By the waiter's own clock: what the holder's says is not looked at."""
    put(run, elsewhere())
    started = time.monotonic()
    with sole_writer(run):
        assert time.monotonic() - started >= lock.LEASE
    assert "process" in capsys.readouterr().err
    assert not read_file(run / NAME)


def test_a_lease_that_is_counted_up_is_not_stolen(run, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 0.6)
    put(run, elsewhere())
    over = threading.Event()

    def live() -> None:
        beat = 0
        while not over.wait(0.2):
            beat += 1
            put(run, elsewhere(beat))

    thread = threading.Thread(target=live)
    thread.start()
    try:
        with pytest.raises(StoreError, match="node7"), sole_writer(run):
            pass
    finally:
        over.set()
        thread.join()


def test_the_holder_counts_and_leaves_nothing(run):
    with sole_writer(run):
        first = Holder.parse(read_file(run / NAME))
        deadline = time.monotonic() + 20
        while (later := Holder.parse(read_file(run / NAME))) == first or later is None:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert first is not None and later.beat > first.beat and later.token == first.token
    assert not read_file(run / NAME)


def test_of_many_at_once_one_holds(run, monkeypatch):
    holding, most = 0, 0
    guard = threading.Lock()

    def one() -> None:
        nonlocal holding, most
        with waiting(), sole_writer(run):
            with guard:
                holding += 1
                most = max(most, holding)
            time.sleep(0.05)
            with guard:
                holding -= 1

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1 and holding == 0


def test_a_lost_answer_to_a_heartbeat_is_no_lost_lock(run, monkeypatch):
    if isinstance(run, Path):
        pytest.skip("files answer")
    with sole_writer(run):
        put, lost = remote.put, [True]

        def put_but_lose_the_answer(place: Remote, data: bytes, mode: Any = "overwrite") -> Any:
            done = put(place, data, mode)
            return None if lost and lost.pop() else done

        monkeypatch.setattr(remote, "put", put_but_lose_the_answer)
        time.sleep(1)
        assert not lost
        holder = Holder.parse(read_file(run / NAME))
        assert holder is not None and holder.process == os.getpid() and holder.beat > 1
    assert stat_file(run / NAME) is None


def test_what_could_not_be_given_back_does_not_bar_its_own_process(run, monkeypatch):
    """Storage that was away could not be told: in a notebook the process lives on."""
    with monkeypatch.context() as patch:
        for kind in (lock._Lease, lock._File):
            patch.setattr(kind, "release", lambda self: None)
        with sole_writer(run):
            pass
    assert Holder.parse(read_file(run / NAME)) is not None
    with sole_writer(run):
        pass
    assert not read_file(run / NAME)


def test_where_nothing_can_be_written_nothing_is_locked(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with sole_writer(tmp_path / "file" / "run"):
        pass
