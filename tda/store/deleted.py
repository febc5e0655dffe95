"""Examples that no longer count: named in the manifest, left where they are until `tda compact`.

    data.train.deleted = "3 17-20"      positions in the table, ascending, both ends included

Whoever reads sees a table without them, in which positions are those of the rest; whoever writes
sees the table as it is stored.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import DataError, StoreError
from tda.store.arrays import CHECKPOINT
from tda.store.files import Place
from tda.store.manifest import NAME, TRAIN
from tda.store.table import Table

KEY = "deleted"
_RANGES = re.compile(r"[0-9]{1,15}(-[0-9]{1,15})?( [0-9]{1,15}(-[0-9]{1,15})?)*")
_AS_STORED = {"path", "name", "folder", "manifest", "num_checkpoints", "dim", "hidden", "dtype"}
_AS_STORED |= {"chunk_rows", "columns", "missing", "require_complete"}
_SHARES = ("curvature", "weight")  # of the table ``curvature``: they count rows and examples


def deleted_positions(
    manifest: Mapping[str, Any], run: Place, num_stored: int | None = None
) -> np.ndarray:
    """Positions of the deleted training examples, ascending int64. Raises StoreError if absurd.

    num_stored: of rows that are there, where that is known better than from the manifest.
    """
    ends = _ranges(manifest, run, num_stored)
    pieces = [np.arange(first, last + 1) for first, last in ends]
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64)


def num_deleted(manifest: Mapping[str, Any], run: Place) -> int:
    """How many training examples are deleted, without listing them. Raises StoreError."""
    return sum(last + 1 - first for first, last in _ranges(manifest, run, None))


def _ranges(
    manifest: Mapping[str, Any], run: Place, num_stored: int | None
) -> list[tuple[int, int]]:
    record = manifest["data"].get(TRAIN, {})
    text = record.get(KEY)
    if text is None:
        return []
    if isinstance(text, str) and _RANGES.fullmatch(text):
        spelled = [range_.partition("-") for range_ in text.split(" ")]
        ends = [(int(first), int(last or first)) for first, _, last in spelled]
        ordered = all(first <= last for first, last in ends) and all(
            before[1] < after[0] for before, after in pairwise(ends)
        )
        num_rows = record["num_rows"] if num_stored is None else num_stored
        if ordered and ends[-1][1] < min(record["num_rows"], num_rows):
            return ends
    raise StoreError(
        "the list of deleted examples makes no sense",
        where=f"{run / NAME}, data.{TRAIN}.{KEY}",
        found=repr(text)[:80],
        wanted='ascending positions below num_rows, such as "3 17-20"',
        do="restore the manifest from a copy",
    )


def with_deleted(manifest: Mapping[str, Any], positions: np.ndarray) -> dict[str, Any]:
    """The manifest that says that these training examples, and no others, are deleted."""
    record = {k: v for k, v in manifest["data"][TRAIN].items() if k != KEY}
    if len(positions):
        runs = np.split(positions, np.flatnonzero(np.diff(positions) > 1) + 1)
        spelled = (f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
        record[KEY] = " ".join(spelled)
    return {**manifest, "data": {**manifest["data"], TRAIN: record}}


def places(train: Table, ids: Sequence[str]) -> np.ndarray:
    """Positions of these examples in the stored table. Raises DataError naming one it lacks."""
    known = {name: place for place, name in enumerate(train.column("id").tolist())}
    absent = [name for name in ids if name not in known]
    if absent:
        raise DataError(
            "there is no training example of this id",
            where=train.folder,
            found=", ".join(map(repr, absent[:5])) + (" …" if len(absent) > 5 else ""),
            do="`run.ids` lists those there are",
        )
    return np.array([known[name] for name in ids], np.int64)


def without_deleted(table: Table) -> Table | Remaining:
    """The table as readers see it. Raises StoreError if nothing would be left."""
    if KEY not in table.manifest["data"].get(TRAIN, {}):
        return table
    train = table if table.name == TRAIN else Table(table.path, TRAIN)
    deleted = deleted_positions(table.manifest, table.path, train.num_rows)
    if table is train:
        return Remaining(table, np.delete(np.arange(table.num_rows), deleted))
    gone = train.entries("id", deleted)
    kept = np.flatnonzero(~np.isin(table.column("example"), gone))
    if not len(kept):
        raise StoreError(
            "all rows of the curvature table belong to deleted examples",
            where=table.folder,
            do="`tda compact` the run, then call run.add_curvature(train) again",
        )
    rows = len(kept) / table.num_rows
    examples = 1 - len(deleted) / train.num_rows
    return Remaining(table, kept, rows / examples)


@dataclass(frozen=True)
class Remaining:
    """A table without its deleted rows; stands in for it wherever it is read. What knows of rows
    is here, and what does not is the stored table's.

    kept: the positions that are left, ascending. share: what multiplies the weights of curvature
    rows: R/(n π) of R rows and n examples becomes R'/(n' π) of those that are left, and the mean
    over them is the estimate of G for them alone.
    """

    stored: Table
    kept: np.ndarray
    share: float = 1.0

    def __repr__(self) -> str:
        return f"{self.stored!r} without {self.stored.num_rows - self.num_rows} deleted"

    def __getattr__(self, name: str) -> Any:
        if name in _AS_STORED:
            return getattr(self.stored, name)
        raise AttributeError(f"a table without its deleted rows has no {name!r}")

    @property
    def num_rows(self) -> int:
        return len(self.kept)

    def rows(self, checkpoint: int, start: int, stop: int) -> Tensor:
        return torch.cat(
            [self.stored.rows(checkpoint, *span)[pick] for span, pick in self._spans(start, stop)]
        )

    def coded_rows(self, checkpoint: int, start: int, stop: int) -> tuple[Tensor, Tensor | None]:
        spans = self._spans(start, stop)
        found = [(self.stored.coded_rows(checkpoint, *span), pick) for span, pick in spans]
        factors = [factor[pick] for (_, factor), pick in found if factor is not None]
        whole = torch.cat([rows[pick] for (rows, _), pick in found])
        return whole, torch.cat(factors) if factors else None

    def embedding(self, checkpoint: int, start: int, stop: int) -> Tensor:
        spans = self._spans(start, stop)
        return torch.cat([self.stored.embedding(checkpoint, *span)[pick] for span, pick in spans])

    def gather(self, checkpoint: int, indices: Any) -> Tensor:
        return self.stored.gather(checkpoint, self._stored(indices))

    def column(self, name: str) -> np.ndarray:
        values = self.stored.column(name)
        axis = 1 if self.stored.specs[name].axes[0] == CHECKPOINT else 0
        left = np.take(values, self.kept, axis)
        return left * np.float32(self.share) if name in _SHARES and self.share != 1 else left

    def entries(self, name: str, indices: Any) -> np.ndarray:
        return self.stored.entries(name, self._stored(indices))

    def _stored(self, indices: Any) -> np.ndarray:
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and not (index.min() >= 0 and index.max() < self.num_rows):
            raise IndexError(f"example {index.min()} … {index.max()} of {self.num_rows}")
        return self.kept[index]

    def _spans(self, start: int, stop: int) -> list[tuple[tuple[int, int], Any]]:
        """Stretches of the stored table, and which of their rows are left.

        A hole wider than a chunk is not read, so that no stretch is much longer than what it holds.
        """
        if not 0 <= start <= stop <= self.num_rows:
            raise IndexError(f"examples {start}:{stop} of {self.num_rows}")
        wanted = self.kept[start:stop]
        if not len(wanted):
            return [((0, 0), slice(None))]
        found = []
        for piece in np.split(wanted, np.flatnonzero(np.diff(wanted) > self.chunk_rows) + 1):
            first, last = int(piece[0]), int(piece[-1]) + 1
            whole = last - first == len(piece)
            found.append(((first, last), slice(None) if whole else torch.from_numpy(piece - first)))
        return found
