"""What is damaged in a run is computed again, and nothing else is touched.

verify → marks of what is damaged are withdrawn → these chunks and files → verify
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tda.batch_size import BatchSize
from tda.data import as_dataset
from tda.errors import StoreError
from tda.examples import describe
from tda.featurizer import Featurizer
from tda.filling import Filling, filler
from tda.projection import Projection, bases_to_bytes
from tda.store import Fault, Table
from tda.store.files import remove_file, write_file
from tda.store.local import TMP
from tda.store.lock import sole_writer
from tda.store.manifest import (
    CURVATURE,
    QUERIES,
    TRAIN,
    bases_by_checkpoint,
    bases_digest,
    bases_files,
    has_table,
)
from tda.store.marks import chunk_mark
from tda.upkeep import verify

if TYPE_CHECKING:
    from tda.run import Run


@dataclass(frozen=True)
class Repair:
    """before: what was wrong; computed: (table, checkpoint, chunk) of the rows computed again;
    written: other files made again or taken away; after: what is wrong still."""

    before: list[Fault]
    computed: list[tuple[str, int, int]]
    written: list[str]
    after: list[Fault]


def repair(
    run: Run,
    dataset: Any,
    queries: Mapping[str, Any] | None = None,
    *,
    batch_size: BatchSize = "auto",
    progress: bool = False,
) -> Repair:
    """Find what is damaged or missing, and compute exactly that; needs the run's task.

    dataset: the training set, deleted examples included. queries: by name, the query sets that are
    at hand. Only chunks named by a fault are computed, and their bytes are those of an undamaged
    run. Ground truths are left to `ground_truth` (their damaged retrainings are missing then), and
    so is what cannot be computed: a manifest, decisions, query sets not at hand. These are in
    ``after``. Raises MismatchError if the data are other ones.
    """
    before = verify(run.path, withdraw=True)
    damaged = {fault.path for fault in before}
    if not damaged:
        return Repair([], [], [], [])
    written: list[str] = []
    computed: list[tuple[str, int, int]] = []
    with sole_writer(run.path):
        for path in sorted(damaged):
            if path.endswith(TMP):
                remove_file(run.path / path)
                written.append(path)
        for file, digest in bases_files(run.store.manifest).items():
            if file in damaged:
                _bases(run, file, digest, dataset, batch_size)
                written.append(file)
    if _named(damaged, TRAIN):
        _table(run, TRAIN, dataset, batch_size, progress, computed)
    if _named(damaged, CURVATURE):
        count = run.store.manifest["data"][CURVATURE]["num_rows"]
        missing, is_gone = _missing(run, CURVATURE), not has_table(run.path, CURVATURE)
        run.add_curvature(dataset, num_rows=count, batch_size=batch_size, progress=progress)
        places = Table(run.path, CURVATURE).places() if is_gone else missing
        computed += [(CURVATURE, *place) for place in places]
    for name, data in (queries or {}).items():
        if _named(damaged, f"{QUERIES}/{name}"):
            _table(run, f"{QUERIES}/{name}", data, batch_size, progress, computed)
    given = tuple(f"{QUERIES}/{name}/" for name in queries or {})

    def is_at_hand(fault: Fault) -> bool:
        return not fault.path.startswith(f"{QUERIES}/") or fault.path.startswith(given)

    # Of what was not at hand only marks have changed: they were withdrawn.
    after = [fault for fault in before if not is_at_hand(fault) and fault.path not in written]
    after += filter(is_at_hand, verify(run.path, withdraw=False))
    left = {fault.path for fault in after}
    done = {f"{name}/{key}" for name, c, i in computed for key in _files(run, name, c, i)}
    written += sorted(damaged - left - done - {*written})
    return Repair(before, computed, written, after)


def _files(run: Run, name: str, checkpoint: int, chunk: int) -> list[str]:
    return [chunk_mark(checkpoint, chunk), *Table(run.path, name).keys(checkpoint, chunk)]


def _named(damaged: set[str], table: str) -> bool:
    return any(path.startswith(f"{table}/") for path in damaged)


def _missing(run: Run, name: str) -> list[tuple[int, int]]:
    """What will be computed of a table whose layout is whole; of another it is not known yet."""
    try:
        return Table(run.path, name).missing()
    except StoreError:
        return []


def _table(
    run: Run,
    name: str,
    dataset: Any,
    batch_size: BatchSize,
    progress: bool,
    computed: list[tuple[str, int, int]],
) -> None:
    data = as_dataset(dataset)
    with sole_writer(run.path):
        run._plan(name, describe(data), data)
        work = Filling(run, name, filler, data, batch_size)
        computed += [(name, *place) for place in work.finish(f"repairing {name}", progress)]


def _bases(run: Run, file: str, digest: str, dataset: Any, batch_size: BatchSize) -> None:
    """Fitted again, and kept if they are the same. Raises StoreError if they are not."""
    manifest, task = run.store.manifest, run.task
    assert task is not None
    projection, digests = Projection.stored(manifest["projection"]), bases_by_checkpoint(manifest)
    layout = {layer["name"]: layer["size"] for layer in manifest.get("layers", ())} or None
    last = max(place for place, one in enumerate(digests) if one == digest)
    fit = Featurizer(task).fit
    found = bases_to_bytes(fit(projection, as_dataset(dataset), batch_size, False, last, layout))
    if bases_digest(found) != digest:
        raise StoreError(
            "the bases of the projection cannot be fitted again",
            where=run.path / file,
            found="others than the run was made with: of data or checkpoints that have been added "
            "since, or computed by other software",
            do="restore the file from a copy, or index again into a new folder",
        )
    write_file(run.path / file, found)
