"""One table of a run – ``train`` or a query set – with rows and columns by example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import StoreError
from tda.store.arrays import ArraySpec
from tda.store.bounds import table_fault
from tda.store.chunks import AHEAD, Chunks
from tda.store.encoding import decode_rows, decode_strings
from tda.store.files import (
    TRAILER,
    Place,
    Remote,
    Stat,
    list_files,
    list_folders,
    read_file,
    read_files,
    remove_unfinished,
    stat_file,
)
from tda.store.incoming import encode_chunk
from tda.store.manifest import (
    CURVATURE,
    QUERIES,
    TRAIN,
    config_hash,
    cure,
    read_manifest,
    redo,
    rows_depend_on,
)
from tda.store.marks import (
    STATIC,
    Entry,
    Mark,
    chunk_mark,
    have_sizes,
    is_document,
    read_mark,
    remove_mark,
    write_chunks,
    write_mark,
)

_NUMBERS = frozenset(("rows", "scale", "embedding"))  # read by their own methods


def table_names(run: Place) -> list[str]:
    """``train``, ``curvature`` and ``queries/NAME``, those that are there. Raises StoreError."""
    there = list_folders(run)
    sets = {key.partition("/")[0] for key in list_files(run / QUERIES) if "/" in key}
    single = [name for name in (TRAIN, CURVATURE) if name in there]
    return single + [f"{QUERIES}/{name}" for name in sorted(sets)]


def has_table(run: Place, name: str) -> bool:
    return bool(list_folders(run / name))


class Table:
    """Rows P∇f and what is known of each example, for every checkpoint.

    Every read is checked: a chunk is used only if it is marked complete and its checksum is the
    marked one (see `tda.store.chunks`).
    chunks: of this table, where some have been checked before. Pickles as (path, name). Raises
    StoreError if there is no such table or its layout is damaged.
    """

    def __init__(self, path: Place, name: str, chunks: Chunks | None = None) -> None:
        self.path = path
        self.name = name
        self.folder = path / name
        self.manifest = read_manifest(path)
        self._chunks = chunks or Chunks(self.folder)
        self.static = self._open_static()
        self.specs = self._open_specs()

    def __reduce__(self) -> tuple:
        return Table, (self.path.absolute(), self.name)  # a worker may run in another folder

    def __repr__(self) -> str:
        return f"Table({str(self.folder)!r}, num_rows={self.num_rows}, dim={self.dim})"

    def _open_static(self) -> Mark:
        mark = read_mark(self.folder / STATIC)
        if mark is None:
            raise self._error("this table is not ready or its mark is damaged", STATIC)
        return mark

    def _open_specs(self) -> dict[str, ArraySpec]:
        specs = {}
        for key in filter(is_document, self.static.files):
            document = self._chunks.whole(key, partial(self.static.files.__getitem__, key))
            if isinstance(document, str):
                raise self._error(f"a metadata document is {document}", key)
            if key not in ("zarr.json", "done/zarr.json"):
                name = key.partition("/")[0]
                try:
                    specs[name] = ArraySpec.parse(name, document.tobytes())
                except ValueError as error:
                    raise self._error("a metadata document makes no sense", key, error) from error
        sizes = {key: entry.size for key, entry in self.static.files.items()}
        misfit = table_fault(specs, sizes)
        if misfit is not None:
            raise self._error("the arrays of this table do not fit together", STATIC, misfit)
        return specs

    # ---- shape

    @property
    def num_rows(self) -> int:
        return self.specs["rows"].shape[1]

    @property
    def num_checkpoints(self) -> int:
        return len(self.manifest["checkpoints"])

    @property
    def dim(self) -> int:
        return self.specs["rows"].shape[2]

    @property
    def hidden(self) -> int | None:
        """Width of the stored embedding, if there is one."""
        return self.specs["embedding"].shape[2] if "embedding" in self.specs else None

    @property
    def dtype(self) -> str:
        """bfloat16, int8 or float32: how the rows are stored."""
        return self.specs["rows"].encoding or "float32"

    @property
    def chunk_rows(self) -> int:
        return self.specs["rows"].chunk_rows

    @property
    def num_chunks(self) -> int:
        return -(-self.num_rows // self.chunk_rows)

    def chunk_range(self, chunk: int) -> tuple[int, int]:
        """(start, stop) of the examples of a chunk."""
        if not 0 <= chunk < self.num_chunks:
            raise IndexError(f"chunk {chunk} of {self.num_chunks}")
        return chunk * self.chunk_rows, min((chunk + 1) * self.chunk_rows, self.num_rows)

    def columns(self) -> list[str]:
        """Names :meth:`column` knows."""
        return [name for name in self.specs if name not in _NUMBERS]

    # ---- completeness

    def missing(self) -> list[tuple[int, int]]:
        """(checkpoint, chunk) of all that is unfinished: no valid mark, or a file of other size."""
        listed = list_files(self.folder)
        marks = self.marks(listed)
        return [
            place
            for place in self.places()
            if place not in marks or not have_sizes(listed, marks[place].files)
        ]

    def require_complete(self) -> None:
        """Raises StoreError, with what finishes it, unless every chunk is finished."""
        missing = self.missing()
        if missing:
            raise self._unfinished(
                f"{len(missing)} of {self.num_checkpoints * self.num_chunks} chunks",
                self.folder,
            )

    def is_finished(self, checkpoint: int, chunk: int) -> bool:
        """Whether a chunk has a valid mark and its files have their sizes."""
        mark = self.mark(checkpoint, chunk)
        stats = {} if mark is None else {key: stat_file(self.folder / key) for key in mark.files}
        there = {key: stat for key, stat in stats.items() if stat is not None}
        return mark is not None and have_sizes(there, mark.files)

    def places(self) -> list[tuple[int, int]]:
        """(checkpoint, chunk) of all that there should be."""
        return [(c, i) for c in range(self.num_checkpoints) for i in range(self.num_chunks)]

    def marks(self, listed: Mapping[str, Stat]) -> dict[tuple[int, int], Mark]:
        """The valid marks, as :meth:`mark` has them, of a table with these files."""
        there = [place for place in self.places() if chunk_mark(*place) in listed]
        keys = {chunk_mark(*place): listed[chunk_mark(*place)] for place in there}
        texts = read_files(self.folder, keys)
        found = ((place, self._valid(place, texts[chunk_mark(*place)])) for place in there)
        return {place: mark for place, mark in found if mark is not None}

    def mark(self, checkpoint: int, chunk: int) -> Mark | None:
        """The mark of a chunk, or None if it has none that belongs to these data and this run."""
        text = read_file(self.folder / chunk_mark(checkpoint, chunk))
        return self._valid((checkpoint, chunk), text)

    def _valid(self, place: tuple[int, int], text: bytes | None) -> Mark | None:
        checkpoint, chunk = place
        mark = None if text is None else Mark.parse(text)
        if mark is None or mark.rows != self.chunk_range(chunk):
            return None
        known = mark.config == self._config(checkpoint, chunk)
        return mark if known and set(mark.files) == set(self.keys(checkpoint, chunk)) else None

    def keys(self, checkpoint: int, chunk: int) -> list[str]:
        """The files of a chunk, relative to the table's folder."""
        return [s.key(checkpoint, chunk) for s in self.specs.values() if s.per_checkpoint]

    def _config(self, checkpoint: int, chunk: int) -> str:
        start, stop = self.chunk_range(chunk)
        own = {
            "dtype": self.dtype,
            "dim": self.dim,
            "hidden": self.hidden,
            "chunk_rows": self.chunk_rows,
            "rows": [start, stop],
            "examples": blake2b(self._digests[start:stop].tobytes(), digest_size=16).hexdigest(),
        }
        return config_hash({**rows_depend_on(self.manifest, checkpoint), **own})

    @cached_property
    def _digests(self) -> np.ndarray:
        return self.column("digest")

    # ---- writing

    def write(
        self,
        checkpoint: int,
        chunk: int,
        rows: np.ndarray,
        columns: Mapping[str, np.ndarray],
        embedding: np.ndarray | None = None,
    ) -> None:
        """Store one chunk of one checkpoint and mark it complete. One writer a chunk.

        rows: ``[r, proj]`` with r the examples of ``chunk_range(chunk)``; columns: ``[r]`` for each
        of loss, p, slope, curvature, grad_norm; embedding: ``[r, hidden]`` if the table has one.
        The mark appears after everything is on the disk. Raises GradientError naming the example
        if a number is not finite (p may be NaN), StoreError for a wrong shape or a failing disk:
        then the chunk stays unfinished and everything else is untouched.
        """
        given = {"rows": rows, **columns}
        if embedding is not None:
            given["embedding"] = embedding
        parts = encode_chunk(self, chunk, given)
        mark = chunk_mark(checkpoint, chunk)
        remove_mark(self.folder, mark)  # a mark never stands over files that are being replaced
        specs = ((self.specs[name], values) for name, values in parts.items())
        files = write_chunks(
            self.folder, ((spec.key(checkpoint, chunk), spec.pack(v)) for spec, v in specs)
        )
        config = self._config(checkpoint, chunk)
        write_mark(self.folder, mark, Mark(self.chunk_range(chunk), config, files))

    def sweep(self) -> None:
        """Remove what killed writers left unfinished; when no writer is at work."""
        remove_unfinished(self.folder)

    # ---- reading

    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        """Float32 rows ``[stop - start, proj]``, decoded and checked. Raises StoreError."""
        return self._read("rows", checkpoint, start, stop)

    def coded_rows(self, checkpoint: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """(rows ``[stop - start, proj]`` as stored: float32, bfloat16 or int8, factor
        ``[stop - start]`` of int8), which multiply to ``rows(…)``. Raises StoreError.

        Views of the file where they lie in one chunk: decoded a few at a time, they stay in caches.
        """
        specs = [self.specs["rows"], *([self.specs["scale"]] if "scale" in self.specs else [])]
        parts = []
        for spec in specs:
            found = [
                torch.from_numpy(self._chunk(spec, checkpoint, chunk))[first - low : last - low]
                for chunk, first, last in self._pieces(start, stop)
                for low in [chunk * self.chunk_rows]
            ]
            parts.append(found[0] if len(found) == 1 else torch.cat(found))
        rows = parts[0].view(torch.bfloat16) if self.dtype == "bfloat16" else parts[0]
        return rows, parts[1] if len(parts) > 1 else None

    def embedding(self, checkpoint: int, start: int, stop: int) -> Tensor:
        """Float32 last hidden layer ``[stop - start, hidden]``. Raises StoreError if not stored."""
        if "embedding" not in self.specs:
            raise StoreError(
                "no embedding is stored",
                where=self.folder,
                do="index into a new folder with a model that has a last hidden layer",
            )
        return self._read("embedding", checkpoint, start, stop)

    def gather(self, checkpoint: int, indices: Any) -> Tensor:
        """Float32 rows ``[len(indices), proj]`` of examples anywhere, in the order given.

        Each chunk is opened once and only the pages of the rows asked for are read, after the
        chunk's first check (see the class).
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and not (index.min() >= 0 and index.max() < self.num_rows):
            raise IndexError(f"example {index.min()} … {index.max()} of {self.num_rows}")
        out = torch.empty((len(index), self.dim))
        order = np.argsort(index, kind="stable")
        chunks = index[order] // self.chunk_rows
        borders = np.flatnonzero(np.diff(chunks)) + 1
        for group in np.split(order, borders) if len(index) else []:
            chunk = int(index[group[0]] // self.chunk_rows)
            picked = index[group] - chunk * self.chunk_rows
            part = torch.empty((len(group), self.dim))
            self._decode("rows", checkpoint, chunk, picked, part)
            out[torch.from_numpy(group)] = part
        return out

    def column(self, name: str) -> np.ndarray:
        """A column: ``[n, …]``, or float32 ``[checkpoint, n]`` (loss, p, slope, …).

        ids, sources, groups and texts are strings; ``image`` is uint8. Raises StoreError if a
        chunk is unfinished or damaged, or there is no such column.
        """
        if name not in self.columns():
            raise StoreError(
                f"there is no column {name!r}",
                where=self.folder,
                found=", ".join(self.columns()),
            )
        spec = self.specs[name]
        size, n = spec.chunk_rows, self.num_rows
        places = [(c,) for c in range(self.num_checkpoints)] if spec.per_checkpoint else [()]
        shape = (len(places), n) if spec.per_checkpoint else spec.shape
        out = np.empty(shape, spec.dtype)
        for place in places:
            for chunk, start in enumerate(range(0, n, size)):
                stop = min(start + size, n)
                out[(*place, slice(start, stop))] = self._chunk(spec, *place, chunk)[: stop - start]
        return decode_strings(out) if spec.encoding == "utf-8" else out

    def entries(self, name: str, indices: Any) -> np.ndarray:
        """A column for examples anywhere, ``[len(indices), …]``: not one of each checkpoint.

        For the texts and pictures of large sets: only the pages they are on are read, after the
        first check of a chunk (see the class). Raises StoreError as :meth:`column` does.
        """
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if name not in self.columns() or self.specs[name].per_checkpoint:
            raise StoreError(f"there is no column {name!r} of examples", where=self.folder)
        if len(index) and not (index.min() >= 0 and index.max() < self.num_rows):
            raise IndexError(f"example {index.min()} … {index.max()} of {self.num_rows}")
        spec = self.specs[name]
        out = np.empty((len(index), *spec.shape[1:]), spec.dtype)
        for chunk in np.unique(index // spec.chunk_rows):
            here = index // spec.chunk_rows == chunk
            pick = index[here] - chunk * spec.chunk_rows
            out[here] = self._picked(spec, (int(chunk),), pick)
        return decode_strings(out) if spec.encoding == "utf-8" else out

    def _read(self, name: str, checkpoint: int, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"examples {start}:{stop} of {self.num_rows}")
        out = torch.empty((stop - start, self.specs[name].shape[2]))
        for chunk, first, last in self._pieces(start, stop):
            self._look_ahead(name, checkpoint, chunk)
            offset = chunk * self.chunk_rows
            local = slice(first - offset, last - offset)
            self._decode(name, checkpoint, chunk, local, out[first - start : last - start])
        return out

    def _look_ahead(self, name: str, checkpoint: int, chunk: int) -> None:
        """Who reads a chunk of rows reads on: those of a remote table are fetched meanwhile."""
        if self._is_remote:
            places = [(checkpoint, i) for i in range(chunk, self.num_chunks)][: AHEAD + 1]
            keys = [self.specs[name].key(*place) for place in places]
            known = self._marks_at_first
            self._chunks.ahead(
                (key, known[place].files[key])
                for key, place in zip(keys, places, strict=True)
                if place in known
            )

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            chunk = start // self.chunk_rows
            last = min(stop, (chunk + 1) * self.chunk_rows)
            yield chunk, start, last
            start = last

    def _decode(
        self, name: str, checkpoint: int, chunk: int, pick: slice | np.ndarray, out: Tensor
    ) -> None:
        spec = self.specs[name]
        scale = None
        if spec.encoding == "int8":
            scale = self._picked(self.specs["scale"], (checkpoint, chunk), pick)
        decode_rows(self._picked(spec, (checkpoint, chunk), pick), scale, out)

    def _chunk(self, spec: ArraySpec, *grid: int) -> np.ndarray:
        """The stored chunk ``[chunk_rows, …]`` as a view of its file, checked."""
        if spec.per_checkpoint and not 0 <= grid[0] < self.num_checkpoints:
            raise IndexError(f"checkpoint {grid[0]} of {self.num_checkpoints}")
        key, wanted = spec.key(*grid), spec.num_bytes + TRAILER
        data = self._chunks.whole(key, lambda: self._entry(spec, grid))
        if isinstance(data, str):
            self._entry(spec, grid)  # says so if the chunk was never finished
            if data == "torn":
                stat = stat_file(self.folder / key)
                raise self._error("a chunk file is torn", key, stat and stat.size, wanted)
            found = "its checksum does not match" if data == "altered" else None
            what = "a chunk file was altered" if data == "altered" else "a chunk file is missing"
            raise self._error(what, key, found)
        if len(data) != wanted:
            raise self._error("a chunk file is torn", key, len(data), wanted)
        return spec.unpack(data[:-TRAILER])

    def _picked(
        self, spec: ArraySpec, grid: tuple[int, ...], pick: slice | np.ndarray
    ) -> np.ndarray:
        """Rows ``[len(pick), …]`` of a stored chunk."""
        if isinstance(pick, np.ndarray):
            key = spec.key(*grid)
            few = self._chunks.rows(key, lambda: self._entry(spec, grid), pick, spec.row_bytes)
            if few is not None:
                return spec.unpack_rows(few)
        return self._chunk(spec, *grid)[pick]

    def _entry(self, spec: ArraySpec, grid: tuple[int, ...]) -> Entry:
        if not spec.per_checkpoint:
            entry = self.static.files.get(spec.key(*grid))
            if entry is None:
                raise self._error("a chunk file has no mark", spec.key(*grid))
            return entry
        mark = self._marks_at_first.get(grid) if self._is_remote else self.mark(*grid)
        if mark is None:
            key = chunk_mark(*grid)
            raise self._unfinished(f"chunk {grid[1]} of checkpoint {grid[0]}", self.folder / key)
        return mark.files[spec.key(*grid)]

    @property
    def _is_remote(self) -> bool:
        return isinstance(self.folder, Remote)

    @cached_property
    def _marks_at_first(self) -> dict[tuple[int, ...], Mark]:
        """All marks at once: a remote table is read as it was when its first chunk was."""
        return dict(self.marks(list_files(self.folder)).items())

    def _unfinished(self, what: str, where: object) -> StoreError:
        return StoreError(
            f"{what} of {self.name!r} not computed yet", where=where, do=redo(self.name)
        )

    def _error(
        self, what: str, key: str, found: object = None, wanted: object = None
    ) -> StoreError:
        path = self.folder / key
        do = cure(self.path, self.name)
        if wanted is not None:
            found, wanted = f"{found} bytes", f"{wanted} bytes"
        return StoreError(what, where=path, found=found, wanted=wanted, do=do)
