"""A process that indexes is struck at a random moment; the same command then finishes its work."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any

import torch
from faults.site import LEFT, NUM_CHUNKS, REFUSED, Campaign, Kind, Site

from tda.featurizer import Featurizer
from tda.store import lock


def killed(site: Site, chance: random.Random) -> int:
    """kill -9 of the client"""
    return _killed(site, chance, site.start())


def _killed(site: Site, chance: random.Random, pid: int) -> int:
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGKILL)
    site.wait(pid)
    return int(struck)


def preempted(site: Site, chance: random.Random) -> int:
    """SIGTERM (a job is preempted)"""
    pid = site.start(before=_heed_sigterm)
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGTERM)
        started = time.monotonic()
        code = site.wait(pid)
        assert time.monotonic() - started < 30, "it did not leave within 30 seconds"
        assert code in (0, LEFT, -signal.SIGTERM), f"left with {code}: {site.errors()}"
    else:
        site.wait(pid)
    return int(struck)


def _heed_sigterm() -> None:
    from tda.cluster.leaving import on_sigterm

    on_sigterm().__enter__()


def starved(site: Site, chance: random.Random) -> int:
    """out of memory"""
    after = chance.randrange(1, NUM_CHUNKS // 2)

    def limit() -> None:
        featurize, calls = Featurizer.start, [0]

        def hungry(that: Featurizer, *given: Any, **more: Any) -> Any:
            calls[0] += 1
            if calls[0] == after:
                held = int(Path("/proc/self/statm").read_text().split()[0])
                room = held * resource.getpagesize() + 2**20
                resource.setrlimit(resource.RLIMIT_AS, (room, room))
                torch.empty(2**28).fill_(1)
            return featurize(that, *given, **more)

        Featurizer.start = hungry  # type: ignore[method-assign, assignment]

    return int(site.wait(site.start(before=limit)) != 0)


def hung(site: Site, chance: random.Random) -> int:
    """a client that hangs (SIGSTOP); a second is refused while it holds the run; then kill -9"""
    pid = site.start()
    struck = site.at_a_random_moment(pid, chance)
    if struck:
        os.kill(pid, signal.SIGSTOP)
        if site.num_marks():
            code = site.wait(site.start(pause=0))
            os.kill(pid, signal.SIGKILL)
            # 0: it was stopped on its way to the run, before it held it
            assert code in (0, REFUSED), (code, site.errors())
        else:
            os.kill(pid, signal.SIGKILL)
    site.wait(pid)
    return int(struck)


def two_at_once(site: Site, chance: random.Random) -> int:
    """two jobs index the same store at once; one of them, at random, is killed"""
    both = [site.start(), site.start()]
    struck = site.at_a_random_moment(both[0], chance)
    if struck:
        os.kill(chance.choice(both), signal.SIGKILL)
    codes = [site.wait(pid) for pid in both]
    assert all(code in (0, REFUSED, -signal.SIGKILL) for code in codes), (codes, site.errors())
    return int(struck)


def stale(site: Site, chance: random.Random) -> int:
    """the lock is of another machine: taken over once it has stood still; kill -9 of the taker"""
    file = Path(site.run) / "cache" / "writer"
    if not file.exists() or not file.read_bytes().strip():
        killed(site, chance)  # and the next one takes over what it leaves
        return 0
    left = file.read_bytes()
    theirs = json.dumps(json.loads(left) | {"machine": "another", "host": "node7"}).encode()
    file.write_bytes(theirs.ljust(1024))

    def shorter() -> None:
        lock.LEASE, lock._POLL = 0.2, 0.02

    struck = _killed(site, chance, site.start(before=shorter))
    if b"node7" in file.read_bytes():  # struck before it took over: others would wait a minute
        file.write_bytes(left)
    return struck


def skewed(site: Site, chance: random.Random) -> int:
    """clock skew: killed on a machine whose clock is years off; every file is dated so, too"""
    off = chance.choice([-1, 1]) * chance.random() * 10**8
    real = time.time

    def wrong() -> None:
        time.time = lambda: real() + off

    struck = _killed(site, chance, site.start(before=wrong))
    for file in Path(site.run).rglob("*"):
        moment = real() + chance.choice([-1, 1]) * chance.random() * 10**8
        os.utime(file, (moment, moment))
    return struck


KINDS: dict[Kind, int] = {
    killed: 50,
    preempted: 25,
    starved: 15,
    hung: 15,
    two_at_once: 15,
    stale: 15,
    skewed: 15,
}
CAMPAIGN = Campaign(KINDS, Site.at)
