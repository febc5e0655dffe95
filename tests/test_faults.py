"""A few strikes of the kinds that jobs/faults/ knows; jobs/reliability.py does hundreds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
