"""Blocks of scores, while the training rows stream by: as a matrix, or its ends.

The rows are read once per call, chunk by chunk, the next one while this one is multiplied. Results
do not depend on chunks beyond float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tda.curvature import row_ranges
from tda.errors import StoreError
from tda.malloc import keep_freed
from tda.products import fast_products
from tda.progress import Tick
from tda.reading import ahead
from tda.scorer.prepared import Prepared
from tda.scorer.ranking import Found, Heaps

if TYPE_CHECKING:
    import dask.array as da

    from tda.store import Table

Coded = tuple[Tensor, Tensor | None]

DECODED_BYTES = 8 * 2**20  # float32 rows at a time: enough for BLAS, and caches hold them
AHEAD = 4  # chunks
QUERY_TILE = 1024  # queries multiplied with a tile of rows at a time
TILE_SCORES = 2**24  # at most in a tile: rows of few dimensions come many at a time
BLOCK_BYTES = (32 * 2**20, 256 * 2**20)  # of one task of a full score matrix
TASKS = 256  # Dask's overhead per task is milliseconds: few and coarse


def stream(train: Table, start: int, stop: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(low, high, rows of every checkpoint float32), read ahead and decoded where they are used."""
    size = max(1, DECODED_BYTES // (4 * train.dim))
    for low, high, parts in coded(train, start, stop):
        for first in range(low, high, size):
            last = min(first + size, high)
            cut = slice(first - low, last - low)
            yield first, last, [decoded(x[cut], f if f is None else f[cut]) for x, f in parts]


def coded(train: Table, start: int, stop: int) -> Iterator[tuple[int, int, list[Coded]]]:
    """(low, high, ``Table.coded_rows`` of every checkpoint), read ahead: large chunks as views."""
    keep_freed()
    checkpoints = range(train.num_checkpoints)
    spans = row_ranges(train, start, stop, DECODED_BYTES)
    parts = ((*span, [train.coded_rows(c, *span) for c in checkpoints]) for span in spans)
    return ahead(parts, AHEAD)


def decoded(rows: Tensor, factor: Tensor | None) -> Tensor:
    """Stored rows [r, k] as float32."""
    return rows.float() if factor is None else rows.float().mul_(factor[:, None])


def query_tiles(prepared: Prepared, num_rows: int) -> Iterator[tuple[int, Prepared]]:
    size = max(1, min(QUERY_TILE, TILE_SCORES // max(1, num_rows)))
    for first in range(0, prepared.num_queries, size):
        yield first, prepared.select(slice(first, first + size))


def _tile(prepared: Prepared, rows: list[Tensor], low: int, first_query: int) -> Tensor:
    """Σ_c (Q_c X_cᵀ) · r_c  [m, r] float32; refuses to return a NaN."""
    total = None
    for q, x, weight in zip(prepared.queries, rows, prepared.row_weights, strict=True):
        with fast_products():
            product = (q @ x.T.to(q.dtype)).mul_(weight[low : low + len(x)])
        total = product if total is None else total + product
    assert total is not None
    total = total.float()
    refuse_not_finite(total, first_query, low)
    return total


def refuse_not_finite(scores: Tensor, first_query: int, low: int) -> None:
    """Raises StoreError naming the first of scores [m, r] that is no number."""
    if not torch.isfinite(scores.sum()) and not torch.isfinite(scores).all():
        query, row = (~torch.isfinite(scores)).nonzero()[0].tolist()
        raise StoreError(
            "a score is not a finite number",
            where=f"query {first_query + query}, training example {low + row}",
            found=scores[query, row].item(),
            do="run `tda verify`; if the store is sound, use another recipe, or "
            "dataclasses.replace(recipe, damping=…) with a larger one",
        )


def ends(prepared: Prepared, k: int, span: tuple[int, int], tick: Tick) -> tuple[Found, Found]:
    """The k smallest negated scores, and the k smallest scores, among the rows ``span``."""
    best, worst = (Heaps(prepared.num_queries, k) for _ in range(2))
    for low, high, rows in stream(prepared.train, *span):
        for first, some in query_tiles(prepared, high - low):
            tile = _tile(some, rows, low, first)
            worst.add(tile, low, first)
            best.add(tile.neg_(), low, first)
        tick(high - low)
    return best.finish(), worst.finish()


def block(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Scores of all queries for the training examples [start, stop): [m, stop − start] float32."""
    out = torch.empty(prepared.num_queries, stop - start)
    for low, high, rows in stream(prepared.train, start, stop):
        for first, some in query_tiles(prepared, high - low):
            last = first + some.num_queries
            out[first:last, low - start : high - start] = _tile(some, rows, low, first)
    return out


@dataclass(frozen=True)
class ScoreMatrix:
    """[query, train] float32, computed where it is looked at: what a Dask array is a view of."""

    prepared: Prepared
    dtype = np.dtype(np.float32)
    ndim = 2

    @property
    def shape(self) -> tuple[int, int]:
        return self.prepared.num_queries, self.prepared.train.num_rows

    def __getitem__(self, index: tuple[Any, Any]) -> np.ndarray:
        which, rows = index
        wanted = np.arange(self.shape[1])[rows]
        some = self.prepared.select(np.atleast_1d(np.arange(self.shape[0])[which]))
        low, high = (wanted.min(), wanted.max() + 1) if wanted.size else (0, 0)
        scores = block(some, int(low), int(high)).numpy()
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            scores = scores[:, wanted - low]
        return scores if np.ndim(np.arange(self.shape[0])[which]) else scores[0]


def scores(prepared: Prepared) -> da.Array:
    """All scores as a Dask array [query, train] float32, computed only where it is asked for.

    Runs under any scheduler, and ``.to_zarr(path)`` writes it with one block per worker in memory.
    """
    import dask.array as da

    matrix = ScoreMatrix(prepared)
    chunks = chunk_shape(matrix.shape, prepared.train.chunk_rows)
    return da.from_array(
        matrix, chunks=chunks, name=False, fancy=False, asarray=False, meta=np.empty((0, 0), "f4")
    )


def chunk_shape(shape: tuple[int, int], chunk_rows: int) -> tuple[int, int]:
    """Block [queries, rows] of a full score matrix: whole store chunks, at most 256 MiB."""
    num_queries, num_rows = shape
    smallest, largest = BLOCK_BYTES
    room = min(max(4 * num_queries * num_rows // TASKS, smallest), largest) // 4
    queries = min(max(1, num_queries), max(QUERY_TILE, room // max(1, num_rows)), room)
    rows = max(1, room // queries // chunk_rows) * chunk_rows
    return queries, min(rows, max(1, num_rows))
