"""How a run fares when processes are struck and strangers meddle: writes jobs/RELIABILITY.md.

    python jobs/reliability.py                   about 200 strikes, 10,000 hostile inputs
    python jobs/reliability.py --kills 0.1 --inputs 500

Hardware: two cores; 30 minutes when they are free. Some kinds need root (a disk of their own).
Expected: no row lost or altered, no input that is neither detected nor harmless. The parts:

    jobs/faults/kills.py      processes of one machine that index
    jobs/faults/workers.py    a cluster: workers, scheduler, client
    jobs/faults/hostile.py    files of a run changed at random, or by somebody who knows the format
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parent))

from faults import hostile, kills, workers

PIECE = 200  # inputs a process is given at a time
PAGE = Path(__file__).with_name("RELIABILITY.md")
VERDICTS = ("detected", "harmless", "another")


def _inputs(piece: int) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="tda-hostile-"))
    try:
        hostile.limit_memory()
        outcome = hostile.campaign(folder, PIECE, seed=1000 + piece)
    finally:
        shutil.rmtree(folder)
    counts = [[*key, count] for key, count in outcome.counts.items()]
    return {"counts": counts, "failures": outcome.failures, "unnamed": outcome.unnamed}


def _strikes(kind: str, share: float) -> list[dict[str, Any]]:
    folder = Path(tempfile.mkdtemp(prefix="tda-kills-"))
    campaign = kills.campaign if kind == "process" else workers.campaign
    try:
        return [asdict(tally) for tally in campaign(folder, share)]
    finally:
        shutil.rmtree(folder)


def run(inputs: int, share: float, processes: int, until: float) -> dict[str, Any]:
    """Everything, side by side, until it is done or the time is up; what is done then is told."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"inputs": [], "strikes": []}
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting: dict[Future[Any], str] = {}
        waiting |= {pool.submit(_strikes, kind, share): kind for kind in ("process", "cluster")}
        waiting |= {pool.submit(_inputs, i): "inputs" for i in range(-(-inputs // PIECE))}
        for future in as_completed(waiting):
            if future.cancelled():
                continue
            if waiting[future] == "inputs":
                found["inputs"].append(future.result())
            else:
                found["strikes"] += future.result()
            print(f"{len(found['inputs']) * PIECE} inputs", file=sys.stderr)
            if time.time() > until:
                for other in waiting:
                    other.cancel()
    return found


def page(found: dict[str, Any], seconds: float) -> str:
    strikes = found["strikes"]
    lines = [
        "# Reliability",
        "",
        f"Written by `python jobs/reliability.py` in {seconds / 60:.0f} minutes on "
        f"{os.cpu_count()} cores ({platform.machine()}, Python {platform.python_version()}).",
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


def main(given: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=10_000, help="hostile inputs")
    parser.add_argument("--kills", type=float, default=1.0, help="share of the usual strikes")
    parser.add_argument("--processes", type=int, default=(os.cpu_count() or 1) + 1)
    parser.add_argument("--minutes", type=float, default=120, help="begin nothing after so many")
    parser.add_argument("--out", type=Path, default=PAGE)
    asked = parser.parse_args(given)
    started = time.time()
    found = run(asked.inputs, asked.kills, asked.processes, started + 60 * asked.minutes)
    asked.out.with_suffix(".json").write_text(json.dumps(found, indent=1))
    asked.out.write_text(page(found, time.time() - started))
    print(asked.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
