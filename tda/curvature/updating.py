"""Second moments of a stored table that changes: only the rows that did are read.

    S = Σ h_i x_i x_iᵀ      over the whole chunks of the table as it is stored, deleted rows too

is kept beside the run, with the digest of every chunk's mark: of what it is a sum, to the byte.

appended      the new chunks are added (the last one, until it is full, is read whenever asked)
deleted       Σ_left = S − Σ_deleted, whenever asked: S stays, so that `restore` costs nothing
relabelled    the old rows are taken out of S and the new put in, while `relabel` is at it

A difference has the error eps·tr(S) of its minuend. So where more than half is gone, of the rows or
of a trace, what is left is summed anew, and a kept sum that has lost as much is dropped.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from tda.cache import Arrays, read_arrays, write_arrays
from tda.cluster import run, shares
from tda.curvature.moments import TILE_BYTES, Diagonal, Gram, Part, Picked, Sums
from tda.store import Remaining, Table
from tda.store.files import list_files
from tda.store.manifest import CURVATURE, TRAIN

_KIND = "sums"
Summed = Gram | Diagonal
Weigh = Callable[[Table, str], Tensor]  # h [C, rows] of a table, by the recipe's name for them


@dataclass(frozen=True)
class About:
    """Which sums: of h x xᵀ over a table's rows at a checkpoint, for blocks of its columns."""

    table: str
    checkpoint: int
    rows: str  # which h
    blocks: tuple[tuple[int, int], ...]
    whole: bool  # the matrix; else its diagonal
    columns: tuple[int, ...] = ()  # the blocks are of these; none: of all

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(*block) for block in self.blocks)

    def file(self, folder: Path) -> Path:
        name = hashlib.sha256(self.to_bytes()).hexdigest()[:32]
        return folder / f"{_KIND}-{name}.npz"

    def to_bytes(self) -> bytes:
        return json.dumps(self.__dict__, sort_keys=True).encode()

    @staticmethod
    def parse(data: bytes) -> About:
        """Raises ValueError, KeyError or TypeError for what is none."""
        given = json.loads(data)
        given["blocks"] = tuple((int(start), int(stop)) for start, stop in given["blocks"])
        given["columns"] = tuple(map(int, given["columns"]))
        return About(**given)


@dataclass(frozen=True)
class Kept:
    """chunks ``[m, 16]``: digests of the marks of the first m, of whose rows ``sums`` are.

    spent: by block, the traces that have been subtracted.
    """

    about: About
    chunks: np.ndarray
    sums: list[Summed]
    spent: np.ndarray

    @staticmethod
    def nothing(about: About) -> Kept:
        kind = Gram if about.whole else Diagonal
        sums: list[Summed] = [kind.zero(stop - start) for start, stop in about.blocks]
        return Kept(about, np.empty((0, 16), np.uint8), sums, np.zeros(len(sums)))

    @staticmethod
    def read(path: Path) -> Kept | None:
        """What is kept there, if it is sound."""
        arrays = read_arrays(path)
        try:
            return None if arrays is None else Kept._parse(arrays)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    @staticmethod
    def _parse(arrays: Arrays) -> Kept | None:
        about = About.parse(arrays["about"].tobytes())
        chunks, spent = arrays["chunks"], arrays["spent"]
        count, eps = arrays["numbers"].tolist()
        sums: list[Summed] = []
        for number, (start, stop) in enumerate(about.blocks):
            total, width = torch.from_numpy(arrays[f"total.{number}"]), stop - start
            shape = (width, width) if about.whole else (width,)
            if total.shape != shape or total.dtype != torch.float64 or not total.isfinite().all():
                return None
            found = Gram(total, int(count), eps) if about.whole else Diagonal(total, int(count))
            sums.append(found)
        right = chunks.ndim == 2 and chunks.shape[1] == 16 and chunks.dtype == np.uint8
        return Kept(about, chunks, sums, spent) if right and len(spent) == len(sums) else None

    def write(self, folder: Path) -> None:
        first = self.sums[0]
        numbers = np.array([first.count, first.eps if isinstance(first, Gram) else 0.0])
        arrays = {f"total.{b}": sums.total.numpy() for b, sums in enumerate(self.sums)}
        about = np.frombuffer(self.about.to_bytes(), np.uint8)
        arrays |= {"about": about, "chunks": self.chunks, "spent": self.spent, "numbers": numbers}
        write_arrays(self.about.file(folder), arrays)


def updated(folder: Path, about: About, table: Table | Remaining, weigh: Weigh) -> list[Summed]:
    """Σ h x xᵀ of every block over the rows of a table without its deleted ones.

    Reads the rows that no kept sum accounts for, and those that have been deleted. Raises
    StoreError if a chunk is missing or altered.
    """
    stored, deleted, share = split(table)
    keeps = about.table in (TRAIN, CURVATURE)
    if 2 * len(deleted) > stored.num_rows:
        return _of(table, about, weigh, 0, table.num_rows)
    whole = stored.num_rows // stored.chunk_rows if keeps else 0
    now = digests(stored, about.checkpoint)[:whole]
    kept = Kept.read(about.file(folder))
    if kept is None or kept.about != about or not _begins_with(now, kept.chunks):
        kept = Kept.nothing(about)
    if len(kept.chunks) < whole:
        start, stop = len(kept.chunks) * stored.chunk_rows, whole * stored.chunk_rows
        sums = _merged(kept.sums, _of(stored, about, weigh, start, stop))
        kept = Kept(about, now, sums, kept.spent)
        kept.write(folder)
    rest = _of(stored, about, weigh, whole * stored.chunk_rows, stored.num_rows)
    sums = _merged(kept.sums, rest)
    if len(deleted):
        gone = _at(stored, about, weigh, deleted)
        if any(2 * out.trace > sum_.trace for sum_, out in zip(sums, gone, strict=True)):
            return _of(table, about, weigh, 0, table.num_rows)
        sums = [_without(a, b).scaled(share) for a, b in zip(sums, gone, strict=True)]
    return sums


def take_out(folder: Path, table: Table, positions: np.ndarray, weigh: Weigh) -> None:
    """Subtract rows that are about to become others from all that is kept of a table."""
    _replace(folder, table, positions, weigh, out=True)


def put_in(folder: Path, table: Table, positions: np.ndarray, weigh: Weigh) -> None:
    """Add what these rows have become. What has lost more than half its trace is dropped."""
    _replace(folder, table, positions, weigh, out=False)


def _replace(folder: Path, table: Table, positions: np.ndarray, weigh: Weigh, out: bool) -> None:
    for path in folder.glob(f"{_KIND}-*.npz"):
        kept = Kept.read(path)
        if kept is None or kept.about.table != table.name:
            continue
        now = digests(table, kept.about.checkpoint)[: len(kept.chunks)]
        inside = positions[positions < len(kept.chunks) * table.chunk_rows]
        changed = np.unique(inside // table.chunk_rows)
        before = now.copy()
        if not out:
            before[changed] = 0  # as `take_out` has left them
        if not np.array_equal(before, kept.chunks):
            continue  # a sum of something else: `updated` will see that, too
        part = _at(table, kept.about, weigh, inside)
        if out:
            now[changed] = 0
            sums = [_without(a, b) for a, b in zip(kept.sums, part, strict=True)]
            spent = kept.spent + [gone.trace for gone in part]
        else:
            sums, spent = _merged(kept.sums, part), kept.spent
            if any(2 * lost > sum_.trace for lost, sum_ in zip(spent, sums, strict=True)):
                path.unlink(missing_ok=True)
                continue
        Kept(kept.about, now, sums, spent).write(folder)


def split(table: Table | Remaining) -> tuple[Table, np.ndarray, float]:
    """The table as it is stored, the positions that are deleted, what multiplies weights then."""
    if isinstance(table, Remaining):
        deleted = np.delete(np.arange(table.stored.num_rows), table.kept)
        return table.stored, deleted, table.share
    return table, np.empty(0, np.int64), 1.0


def digests(table: Table, checkpoint: int) -> np.ndarray:
    """``[chunk, 16]`` of the marks of a checkpoint's chunks: equal ones are of equal bytes.

    Zero where there is none.
    """
    found = np.zeros((table.num_chunks, 16), np.uint8)
    for (c, chunk), mark in table.marks(list_files(table.folder)).items():
        if c == checkpoint:
            digest = hashlib.blake2b(mark.to_bytes(), digest_size=16).digest()
            found[chunk] = np.frombuffer(digest, np.uint8)
    return found


def _begins_with(now: np.ndarray, chunks: np.ndarray) -> bool:
    return np.array_equal(now[: len(chunks)], chunks)


def _of(
    table: Table | Remaining, about: About, weigh: Weigh, start: int, stop: int
) -> list[Summed]:
    """The sums over a range of rows, by the open cluster's workers if there is one."""
    none = Kept.nothing(about).sums
    if start == stop:
        return none
    weights = weigh(table, about.rows)[about.checkpoint]  # type: ignore[arg-type]
    rows = Picked(table, torch.tensor(about.columns)) if about.columns else table
    part = Part(rows, about.checkpoint, weights)
    work = Sums((part,), about.slices, frozenset(), about.whole, table.num_rows)
    spans = [(0, start + low, start + high) for low, high in shares(stop - start, table.chunk_rows)]
    return functools.reduce(_merged, run(work, spans), none)


def _at(table: Table, about: About, weigh: Weigh, positions: np.ndarray) -> list[Summed]:
    """The sums over rows anywhere, in float64."""
    sums = Kept.nothing(about).sums
    weights = weigh(table, about.rows)[about.checkpoint] if len(positions) else None
    for some in _groups(positions, max(1, TILE_BYTES // (8 * table.dim))):
        assert weights is not None
        rows = table.gather(about.checkpoint, some).double()
        rows = rows[:, torch.tensor(about.columns)] if about.columns else rows
        h = weights[torch.from_numpy(some)]
        pairs = zip(sums, about.slices, strict=True)
        sums = [each.add(rows[:, block], h) for each, block in pairs]
    return sums


def _groups(positions: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(positions), size):
        yield positions[start : start + size]


def _merged(a: Sequence[Summed], b: Sequence[Summed]) -> list[Summed]:
    return [x.merge(y) for x, y in zip(a, b, strict=True)]  # type: ignore[arg-type]


def _without(a: Summed, b: Summed) -> Summed:
    return a.without(b)  # type: ignore[arg-type]
