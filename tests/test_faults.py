"""A few strikes of the kinds that jobs/faults/ knows; jobs/reliability.py does hundreds."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

JOBS = Path(__file__).parents[1] / "jobs"


def strikes(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    """In a process of its own, from which others are forked."""
    out = folder / "RELIABILITY.md"
    command = [sys.executable, str(JOBS / "reliability.py"), "--kills", "0.01", "--processes", "1"]
    command += ["--only", ",".join(kinds), "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(JOBS.parent), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:] + out.read_text()
    assert f"--only {','.join(kinds)}" in out.read_text()
    return json.loads(out.with_suffix(".json").read_text())["strikes"]


def check(tallies: list[dict[str, Any]], count: int) -> None:
    done = [tally for tally in tallies if not tally["why_not"]]
    assert len(tallies) == count and all(tally["times"] > 0 for tally in done), tallies
    for tally in done:
        assert tally["rows_lost"] == tally["rows_altered"] == 0, tally
        assert tally["most_recomputed"] <= 2, tally


def test_processes_disks_and_storage_that_fail(tmp_path) -> None:
    pytest.importorskip("moto")
    kinds = ("stale", "read_only", "cut_a_while")
    check(strikes(tmp_path, *kinds), len(kinds))


@pytest.mark.slow
def test_workers_and_a_network_that_is_gone(tmp_path) -> None:
    kinds = ("cut", "paused", "worker_starved", "scheduler_killed", "worker_preempted")
    check(strikes(tmp_path, *kinds), len(kinds))


def test_rows_that_are_altered_are_counted(tmp_path, monkeypatch) -> None:
    """The campaign sees what it looks for."""
    monkeypatch.syspath_prepend(str(JOBS))
    from faults.site import Campaign, Site

    def altering(site: Site, chance: Any) -> int:
        assert site.wait(site.start(pause=0)) == 0
        file = Path(site.run) / "train/rows/c/0/0/0"
        file.write_bytes(bytes(reversed(file.read_bytes())))
        return 1

    (tally,) = Campaign({altering: 1}, Site.at, most=1).run(tmp_path)
    assert tally.rows_altered == 8


def test_a_piece_of_the_campaign_has_a_process_of_its_own(monkeypatch) -> None:
    """Its answer, its error or its end by a signal is told, and the next is begun nonetheless."""
    monkeypatch.syspath_prepend(str(JOBS))
    from faults import apart

    asked = {
        "answer": (os.getpid, ()),
        "error": (int, ("x",)),
        "end": (os.abort, ()),
        "limit": (resource.setrlimit, (resource.RLIMIT_NOFILE, (64, 64))),
        "after": (resource.getrlimit, (resource.RLIMIT_NOFILE,)),
    }
    pieces = [apart.Piece(name, do, given) for name, (do, given) in asked.items()]
    done = {d.name: d for d in apart.side_by_side(pieces, 2, until=float("inf"))}
    assert done.keys() == asked.keys()
    assert done["answer"].answer not in (None, os.getpid())
    assert "ValueError" in done["error"].error
    assert done["end"].error == "ended with -6"
    assert done["after"].answer == resource.getrlimit(resource.RLIMIT_NOFILE)
    assert list(apart.side_by_side(pieces, 2, until=0)) == []


def test_what_hangs_in_the_campaign_is_ended_and_told(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(JOBS))
    from faults import apart

    monkeypatch.setattr(apart, "LONGEST", 0.2)
    monkeypatch.setattr(apart, "LOOK", 0.1)
    (done,) = apart.side_by_side([apart.Piece("hang", time.sleep, (600,))], 1, float("inf"))
    assert done.error == "ended with -9"
