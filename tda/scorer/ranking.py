"""The k best and worst training examples of each query, kept while scores stream by.

Equal scores are ordered by train index, whatever the order of tiles or of threads.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tda.errors import RecipeError

if TYPE_CHECKING:
    from tda.store import Table


Found = tuple[np.ndarray, np.ndarray]  # (columns [m, k], values [m, k]), smallest value first


@dataclass(frozen=True)
class Ranking:
    """Training examples per query, best first: ids [m, k], indices [m, k] int64, scores float32."""

    ids: np.ndarray
    indices: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class TopK:
    """The k most positive and the k most negative scores of each query.

    Ties go to the smaller train index. ``recall`` is None for an exact search, else the measured
    share of the exact answer that this search finds.
    """

    proponents: Ranking
    opponents: Ranking
    recall: float | None = None


def clipped(k: int, num_rows: int) -> int:
    """k, a whole number ≥ 1 (RecipeError if not), or n if there are fewer training examples."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
        raise RecipeError("k is not a count", found=repr(k), wanted="a whole number ≥ 1")
    return min(int(k), num_rows)


def ranked(
    train: Table,
    best: Found,
    worst: Found,
    recall: float | None = None,
) -> TopK:
    """A TopK from (indices, scores) of both ends, already in order."""
    named, place = np.unique(np.concatenate([best[0], worst[0]]), return_inverse=True)
    ids = train.entries("id", named)[place].reshape(2, *best[0].shape)
    proponents, opponents = (
        Ranking(*found) for found in zip(ids, *zip(best, worst, strict=True), strict=True)
    )
    return TopK(proponents, opponents, recall)


class Heaps:
    """The k smallest values of each of m rows that come in tiles of columns.

    ``values[:, 0]`` is the kth so far. Tiles come in ascending columns. FAISS orders equal ones by
    column, and an equal late-comer never replaces what is held: so of equal values the smallest
    columns stay, in ascending order.
    """

    def __init__(self, num_rows: int, k: int) -> None:
        import faiss

        self.values = np.empty((num_rows, k), np.float32)
        self.columns = np.empty((num_rows, k), np.int64)
        self._heap: Any = faiss.float_maxheap_array_t()
        self._heap.nh, self._heap.k = num_rows, k
        self._heap.val, self._heap.ids = faiss.swig_ptr(self.values), faiss.swig_ptr(self.columns)
        self._heap.heapify()

    def add(self, tile: Tensor, first_column: int, first_row: int = 0) -> None:
        """tile [r, width] float32, contiguous: rows first_row.., columns first_column.., of all."""
        import faiss

        limit_faiss_threads()
        values = faiss.swig_ptr(tile.numpy())
        self._heap.addn(tile.shape[1], values, first_column, first_row, len(tile))

    def finish(self) -> Found:
        """(columns, values) [m, k], smallest first; call once."""
        self._heap.reorder()
        return self.columns, self.values


def merged(parts: Sequence[Found], k: int) -> Found:
    """The k smallest of each row, from those of ranges of columns in ascending order."""
    columns, values = (np.concatenate(arrays, axis=1) for arrays in zip(*parts, strict=True))
    order = np.argsort(values, axis=1, kind="stable")[:, :k]  # of equal values the first column
    return np.take_along_axis(columns, order, 1), np.take_along_axis(values, order, 1)


def limit_faiss_threads() -> None:
    """As many as PyTorch may use, of the cores this process has: more make FAISS 7× slower."""
    import faiss

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    faiss.omp_set_num_threads(max(1, min(torch.get_num_threads(), cores or 1)))
