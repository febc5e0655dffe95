"""How a run fares when processes are struck and strangers meddle: writes jobs/RELIABILITY.md.

    python jobs/reliability.py                          > 220 strikes, 10,000 hostile inputs
    python jobs/reliability.py --kills 0.1 --inputs 500
    python jobs/reliability.py --only cut,read_only     these kinds of strike, and nothing else

Hardware: two cores; 30 minutes when they are free. Some kinds need root (a disk of their own).
Expected: no row lost or altered, no input that is neither detected nor harmless; at most one chunk
recomputed a worker, two where the one being written is lost as well (an object that was being put,
pages of a disk that fails). The parts:

    jobs/faults/kills.py      processes of one machine that index
    jobs/faults/disks.py      their disk is full, or turns read-only in mid-write
    jobs/faults/storage.py    object storage, and the network to it
    jobs/faults/workers.py    a cluster: workers, scheduler, client
    jobs/faults/hostile.py    files of a run changed at random, or by somebody who knows the format
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from faults import hostile
from faults.apart import Piece, side_by_side
from faults.site import Campaign

PARTS = ("kills", "storage", "workers", "disks")
PIECE = 200  # inputs a process is given at a time
PAGE = Path(__file__).with_name("RELIABILITY.md")
VERDICTS = ("detected", "harmless", "another")


def _inputs(piece: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="tda-hostile-"))
    try:
        hostile.limit_memory()
        logging.getLogger("tda").setLevel(logging.ERROR)
        outcome = hostile.campaign(folder, PIECE, seed=1000 + piece)
    finally:
        shutil.rmtree(folder)
    counts = [[*key, count] for key, count in outcome.counts.items()]
    return {"counts": counts, "failures": outcome.failures, "unnamed": outcome.unnamed}


def _strikes(part: str, share: float, only: Sequence[str]) -> list[dict[str, Any]]:
    """A part's kinds of strike, or those of them that are named in ``only``."""
    where = "/dev/shm" if os.path.isdir("/dev/shm") else None  # what is killed loses no page
    folder = Path(tempfile.mkdtemp(prefix="tda-strikes-", dir=where))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        campaign = _campaign(part, stack)
        kinds = {k: n for k, n in campaign.kinds.items() if not only or k.__name__ in only}
        return [asdict(tally) for tally in replace(campaign, kinds=kinds).run(folder, share)]


def _campaign(part: str, stack: ExitStack) -> Campaign:
    from faults import disks, kills

    if part == "workers":
        from faults import workers

        return workers.CAMPAIGN
    if part == "storage":
        from faults.storage import Storage

        storage = Storage()
        stack.callback(storage.close)
        return storage.campaign
    return {"kills": kills, "disks": disks}[part].CAMPAIGN


def run(
    inputs: int, share: float, only: Sequence[str], processes: int, until: float
) -> dict[str, Any]:
    """Everything, side by side, until it is done or the time is up; what is done then is told."""
    strikes: dict[str, Any] = {}
    found: dict[str, Any] = {"inputs": [], "strikes": [], "broken": []}
    pieces = [Piece(part, _strikes, (part, share, only)) for part in PARTS]
    pieces += [Piece("inputs", _inputs, (number,)) for number in range(-(-inputs // PIECE))]
    for name, answer, error in side_by_side(pieces, processes, until):
        if error:
            found["broken"].append(f"{name}: {error}")
            print(found["broken"][-1], file=sys.stderr)
        elif name == "inputs":
            found["inputs"].append(answer)
        else:
            strikes[name] = answer
        print(f"{len(found['inputs']) * PIECE} inputs, {', '.join(strikes)}", file=sys.stderr)
    found["strikes"] = [tally for part in PARTS for tally in strikes.get(part, ())]
    return found


def page(found: dict[str, Any], command: str, seconds: float) -> str:
    strikes = found["strikes"]
    lines = [
        "# Reliability",
        "",
        f"Written by `{command}` in {seconds / 60:.0f} minutes on {_num_cores()} "
        f"({platform.machine()}, Python {platform.python_version()}).",
        *("", *(f"**Broken: {text.splitlines()[0]}**" for text in found["broken"])),
        "",
        "## Struck at a random moment, then finished by the same command",
        "",
        "Rows are compared byte by byte with those of a run that nothing happened to, and so is "
        "every other file.",
        "",
        "| what happened | times | rows lost | rows altered | chunks recomputed | most by one |",
        "|---|---|---|---|---|---|",
    ]
    for tally in strikes:
        numbers = [tally["rows_lost"], tally["rows_altered"], tally["recomputed"]]
        cells = [tally["kind"], tally["times"], *numbers, tally["most_recomputed"]]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    totals = [sum(t[k] for t in strikes) for k in ("times", "rows_lost", "rows_altered")]
    most = max((t["most_recomputed"] for t in strikes), default=0)
    again = sum(t["recomputed"] for t in strikes)
    lines += [f"| **all** | {totals[0]} | {totals[1]} | {totals[2]} | {again} | {most} |", ""]
    lines += [f"Not done: {t['kind']}: {t['why_not']}" for t in strikes if t["why_not"]]
    counts: Counter[tuple[str, str]] = Counter()
    for piece in found["inputs"]:
        counts.update({(kind, verdict): n for kind, verdict, n in piece["counts"]})
    kinds = {f.__name__: (f.__doc__ or "").strip() for f in hostile.KINDS}
    lines += [
        "",
        "## A stranger's run",
        "",
        "A small run with everything in it is changed, verified and asked. *Detected*: an error "
        "that says where, or a fault by `tda verify`. *Harmless*: all answers are those of the "
        "sound run. *Another*: who knows the format sealed it anew, as a run of other numbers.",
        "",
        "| what was done | inputs | detected | harmless | another | failed |",
        "|---|---|---|---|---|---|",
    ]
    total: Counter[str] = Counter()
    for kind, what in kinds.items():
        row = {verdict: n for (k, verdict), n in counts.items() if k == kind}
        total.update(row)
        lines.append(_row(what, row))
    lines += [_row("**all**", dict(total)), ""]
    failures = [text for piece in found["inputs"] for text in piece["failures"]]
    unnamed = [text for piece in found["inputs"] for text in piece["unnamed"]]
    lines += [f"Errors that do not say where: {len(unnamed)}.", ""]
    lines += [f"    {text.splitlines()[0][:160]}" for text in [*failures, *unnamed][:20]]
    return "\n".join(lines).rstrip() + "\n"


def _row(what: str, counts: dict[str, int]) -> str:
    failed = sum(n for verdict, n in counts.items() if verdict not in VERDICTS)
    cells = [what, sum(counts.values()), *(counts.get(v, 0) for v in VERDICTS), failed]
    return "| " + " | ".join(map(str, cells)) + " |"


def _num_cores() -> str:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return "one core" if cores == 1 else f"{cores} cores"


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--kills", type=float, default=1.0, help="share of the usual strikes")
    parser.add_argument("--only", default="", help="kinds of strike, by the names of functions")
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 1) + 1)
    parser.add_argument("--minutes", type=float, default=120, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args(given)
    only = asked.only.split(",") if asked.only else []
    inputs = 0 if only else asked.inputs
    command = " ".join(["python jobs/reliability.py", *(sys.argv[1:] if given is None else given)])
    started = time.time()
    until = started + 60 * asked.minutes
    found = run(inputs, asked.kills, only, asked.processes, until)
    asked.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    asked.out.write_text(page(found, command, time.time() - started))
    print(asked.out)
    return int(_is_bad(found))


def _is_bad(found: dict[str, Any]) -> bool:
    """Whether anything was lost, altered, overlooked or left undone."""
    strikes = any(t["rows_lost"] or t["rows_altered"] for t in found["strikes"])
    return bool(strikes or found["broken"] or any(piece["failures"] for piece in found["inputs"]))


if __name__ == "__main__":
    sys.exit(main())
