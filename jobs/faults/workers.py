"""The same with a cluster: ``tda index --workers 2``, and one of its processes is struck."""

from __future__ import annotations

import random
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from faults.site import Campaign, Kind

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
# The tests' own way to strike, from the folder put on the path above.
from test_cluster_faults import (  # type: ignore[import-not-found]
    CHUNK_ROWS,
    MEMORY,
    NUM_CHUNKS,
    Site,
)

PATIENCE = 180  # seconds after which a command hangs


def _struck(site: Any, chance: random.Random, whom: str, number: int) -> tuple[int, int]:
    """(times struck, exit code) of the command with two workers."""
    process = site.start("--workers", "2")
    _some_chunks(site, chance, process)
    times = 0
    if process.poll() is None:
        try:
            site.strike(process, whom, number)
            times = 1
        except (StopIteration, ProcessLookupError):  # it has just ended
            pass
    return times, process.wait(PATIENCE)


def _some_chunks(site: Any, chance: random.Random, process: Any) -> None:
    """Wait until some more chunks are finished, and a moment longer."""
    site.wait_for_marks(site.num_marks() + chance.randint(1, NUM_CHUNKS // 3), process)
    time.sleep(chance.random() * site.pause)


def worker_killed(site: Any, chance: random.Random) -> int:
    """kill -9 of a worker"""
    times, code = _struck(site, chance, "worker", signal.SIGKILL)
    assert code == 0, (code, site.errors())
    return times


def worker_preempted(site: Any, chance: random.Random) -> int:
    """SIGTERM of a worker (its job is preempted)"""
    times, code = _struck(site, chance, "worker", signal.SIGTERM)
    assert code == 0, (code, site.errors())
    return times


def worker_hung(site: Any, chance: random.Random) -> int:
    """a worker that hangs (SIGSTOP)"""
    times, code = _struck(site, chance, "worker", signal.SIGSTOP)
    assert code == 0, (code, site.errors())
    return times


def client_killed(site: Any, chance: random.Random) -> int:
    """kill -9 of the client of workers, and of the scheduler in it"""
    return _struck(site, chance, "client", signal.SIGKILL)[0]


def client_preempted(site: Any, chance: random.Random) -> int:
    """SIGTERM of the client of workers"""
    times, code = _struck(site, chance, "client", signal.SIGTERM)
    assert code in (0, 75), (code, site.errors())
    return times


@contextmanager
def _servers(site: Any, memory: int = 0) -> Iterator[list[Any]]:
    servers = site.start_scheduler(memory=memory)
    try:
        yield servers
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(PATIENCE)


def scheduler_killed(site: Any, chance: random.Random) -> int:
    """kill -9 of a scheduler of its own"""
    with _servers(site) as servers:
        process = site.start("--scheduler", "scheduler.json")
        _some_chunks(site, chance, process)
        times = int(process.poll() is None)
        servers[0].kill()
        code = process.wait(PATIENCE)
    assert code in (0, 1), (code, site.errors())
    assert code == 0 or "the scheduler is gone" in site.errors(), site.errors()
    return times


def worker_starved(site: Any, chance: random.Random) -> int:
    """a worker over its memory limit: Dask ends it, and its chunk goes to another"""
    with _servers(site, MEMORY):
        process = site.start("--scheduler", "scheduler.json")
        _some_chunks(site, chance, process)
        hungry = site.folder / "hungry-once"
        hungry.touch()
        code = process.wait(PATIENCE)
    assert code == 0, (code, site.errors())
    times = int(not hungry.exists())
    hungry.unlink(missing_ok=True)
    return times


KINDS: dict[Kind, int] = {
    worker_killed: 5,
    worker_preempted: 2,
    worker_hung: 2,
    client_killed: 3,
    client_preempted: 2,
    scheduler_killed: 2,
    worker_starved: 2,
}


def _site(folder: Path) -> Any:
    return Site(folder)


CAMPAIGN = Campaign(KINDS, _site, CHUNK_ROWS, NUM_CHUNKS, most=2)
