"""While workers work, a terminal shows one line for each; a log gets the same now and then."""

from __future__ import annotations

import io
import os
import time
import urllib.request
from typing import Any

import pytest

from tda import progress
from tda.cluster import Cluster, run
from tda.cluster.crew import RECENT, Crew
from tda.progress import progress_bar


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def crew(clock: Clock) -> Crew:
    found = Crew("examples", clock)
    found.present(["tcp://a:1", "tcp://b:2"])
    return found


def test_a_line_a_worker_says_what_it_did_how_fast_and_with_how_much_memory(crew, clock) -> None:
    crew.heard("tcp://a:1", 0, 0, 300 * 2**20)
    clock.now = 4.0
    crew.heard("tcp://a:1", 0, 60, 301 * 2**20)
    clock.now = 5.0
    crew.done("tcp://a:1", 0, 100)
    assert crew.lines() == [
        "a:1  1 done  20.0 examples/s  301 MiB  waiting",
        "b:2  0 done  0.0 examples/s  0 MiB  waiting",
    ]


def test_throughput_is_of_late_and_counts_the_piece_at_hand(crew, clock) -> None:
    for second in range(300):
        clock.now = float(second)
        per_second = 1000 if second < 200 else 5
        start = 1000 * min(second, 200) + 5 * max(second - 200, 0)
        crew.heard("tcp://a:1", 0, start, 0)
    assert per_second == 5 and clock.now - 200 > RECENT
    assert "  5.0 examples/s  0 MiB  at piece 0" in crew.lines()[0]


def test_who_is_silent_is_said_and_is_shown_before_others(crew, clock) -> None:
    crew.present([f"tcp://w:{i}" for i in range(100)])
    clock.now = 40.0
    for i in range(100):
        if i != 77:
            crew.heard(f"tcp://w:{i}", i, 1, 0)
    shown = crew.lines(5)
    assert len(shown) == 5
    (one,) = [line for line in shown if "silent" in line]
    assert one.startswith("w:77") and one.endswith("silent for 40 s")
    assert shown[-1].startswith("96 more workers; all together ")


def test_who_has_left_is_not_shown_and_who_comes_is(crew) -> None:
    crew.done("tcp://a:1", 3, 10)
    crew.present(["tcp://a:1", "tcp://c:3"])
    assert [line.split()[:3] for line in crew.lines()] == [
        ["a:1", "1", "done"],
        ["c:3", "0", "done"],
    ]


def slow(piece: int, tick: Any) -> int:
    for _ in range(5):
        time.sleep(0.03)
        tick(2)
    return os.getpid()


@pytest.fixture(scope="module")
def workers():
    with Cluster(workers=2).started() as started:
        yield started


def test_a_log_gets_plain_lines(workers, monkeypatch, capsys) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.2)
    with workers.taking_work():
        run(slow, range(8), [10] * 8, "indexing", show=True)
    told = capsys.readouterr().err.splitlines()
    assert "\x1b" not in "".join(told)
    heads = [line for line in told if line.startswith("indexing: ")]
    assert len(heads) > 1 and heads[-1].startswith("indexing: 80 of 80 examples, ")
    last = told[-2:]
    addresses = sorted(address.partition("://")[2] for address in workers.addresses())
    assert sorted(line.split()[0] for line in last) == addresses
    assert sum(int(line.split()[1]) for line in last) == 8
    assert all("examples/s" in line and "MiB" in line for line in last)
    memory = [int(line.partition(" MiB")[0].split()[-1].replace(",", "")) for line in last]
    assert all(20 < mebibytes < 20_000 for mebibytes in memory)


def test_a_terminal_gets_a_bar_with_them_below(workers, monkeypatch) -> None:
    import rich.console

    screen = io.StringIO()
    console = rich.console.Console(file=screen, force_terminal=True, width=100, height=30)
    monkeypatch.setattr(rich.console, "Console", lambda stderr: console)
    with workers.taking_work():
        run(slow, range(4), [10] * 4, "indexing", show=True)
    last = screen.getvalue().rpartition("indexing")[2]
    assert "40/40" in last
    for address in workers.addresses():
        assert address.partition("://")[2] in last


def test_without_workers_a_log_says_what_was_done(capsys) -> None:
    assert run(lambda piece, tick: tick(2), [0, 1], [2, 2], "scoring", show=True) == [None, None]
    assert capsys.readouterr().err.startswith("scoring: 4 of 4 examples, ")


def test_the_dashboard_that_is_told_answers(capsys) -> None:
    with Cluster(workers=1).open(show=True):
        told = capsys.readouterr().err
        assert told.startswith("dashboard: http://127.0.0.1:")
        address = told.split()[1]
        health = address.replace("/status", "/health")
        assert urllib.request.urlopen(health, timeout=10).read() == b"ok"


def test_what_had_nothing_to_do_says_nothing(capsys: pytest.CaptureFixture) -> None:
    for count in (0, 3):
        with progress_bar("choosing", 8, show=True) as tick:
            for _ in range(count):
                tick(1)
    assert capsys.readouterr().err.startswith("choosing: 3 of 8 examples")
