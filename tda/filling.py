"""One table's missing chunks, computed here or by the workers of a cluster: the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tda.batch_size import BatchSize
from tda.cluster import is_open, run
from tda.data import Dataset, describe, part
from tda.errors import MismatchError
from tda.featurizer import Featurizer, Filler, Write
from tda.progress import Tick
from tda.reading import behind
from tda.store import Table
from tda.store.manifest import CURVATURE

if TYPE_CHECKING:
    from tda.run import Run

Place = tuple[int, int]  # checkpoint, chunk
Prepare = Callable[[Featurizer, Table, Dataset, BatchSize], Filler]


class Filling:
    """Computes and writes chunks of one table. Pickles as the run's path, the task and the data.

    A chunk has one writer at a time, or two that write the same bytes: where a worker hangs, its
    chunk is given to another.
    """

    def __init__(
        self, run: Run, name: str, prepare: Prepare, dataset: Dataset, batch_size: BatchSize
    ) -> None:
        self.run, self.name, self.prepare = run, name, prepare
        self.dataset, self.batch_size = dataset, batch_size
        self._checked: set[int] | None = None  # checkpoints; None: this process described the data
        self._write: Callable[[Write], None] = lambda write: write()

    def __reduce__(self) -> tuple:
        return _elsewhere, (self.run, self.name, self.prepare, self.dataset, self.batch_size)

    @cached_property
    def table(self) -> Table:
        return self.run.store.stored(self.name)

    @cached_property
    def _compute(self) -> Filler:
        return self.prepare(self.run.featurizer(), self.table, self.dataset, self.batch_size)

    def __call__(self, place: Place, tick: Tick) -> None:
        if self._checked is not None:
            if self.table.is_finished(*place):
                return  # by a worker that was given up too early
            self._check(*place)
        self._write(self._compute(place, tick))

    def finish(self, what: str, show: bool) -> list[Place]:
        """Every missing chunk; returns those that were computed."""
        missing = self.table.missing()
        if missing and self.table.recover():  # this goes on where another stopped
            missing = self.table.missing()
        if not missing:
            return []
        spans = [self.table.chunk_range(chunk) for _, chunk in missing]
        with behind() as self._write:
            run(self, missing, [stop - start for start, stop in spans], what, show)
        if is_open():
            self.table.recover()  # what workers left that were lost
        return missing

    def _check(self, checkpoint: int, chunk: int) -> None:
        """That weights and examples found here are those the run was planned with."""
        assert self._checked is not None
        task = self.run.task
        assert task is not None
        if checkpoint not in self._checked:
            found = task.digest(checkpoint)
            wanted = self.run.store.manifest["checkpoints"][checkpoint]["digest"]
            if found != wanted:
                raise _other(f"checkpoint {checkpoint}", found, wanted)
            self._checked.add(checkpoint)
        if self.name == CURVATURE:
            return  # pairs; its `prepare` compares the examples they are of
        start, stop = self.table.chunk_range(chunk)
        here = describe(part(self.dataset, start, stop)).digests
        there = self.table.entries("digest", np.arange(start, stop))
        if not np.array_equal(here, there):
            first = start + int((here != there).any(axis=1).argmax())
            raise _other(f"example {first} of {self.name}", "another content", "as planned")


def _elsewhere(*parts: object) -> Filling:
    filling = Filling(*parts)  # type: ignore[arg-type]
    filling._checked = set()
    return filling


def _other(what: str, found: str, wanted: str) -> MismatchError:
    return MismatchError(
        f"a worker has another {what} than the process that planned the run",
        found=found,
        wanted=wanted,
        do="put weights and data where all see the same files, and build them without randomness",
    )
