"""What retraining shows of a task, on both protocols: computed once, resumed, read by every cell.

half      random halves (α = .5), every retraining with a random stream of its own
removal   a few per cent left out, the seed and the batches of the model that is attributed
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import tda
from tda.evaluate import Design, GroundTruth, ground_truth
from tda.evaluate.record import Record
from tda.store.files import unseal
from tda.store.lock import sole_writer

PROJ_DIM = 2048  # of the run that the ground truths lie with


def folder(task: str, quick: bool) -> Path:
    return Path("stores/suite-quick" if quick else "stores/suite") / task


def compute(work: Any, quick: bool, progress: bool = True, seeds: int | None = None) -> None:
    """The ground truths of a task, or what is missing of them; the halves' with the first few
    ``seeds`` or all."""
    path = folder(work.name, quick)
    with sole_writer(path / "evaluate"):
        course = work.course(quick)
        run = tda.index(work.task(str(path), "last", quick), work.train_set(quick), path,
                        proj_dim=PROJ_DIM, progress=False)  # fmt: skip
        queries = work.test_set(quick)
        for name, design in designs(work.truth, quick, seeds):
            train = course.half() if name == "half" else course.removal()
            ground_truth(run, train, queries, design, name=name, progress=progress)


def designs(
    numbers: dict[str, float], quick: bool, most: int | None = None
) -> list[tuple[str, Design]]:
    """First what gives a figure on both protocols, then the other seeds of the halves."""
    halves, seeds = int(numbers["num_halves"]), int(numbers["num_seeds"])
    removals, removed = int(numbers["num_removals"]), numbers["removed"]
    if quick:
        halves, seeds, removals = 8, 2, 8
    removal = Design(kind="removal", num_subsets=removals, fraction=removed, seeds=(0,))
    seeds = min(seeds, most or seeds)
    first, every = (Design(num_subsets=halves, seeds=tuple(range(n))) for n in (1, seeds))
    return [("half", first), ("removal", removal), ("half", every)]


def read(task: str, quick: bool) -> dict[str, GroundTruth]:
    """name → ground truth, with as many seeds as are finished on every subset."""
    path = folder(task, quick) / "evaluate"
    return {name: _finished(path / name) for name in ("half", "removal")}


def _finished(path: Path) -> GroundTruth:
    """Raises StoreError where not one seed is finished."""
    manifest = unseal((path / "manifest.json").read_bytes()) or {}
    design = Design.parse(manifest["design"])
    for number in range(len(design.seeds), 1, -1):
        record = Record(path, manifest, replace(design, seeds=design.seeds[:number]))
        if not record.missing():
            return record.read()
    return Record(path, manifest, replace(design, seeds=design.seeds[:1])).read()
