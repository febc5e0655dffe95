"""One table's missing chunks, computed here or by the workers of a cluster: the same bytes.

A run is its missing chunks. `fill` computes them, each in full before it is written, so that a
process killed at any moment loses the chunk it was at, no more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tda.batch_size import BatchSize
from tda.cluster import is_open, run
from tda.data import Batch, Dataset, collate, part, read
from tda.errors import GradientError, MismatchError
from tda.examples import describe
from tda.featurizer import Features, Featurizer, Later
from tda.gradients.rules import InseparableError
from tda.progress import Tick
from tda.reading import Rows, ahead, behind, one_behind, reading
from tda.store import Table
from tda.store.manifest import CURVATURE

if TYPE_CHECKING:
    from tda.run import Run

log = logging.getLogger(__name__)
Place = tuple[int, int]  # checkpoint, chunk
Compute = Callable[[Any, Rows], Features]  # (batch, rows)
Write = Callable[[], None]
Filler = Callable[[Place, Tick], Write]  # computes a chunk
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


def filler(featurizer: Featurizer, table: Table, dataset: Dataset, batch_size: BatchSize) -> Filler:
    """What computes one chunk of a table of these examples."""
    return partial(fill, featurizer, table, dataset, batch_size)


def fill(
    featurizer: Featurizer,
    table: Table,
    dataset: Dataset,
    batch_size: BatchSize,
    place: tuple[int, int],
    tick: Tick,
    compute: Compute | None = None,
) -> Write:
    """Compute and put one chunk of a table, ``place`` = (checkpoint, chunk); returns what finishes
    it. ``tick(examples)`` a batch.

    compute: ``(batch, rows) -> Features`` of these rows, if not plainly the featurizer.
    Batches are cut within a chunk, so its bytes do not depend on what was done before; the next
    one is read while one is computed, and begun before a GPU is done with it.
    Raises GradientError naming the example whose loss or gradient is not finite.
    """
    checkpoint, chunk = place
    featurizer.at(checkpoint)
    start, stop = table.chunk_range(chunk)
    done: Features | None = None
    rounded = torch.bfloat16 if table.dtype == "bfloat16" else torch.float32  # int8 sees whole rows
    size, collate_with = featurizer.batch_size(batch_size, dataset), featurizer.task.collate
    if batch_size == "auto":
        size *= featurizer.num_shares

    def begun() -> Iterator[tuple[Rows, Later]]:
        for rows, batch in ahead(reading(dataset, start, stop, size, collate_with)):
            if compute is None:
                featurizer.gradients.check(batch, rows)
            yield rows, _begin(featurizer, table, dataset, batch, rows, compute)

    for rows, finish in one_behind(begun()):
        features = finish()
        _check_finite(features, table, rows, checkpoint)
        features = features.with_embedding(table.hidden or 0)
        done = done or features.room(stop - start, rounded)
        done.put(rows - start, features)
        tick(len(rows))
    assert done is not None, "a chunk has examples"
    columns = {name: values.numpy() for name, values in done.columns.items()}
    embedding = done.embedding if table.hidden else None
    return table.put(checkpoint, chunk, done.rows, columns, embedding)


def _begin(
    featurizer: Featurizer,
    table: Table,
    dataset: Dataset,
    batch: Batch | None,
    rows: Rows,
    compute: Compute | None,
) -> Later:
    """Features of one batch; in halves where the device has no memory for it."""
    if featurizer.room is None or len(rows) <= featurizer.room:
        try:
            if compute is None:
                return featurizer.start(batch, len(rows), train=table.name == "train")
            features = compute(batch, rows)
            return lambda: features
        except InseparableError as error:
            raise GradientError(
                "a batch cannot be separated by example, though the first one could",
                where=f"examples {rows.min()}–{rows.max()}",
                found=error,
                do="make the examples alike in shape, or index these on their own",
            ) from error
        except torch.OutOfMemoryError as error:
            if len(rows) == 1:
                raise GradientError(
                    "the device has no memory for the gradient of one example",
                    where=f"example {rows[0]} of {table.name}",
                    found=str(error).partition(". ")[0],
                    do='use a larger device, or Task(..., precision="bfloat16")',
                ) from error
            featurizer.room = len(rows) // 2
            log.warning("the device is out of memory: batches of %d from here on", featurizer.room)
    batch = None  # what did not fit is let go first
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    parts = []
    for some in np.split(rows, range(featurizer.room, len(rows), featurizer.room)):
        few = collate([read(dataset, int(row)) for row in some], featurizer.task.collate)
        parts.append(_begin(featurizer, table, dataset, few, some, compute))
    return lambda: Features.concatenate([part() for part in parts])


def _check_finite(features: Features, table: Table, rows: Rows, checkpoint: int) -> None:
    loss, norm = features.columns["loss"], features.columns["grad_norm"]
    if torch.isfinite(loss.sum() + norm.sum() + features.rows.sum()):
        return  # a sum over anything that is not finite is not finite
    bad = ~(torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(features.rows).all(1))
    if not bad.any():
        return
    place = int(bad.nonzero()[0])
    row = int(rows[place])
    raise GradientError(
        "the loss or the gradient of an example is not finite",
        where=f"example {str(table.column('id')[row])!r} (row {row} of {table.name}), "
        f"checkpoint {checkpoint}",
        found=f"loss {float(loss[place]):g}, gradient norm {float(norm[place]):g}",
        wanted="finite numbers",
        do="mend or leave out the example, or check the checkpoint; finished chunks are kept and "
        "the same call resumes",
    )
