"""A training set that changes: labels set right, deleted examples removed for good.

Appending examples or checkpoints needs nothing of this: `tda.index`, called again, computes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from tda import decisions
from tda.batch_size import BatchSize
from tda.curvature.table import curvature_filler, keep_sample
from tda.curvature.updating import put_in, take_out
from tda.data import as_dataset
from tda.errors import StoreError
from tda.examples import Examples, describe
from tda.filling import Filling, filler
from tda.progress import Tick, progress_bar
from tda.run import Run
from tda.scorer.row_weights import curvature_weights
from tda.store import Store, Table
from tda.store.arrays import COLUMNS, OWN
from tda.store.deleted import KEY
from tda.store.files import Place, as_place, beside, read_file, write_file
from tda.store.lock import sole_writer
from tda.store.manifest import CURVATURE, QUERIES, TRAIN, bases_files, has_table


@dataclass(frozen=True)
class Relabelled:
    """ids ``[d]`` of the examples that are others now; computed: (table, checkpoint, chunk)."""

    ids: np.ndarray
    computed: list[tuple[str, int, int]]


def relabel(
    run: Run, dataset: Any, *, batch_size: BatchSize = "auto", progress: bool = False
) -> Relabelled:
    """The training set with some examples changed – a label, say – in the places they had.

    Only chunks that hold a changed example are computed; a curvature table keeps its rows, which
    remain a sample without bias, and computes those of changed examples. Needs the run's task.
    Called again it resumes. Raises MismatchError if examples are gone, or more than half of them
    are others: these are other data, and belong into a new folder.
    """
    data = as_dataset(dataset)
    examples = describe(data)
    with sole_writer(run.path):
        try:
            before = run.store.stored(TRAIN)
            old, hidden, sample = before.column("digest"), before.hidden, keep_sample(run.store)
        except StoreError:  # an earlier call was interrupted; what it had changed is not known
            old, hidden, sample = examples.digests, run.featurizer().probe(data).hidden, None
        n = min(len(old), len(data))
        changed = (old[:n] != examples.digests[:n]).any(axis=1)
        work = Filling(run, TRAIN, filler, data, batch_size)
        computed = _recompute(work, examples, hidden, "relabelled", progress)
        if sample is not None and len(data) == n:
            pairs = sample(run.store.stored(TRAIN), data)
            work = Filling(run, CURVATURE, curvature_filler, data, batch_size)
            computed += _recompute(work, pairs, None, "curvature", progress)
    return Relabelled(examples.ids[:n][changed], computed)


def _recompute(
    work: Filling, examples: Examples, hidden: int | None, what: str, progress: bool
) -> list[tuple[str, int, int]]:
    """The rows of what has changed, and its share in the sums that are kept; places computed."""
    store, name, folder = work.run.store, work.name, beside(work.run.path) / "cache"

    def weigh(table: Table, rows: str) -> Tensor:
        return curvature_weights(table, rows, bool(store.manifest["measurement"]["has_margin"]))

    try:
        before = store.stored(name)
        old = before.column("digest")
        n = min(len(old), len(examples))
        places = np.flatnonzero((old[:n] != examples.digests[:n]).any(axis=1))
        take_out(folder, before, places, weigh)
    except StoreError:  # then `updated` will find that what is kept is of something else
        places = np.empty(0, np.int64)
    table = store.plan(name, examples, hidden, changed=True)
    computed = work.finish(what, progress)
    if len(places):
        put_in(folder, table, places, weigh)
    return [(name, *place) for place in computed]


def compact(path: str | Place, target: str | Place, *, progress: bool = False) -> Store:
    """A run without the deleted examples of the one at ``path``, as if they had never been.

    Written into the folder ``target``; nothing of the old run is touched, and no row is computed:
    rows are copied, in the same numbers (of int8 to one unit in the last place). The training set
    of the new run is the old one without its deleted examples. Called again it resumes. Ground
    truths are not taken along: they are of another training set. Raises StoreError.
    """
    old, place = Store.open(path), as_place(target)
    if as_place(path) == place:
        raise StoreError(
            "a run is not compacted in its own folder",
            where=place,
            do="name a new folder; delete the old one when you no longer need it",
        )
    manifest = {**old.manifest, "data": {}}
    tables = [TRAIN, *([CURVATURE] if has_table(old.path, CURVATURE) else [])]
    tables += [f"{QUERIES}/{name}" for name in old.queries()]
    with sole_writer(place):
        for file in bases_files(old.manifest):
            bases = read_file(old.path / file)
            if bases is not None:
                write_file(place / file, bases)
        new = Store.create(place, manifest)
        seen = [old.table(name) for name in tables]
        total = sum(table.num_rows * table.num_checkpoints for table in seen)
        with progress_bar("compacting", total, progress) as tick:
            for name, table in zip(tables, seen, strict=True):
                _copy(table, new.plan(name, _examples(table), table.hidden), tick)
    deleted = set(old.deleted.tolist()) if KEY in old.manifest["data"][TRAIN] else set()
    decisions.copy(old.path, place, deleted)
    return new


def _examples(table: Table) -> Examples:
    columns = {name: table.column(name) for name in table.columns() if name not in OWN}
    inputs = table.column("input_digest") if "input_digest" in table.columns() else None
    return Examples(table.column("id"), table.column("digest"), columns, inputs)


def _copy(table: Table, into: Table, tick: Tick) -> None:
    table.require_complete()
    missing = into.missing()
    done = table.num_rows * table.num_checkpoints
    done -= sum(np.diff(into.chunk_range(chunk))[0] for _, chunk in missing)
    tick(int(done))
    for checkpoint, chunks in _by_checkpoint(missing):
        columns = {name: table.column(name)[checkpoint] for name in COLUMNS}
        for chunk in chunks:
            start, stop = into.chunk_range(chunk)
            embedding = None
            if table.hidden is not None:
                embedding = table.embedding(checkpoint, start, stop).numpy()
            rows = table.rows(checkpoint, start, stop).numpy()
            part = {name: values[start:stop] for name, values in columns.items()}
            into.write(checkpoint, chunk, rows, part, embedding)
            tick(stop - start)


def _by_checkpoint(places: list[tuple[int, int]]) -> Iterator[tuple[int, list[int]]]:
    for checkpoint in sorted({c for c, _ in places}):
        yield checkpoint, [chunk for c, chunk in places if c == checkpoint]
