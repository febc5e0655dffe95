"""The bytes of a table's chunks, checked and decoded: what its reads are made of."""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from tda.errors import StoreError
from tda.store.arrays import ArraySpec
from tda.store.bounds import table_fault
from tda.store.chunks import AHEAD, Chunks
from tda.store.encoding import decode_rows
from tda.store.files import TRAILER, Remote, list_files, stat_file
from tda.store.manifest import cure, dtype_of_rows, redo
from tda.store.marks import STATIC, Entry, Mark, chunk_mark, is_document

if TYPE_CHECKING:
    from tda.store.table import Table


class Reading:
    """A table's chunks, by array and place: (checkpoint, chunk), or (chunk,) of a static column.

    Raises StoreError where one is unfinished or damaged.
    """

    def __init__(self, table: Table, chunks: Chunks) -> None:
        self._table, self._chunks = table, chunks

    def ahead(self, name: str, checkpoint: int, chunk: int) -> None:
        """Who reads a chunk of rows reads on: those of a remote table are fetched meanwhile."""
        if self._is_remote:
            places = [(checkpoint, i) for i in range(chunk, self._table.num_chunks)][: AHEAD + 1]
            keys = [self._table.specs[name].key(*place) for place in places]
            known = self.marks_at_first
            self._chunks.ahead(
                (key, known[place].files[key])
                for key, place in zip(keys, places, strict=True)
                if place in known
            )

    def decode(
        self, name: str, checkpoint: int, chunk: int, pick: slice | np.ndarray, out: Tensor
    ) -> None:
        spec = self._table.specs[name]
        scale = None
        if spec.encoding == "int8":
            scale = self.picked(self._table.specs["scale"], (checkpoint, chunk), pick)
        stored = self.picked(spec, (checkpoint, chunk), pick)
        decode_rows(stored, spec.encoding, scale, out)

    def chunk(self, spec: ArraySpec, *grid: int) -> np.ndarray:
        """The stored chunk ``[chunk_rows, …]`` as a view of its file, checked."""
        if spec.per_checkpoint and not 0 <= grid[0] < self._table.num_checkpoints:
            raise IndexError(f"checkpoint {grid[0]} of {self._table.num_checkpoints}")
        key, wanted = spec.key(*grid), spec.num_bytes + TRAILER
        data = self._chunks.whole(key, lambda: self._entry(spec, grid))
        if isinstance(data, str):
            self._entry(spec, grid)  # says so if the chunk was never finished
            if data == "torn":
                stat = stat_file(self._table.folder / key)
                raise damaged(self._table, "a chunk file is torn", key, stat and stat.size, wanted)
            found = "its checksum does not match" if data == "altered" else None
            what = "a chunk file was altered" if data == "altered" else "a chunk file is missing"
            raise damaged(self._table, what, key, found)
        if len(data) != wanted:
            raise damaged(self._table, "a chunk file is torn", key, len(data), wanted)
        return spec.unpack(data[:-TRAILER])

    def picked(
        self, spec: ArraySpec, grid: tuple[int, ...], pick: slice | np.ndarray
    ) -> np.ndarray:
        """Rows ``[len(pick), …]`` of a stored chunk."""
        if isinstance(pick, np.ndarray):
            key = spec.key(*grid)
            few = self._chunks.rows(key, lambda: self._entry(spec, grid), pick, spec.row_bytes)
            if few is not None:
                return spec.unpack_rows(few)
        return self.chunk(spec, *grid)[pick]

    def _entry(self, spec: ArraySpec, grid: tuple[int, ...]) -> Entry:
        if not spec.per_checkpoint:
            entry = self._table.static.files.get(spec.key(*grid))
            if entry is None:
                raise damaged(self._table, "a chunk file has no mark", spec.key(*grid))
            return entry
        mark = self.marks_at_first.get(grid) if self._is_remote else self._table.mark(*grid)
        if mark is None:
            key = chunk_mark(*grid)
            raise unfinished(
                self._table, f"chunk {grid[1]} of checkpoint {grid[0]}", self._table.folder / key
            )
        return mark.files[spec.key(*grid)]

    @property
    def _is_remote(self) -> bool:
        return isinstance(self._table.folder, Remote)

    @cached_property
    def marks_at_first(self) -> dict[tuple[int, ...], Mark]:
        """All marks at once: a remote table is read as it was when its first chunk was."""
        return dict(self._table.marks(list_files(self._table.folder)).items())


def open_specs(table: Table, chunks: Chunks) -> dict[str, ArraySpec]:
    """The arrays of a table, by its metadata documents, which are compared with its mark."""
    specs = {}
    for key in filter(is_document, table.static.files):
        document = chunks.whole(key, partial(table.static.files.__getitem__, key))
        if isinstance(document, str):
            raise damaged(table, f"a metadata document is {document}", key)
        if key not in ("zarr.json", "done/zarr.json"):
            name = key.partition("/")[0]
            try:
                specs[name] = ArraySpec.parse(name, document.tobytes())
            except ValueError as error:
                raise damaged(table, "a metadata document makes no sense", key, error) from error
    sizes = {key: entry.size for key, entry in table.static.files.items()}
    misfit = table_fault(specs, sizes, table.dim, dtype_of_rows(table.manifest, table.name))
    if misfit is not None:
        raise damaged(table, "the arrays of this table do not fit together", STATIC, misfit)
    return specs


def unfinished(table: Table, what: str, where: object) -> StoreError:
    return StoreError(
        f"{what} of {table.name!r} not computed yet", where=where, do=redo(table.name)
    )


def damaged(
    table: Table, what: str, key: str, found: object = None, wanted: object = None
) -> StoreError:
    do = cure(table.path, table.name)
    if wanted is not None:
        found, wanted = f"{found} bytes", f"{wanted} bytes"
    return StoreError(what, where=table.folder / key, found=found, wanted=wanted, do=do)
