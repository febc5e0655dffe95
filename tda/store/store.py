"""One run on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np

from tda.errors import DataError, MismatchError, StoreError
from tda.examples import Examples
from tda.store.chunks import Chunks
from tda.store.deleted import KEY, deleted_positions, places, with_deleted, without_deleted
from tda.store.files import Place, as_place, list_folders, require_plain, stat_file
from tda.store.manifest import (
    CURVATURE,
    NAME,
    QUERIES,
    TRAIN,
    check_manifest,
    check_table_name,
    grown_bases,
    has_table,
    read_manifest,
    redo,
    require_same,
    table_names,
    write_manifest,
)
from tda.store.planning import grow_checkpoints, plan_table
from tda.store.table import Table
from tda.store.verify import Fault, find_faults


class Store:
    """A folder with a manifest, the table ``train``, perhaps ``curvature``, and query sets.

    ``stores/README.md`` specifies every file. Pickles as its path.
    """

    def __init__(self, path: Place, manifest: dict[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self._chunks: dict[str, Chunks] = {}  # by table: what was read is not hashed again

    def __reduce__(self) -> tuple:
        return Store.open, (self.path.absolute(),)  # a worker may run in another folder

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @staticmethod
    def create(path: str | Place, manifest: Mapping[str, Any]) -> Store:
        """The run at ``path``, made now or found there with the same manifest.

        ``manifest`` has at least dtype, chunk_rows, projection.dim and checkpoints (name, digest);
        ``data`` is filled in by :meth:`plan`, and ``versions`` of an earlier start stay.
        Raises MismatchError naming the first field that differs, StoreError if the folder cannot
        be written or is something else.
        """
        folder = as_place(path)
        require_plain(folder)
        given = check_manifest({**manifest, "data": {}})
        if stat_file(folder / NAME) is not None:
            stored = read_manifest(folder)
            require_same(folder, stored, given)
            return Store(folder, stored)
        if TRAIN in list_folders(folder) and stat_file(folder / TRAIN / "zarr.json") is None:
            raise StoreError(
                "this folder has a `train` that is no part of a run",
                where=folder,
                do="choose an empty or a new folder",
            )
        write_manifest(folder, given)
        return Store(folder, given)

    @staticmethod
    def open(path: str | Place) -> Store:
        """The run at ``path``. Raises StoreError if there is none, or its format is unknown."""
        folder = as_place(path)
        require_plain(folder)
        return Store(folder, read_manifest(folder))

    def plan(
        self,
        table: str,
        examples: Examples,
        hidden: int | None = None,
        *,
        changed: bool = False,
    ) -> Table:
        """The table ``train``, ``curvature`` or ``queries/NAME`` of these examples.

        ``missing()`` of it is left to do. Creates it, finds it, repairs it, or appends to it:
        ``examples`` may go on after those that are stored; a chunk that was cut short before
        becomes missing. ``hidden`` is the width of the embedding, None for none. Rows of query
        sets are float32 whatever the run's dtype. ``changed``: examples may be others than they
        were, in the same places; their chunks become missing.
        One process plans. Raises MismatchError naming the first example that is another one.
        """
        name = check_table_name(table)
        self.manifest = read_manifest(self.path)  # others may have deleted, added or grown since
        planned = plan_table(self.path, self.manifest, name, examples, hidden, changed)
        record = {"num_rows": len(examples), "digest": examples.digest()}
        data = self.manifest["data"]
        if name == TRAIN and KEY in data.get(TRAIN, {}):
            record[KEY] = data[TRAIN][KEY]
        if name == CURVATURE:
            record["train"] = data[TRAIN]["digest"]
        if name in (TRAIN, CURVATURE) and data.get(name) != record:
            self.manifest = {**self.manifest, "data": {**data, name: record}}
            write_manifest(self.path, self.manifest)
        return planned

    def table(self, name: str) -> Table:
        """The table ``train``, ``curvature`` or ``queries/NAME``, to be read.

        Deleted examples are not in it; positions are those of the rest. Raises StoreError if there
        is no such table.
        """
        table = self.stored(name)
        self.manifest = table.manifest  # as it is now: another process may have deleted examples
        return table if name.startswith(QUERIES) else cast(Table, without_deleted(table))

    def stored(self, name: str) -> Table:
        """The same with its deleted rows, as it is written and as it lies on the disk."""
        if not has_table(self.path, check_table_name(name)):
            if name == CURVATURE:
                raise StoreError("this run has no curvature table", where=self.path, do=redo(name))
            query_set = name.partition("/")[2]
            raise StoreError(
                f"there is no query set {query_set!r}" if query_set else "nothing is indexed yet",
                where=self.path,
                found=f"query sets: {', '.join(self.queries()) or 'none'}",
                do="add it with run.add_queries(dataset, name)" if query_set else "run `tda index`",
            )
        chunks = self._chunks.setdefault(name, Chunks(self.path / name))
        return Table(self.path, name, chunks)

    def queries(self) -> list[str]:
        """Names of the stored query sets (``table(f"queries/{name}")``), sorted."""
        prefix = f"{QUERIES}/"
        return [n.removeprefix(prefix) for n in table_names(self.path) if n.startswith(prefix)]

    @property
    def deleted(self) -> np.ndarray:
        """``[d]`` ids of the deleted training examples, in the order of the table."""
        if KEY not in self.manifest["data"].get(TRAIN, {}):
            return np.array([], str)
        train = self.stored(TRAIN)
        return train.entries("id", deleted_positions(train.manifest, self.path, train.num_rows))

    def delete(self, ids: Sequence[str]) -> int:
        """From now on these training examples count nowhere; returns how many did until now.

        Nothing is computed and no row is touched: the manifest names them. Whoever reads the table
        sees it without them. Raises DataError for an id that is not in the run, or if no example
        would be left.
        """
        return self._count(ids, np.union1d)

    def restore(self, ids: Sequence[str]) -> int:
        """Take the deletion of these back; returns how many were deleted. Raises DataError."""
        return self._count(ids, np.setdiff1d)

    def _count(self, ids: Sequence[str], change: Callable[..., np.ndarray]) -> int:
        train = self.stored(TRAIN)
        before = deleted_positions(train.manifest, self.path, train.num_rows)
        after = change(before, places(train, [ids] if isinstance(ids, str) else ids))
        if len(after) == train.num_rows:
            raise DataError(
                "no training example would be left",
                where=self.path,
                found=f"all {len(after)} deleted",
                do="keep at least one, or delete the folder",
            )
        if len(after) != len(before):
            self.manifest = with_deleted(train.manifest, after)
            write_manifest(self.path, self.manifest)
        return abs(len(after) - len(before))

    def add_checkpoint(self, checkpoint: Mapping[str, Any], bases: str | None = None) -> None:
        """One more checkpoint, last; its chunks are missing in every table, the others stay.

        ``checkpoint`` has name, digest, and step and learning_rate if known. bases: the digest of
        those of its rows. One that is there already is left alone. Raises MismatchError if its name
        is taken by another one.
        """
        known = self.manifest["checkpoints"]
        grown = check_manifest(
            {
                **self.manifest,
                "checkpoints": [*known, dict(checkpoint)],
                **grown_bases(self.manifest, bases),
            }
        )
        new = grown["checkpoints"][-1]
        same_name = next((old for old in known if old["name"] == new["name"]), None)
        if same_name is None:
            write_manifest(self.path, grown)
            self.manifest = grown
        elif same_name != new:
            raise MismatchError(
                f"the run has another checkpoint {new['name']!r}",
                where=self.path,
                found=new,
                wanted=same_name,
                do="give the new checkpoint another name, or index into a new folder",
            )
        for name in table_names(self.path):
            table = Table(self.path, name)
            if table.specs["rows"].shape[0] != len(self.manifest["checkpoints"]):
                grow_checkpoints(table, len(self.manifest["checkpoints"]))

    def verify(self, *, withdraw: bool = True) -> list[Fault]:
        """Read every byte; name every file or chunk that is missing, torn, altered or unmarked.

        An empty list: the run is complete and is what was written. The mark of a damaged chunk is
        withdrawn (unless ``withdraw`` is False or the folder is read-only), so that the next
        `tda index` redoes this chunk and no other. Nothing else is changed.
        """
        return find_faults(self.path, self.manifest, withdraw)
