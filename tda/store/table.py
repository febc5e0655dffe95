"""One table of a run – ``train`` or a query set – with rows and columns by example."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import StoreError
from tda.store.bounds import DOCUMENT_BYTES
from tda.store.chunks import Chunks
from tda.store.encoding import BLOCKS, decode_strings, unpacked
from tda.store.files import (
    Place,
    Remote,
    Stat,
    list_files,
    read_file,
    read_files,
    remove_unfinished,
    stat_file,
)
from tda.store.incoming import encode_chunk
from tda.store.manifest import config_hash, entries_of, read_manifest, rows_depend_on
from tda.store.marks import (
    STATIC,
    Mark,
    adopt,
    chunk_mark,
    have_sizes,
    put_marked,
    read_mark,
    unfinished_marks,
)
from tda.store.reading import Reading, damaged, open_specs, unfinished

_NUMBERS = frozenset(("rows", "scale", "embedding"))  # read by their own methods


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
        chunks = chunks or Chunks(self.folder)
        self.static = self._open_static()
        self.specs = open_specs(self, chunks)
        self._reading = Reading(self, chunks)

    def __reduce__(self) -> tuple:
        return Table, (self.path.absolute(), self.name)  # a worker may run in another folder

    def __repr__(self) -> str:
        return f"Table({str(self.folder)!r}, num_rows={self.num_rows}, dim={self.dim})"

    def _open_static(self) -> Mark:
        mark = read_mark(self.folder / STATIC)
        if mark is None:
            raise damaged(self, "this table is not ready or its mark is damaged", STATIC)
        return mark

    # ---- shape

    @property
    def num_rows(self) -> int:
        return self.specs["rows"].shape[1]

    @property
    def num_checkpoints(self) -> int:
        return len(self.manifest["checkpoints"])

    @property
    def dim(self) -> int:
        return self.manifest["projection"]["dim"]

    @property
    def hidden(self) -> int | None:
        """Width of the stored embedding, if there is one."""
        return self.specs["embedding"].shape[2] if "embedding" in self.specs else None

    @property
    def dtype(self) -> str:
        """bfloat16, float32, int8, int4 or ternary: how the rows are stored."""
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
            raise unfinished(
                self,
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
        examples = blake2b(self._digests[start:stop].tobytes(), digest_size=16).hexdigest()
        return config_hash(
            self._alike[checkpoint] | entries_of({"rows": [start, stop], "examples": examples})
        )

    @cached_property
    def _alike(self) -> list[dict[str, bytes]]:
        """Of each checkpoint: the entries of the configuration that all its chunks share."""
        own = {
            "dtype": self.dtype,
            "dim": self.dim,
            "hidden": self.hidden,
            "chunk_rows": self.chunk_rows,
        }
        checkpoints = range(self.num_checkpoints)
        return [entries_of({**rows_depend_on(self.manifest, c), **own}) for c in checkpoints]

    @cached_property
    def _digests(self) -> np.ndarray:
        return self.column("digest")

    # ---- writing

    def write(self, *given: Any) -> None:
        """Store one chunk of one checkpoint and mark it complete: :meth:`put`, then finish it."""
        self.put(*given)()

    def put(
        self,
        checkpoint: int,
        chunk: int,
        rows: np.ndarray | Tensor,
        columns: Mapping[str, np.ndarray],
        embedding: np.ndarray | Tensor | None = None,
    ) -> Callable[[], None]:
        """Write one chunk of one checkpoint; returns what finishes it. One writer a chunk.

        rows: ``[r, proj]`` with r the examples of ``chunk_range(chunk)``; columns: ``[r]`` for each
        of loss, p, slope, curvature, grad_norm; embedding: ``[r, hidden]`` if the table has one.
        All float32; what is stored in bfloat16 may come so.
        From here on a killed process does not lose it (:meth:`recover`), but nobody reads it before
        its mark is there, after everything else is on the disk; in object storage both is at once.
        Raises GradientError naming the example if a number is not finite (p may be NaN), StoreError
        for a wrong shape or a failing disk: then the chunk stays unfinished and everything else is
        untouched.
        """
        given = {"rows": rows, **columns}
        if embedding is not None:
            given["embedding"] = embedding
        parts = encode_chunk(self, chunk, given)
        specs = ((self.specs[name], values) for name, values in parts.items())
        files = ((spec.key(checkpoint, chunk), spec.pack(v)) for spec, v in specs)
        mark, config = chunk_mark(checkpoint, chunk), self._config(checkpoint, chunk)
        return put_marked(self.folder, mark, files, self.chunk_range(chunk), config)

    def recover(self) -> int:
        """Finish the chunks that killed writers had put, and remove what else they left.

        Returns how many were finished. When no writer is at work.
        """
        if isinstance(self.folder, Remote):
            return 0  # an object is never half there
        count = 0
        left = list(unfinished_marks(self.folder))
        missing = {chunk_mark(*place): place for place in (self.missing() if left else ())}
        for key, name in left:
            place = missing.get(key)
            if place is not None:
                mark = self._valid(place, read_file(self.folder / name, DOCUMENT_BYTES))
                if mark is not None and adopt(self.folder, key, mark, name):
                    count += 1
                    del missing[key]
        remove_unfinished(self.folder)
        return count

    # ---- reading

    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        """Float32 rows ``[stop - start, proj]``, decoded and checked. Raises StoreError."""
        return self._read("rows", checkpoint, start, stop)

    def coded_rows(self, checkpoint: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        """(rows ``[stop - start, proj]`` as products take them: float32, bfloat16 or int8, factor
        ``[stop - start]`` of int8), which multiply to ``rows(…)``. Raises StoreError.

        Views of the file where they lie in one chunk: decoded a few at a time, they stay in caches.
        Those of int4 and ternary are unpacked to bfloat16.
        """
        specs = [self.specs["rows"], *([self.specs["scale"]] if "scale" in self.specs else [])]
        parts = []
        for spec in specs:
            found = []
            for chunk, first, last in self._pieces(start, stop):
                whole, low = self._reading.chunk(spec, checkpoint, chunk), chunk * self.chunk_rows
                found.append(torch.from_numpy(whole)[first - low : last - low])
            parts.append(found[0] if len(found) == 1 else torch.cat(found))
        rows = parts[0]
        if self.dtype in BLOCKS:
            rows = unpacked(rows, self.dtype, self.dim)
        elif self.dtype == "bfloat16":
            rows = rows.view(torch.bfloat16)
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
        index = self._positions(indices)
        out = torch.empty((len(index), self.dim))
        order = np.argsort(index, kind="stable")
        chunks = index[order] // self.chunk_rows
        borders = np.flatnonzero(np.diff(chunks)) + 1
        for group in np.split(order, borders) if len(index) else []:
            chunk = int(index[group[0]] // self.chunk_rows)
            picked = index[group] - chunk * self.chunk_rows
            part = torch.empty((len(group), self.dim))
            self._reading.decode("rows", checkpoint, chunk, picked, part)
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
                out[(*place, slice(start, stop))] = self._reading.chunk(spec, *place, chunk)[
                    : stop - start
                ]
        return decode_strings(out) if spec.encoding == "utf-8" else out

    def entries(self, name: str, indices: Any) -> np.ndarray:
        """A column for examples anywhere, ``[len(indices), …]``: not one of each checkpoint.

        For the texts and pictures of large sets: only the pages they are on are read, after the
        first check of a chunk (see the class). Raises StoreError as :meth:`column` does.
        """
        if name not in self.columns() or self.specs[name].per_checkpoint:
            raise StoreError(f"there is no column {name!r} of examples", where=self.folder)
        index = self._positions(indices)
        spec = self.specs[name]
        out = np.empty((len(index), *spec.shape[1:]), spec.dtype)
        for chunk in np.unique(index // spec.chunk_rows):
            here = index // spec.chunk_rows == chunk
            pick = index[here] - chunk * spec.chunk_rows
            out[here] = self._reading.picked(spec, (int(chunk),), pick)
        return decode_strings(out) if spec.encoding == "utf-8" else out

    def _positions(self, indices: Any) -> np.ndarray:
        """int64 ``[len(indices)]``. Raises IndexError where there is no such example."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and not (index.min() >= 0 and index.max() < self.num_rows):
            raise IndexError(f"example {index.min()} … {index.max()} of {self.num_rows}")
        return index

    def _read(self, name: str, checkpoint: int, start: int, stop: int) -> Tensor:
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"examples {start}:{stop} of {self.num_rows}")
        out = torch.empty((stop - start, self.dim if name == "rows" else self.hidden or 0))
        for chunk, first, last in self._pieces(start, stop):
            self._reading.ahead(name, checkpoint, chunk)
            offset = chunk * self.chunk_rows
            local = slice(first - offset, last - offset)
            self._reading.decode(name, checkpoint, chunk, local, out[first - start : last - start])
        return out

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        while start < stop:
            chunk = start // self.chunk_rows
            last = min(stop, (chunk + 1) * self.chunk_rows)
            yield chunk, start, last
            start = last
