"""Scores of chosen pairs of a query and a training row, and the best of them.

A pair's score is one inner product, added up in an order that depends on nothing else: equal rows
have equal scores, to the bit, wherever they are and whatever else is asked.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tda.scorer.blocks import decoded

if TYPE_CHECKING:
    from tda.scorer.prepared import Prepared
    from tda.store import Table

GATHERED_BYTES = 8 * 2**20  # float32 rows read at a time
DIMENSIONS = 256  # added up at a time: that much of these rows, and of queries, stays in a cache


def pair_scores(prepared: Prepared, queries: Tensor, rows: Tensor) -> Tensor:
    """score[queries[p], rows[p]] for different pairs [p] float32. Raises StoreError as a read does.

    Each row is read once, however many pairs it is in.
    """
    size = max(1, GATHERED_BYTES // (4 * prepared.train.dim))
    unique, place = (torch.from_numpy(x) for x in np.unique(rows.numpy(), return_inverse=True))
    keys = (place // size * prepared.num_queries + queries) * size + place % size
    order = torch.from_numpy(np.argsort(keys.numpy()))
    queries, rows, place = queries[order], rows[order], place[order]
    weights = prepared.row_weights[:, rows]
    total = torch.zeros(len(rows), dtype=prepared.queries[0].dtype)
    borders = torch.searchsorted(place // size, torch.arange(-(-len(unique) // size) + 1)).tolist()
    parts = [[x.contiguous() for x in q.split(DIMENSIONS, dim=1)] for q in prepared.queries]
    for number, pairs in enumerate(map(slice, borders, borders[1:])):
        some = unique[number * size : (number + 1) * size]
        for c, q in enumerate(parts):
            read, factor, column = _read(prepared.train, c, some)
            columns = column[place[pairs] - number * size]
            cut = (decoded(x, factor).to(q[0].dtype) for x in read.split(DIMENSIONS, dim=1))
            products = _sampled(q, cut, (len(q[0]), len(read)), queries[pairs], columns)
            total[pairs] += products.mul_(weights[c, pairs])
    return torch.empty(len(rows)).index_put_((order,), total.float())


def _read(train: Table, checkpoint: int, indices: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Rows as they are stored, their factor, and where among them those of the ascending indices
    are.

    Where they lie close, all in between are read as well: that is faster than to pick them.
    """
    first, last = int(indices[0]), int(indices[-1]) + 1
    if last - first < 2 * len(indices):
        return *train.coded_rows(checkpoint, first, last), indices - first
    return train.gather(checkpoint, indices.numpy()), None, torch.arange(len(indices))


def _sampled(
    left: Iterable[Tensor],
    right: Iterable[Tensor],
    shape: tuple[int, int],
    rows: Tensor,
    columns: Tensor,
) -> Tensor:
    """Σ ⟨left[r], right[c]⟩ of every pair, r ascending, over parts of the dimensions."""
    borders = torch.searchsorted(rows, torch.arange(shape[0] + 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse", category=UserWarning)
        total = None
        for x, y in zip(left, right, strict=True):
            if total is None:
                zero = torch.zeros(len(rows), dtype=x.dtype)
                total = torch.sparse_csr_tensor(borders, columns, zero, shape)
            torch.sparse.sampled_addmm(total, x, y.contiguous().T, out=total)
    assert total is not None
    return total.values()


def greatest(
    values: Tensor, queries: Tensor, rows: Tensor, num_queries: int, k: int
) -> tuple[Tensor, Tensor]:
    """(rows, values) [num_queries, k] of the k greatest of every query, equal ones by row.

    Pairs [p] in ascending order of (query, row), at least k of every query that has any. Of one
    that has none the values are −∞.
    """
    if not len(rows):
        empty = torch.zeros(num_queries, k, dtype=torch.int64)
        return empty, torch.full((num_queries, k), -torch.inf)
    lines = _lines(values, queries, num_queries, k)
    kth = torch.from_numpy(np.partition(lines.numpy(), lines.shape[1] - k)[:, -k].copy())
    may = (values >= kth[queries]).nonzero()[:, 0]
    rows, queries = rows[may], queries[may]
    lines = _lines(values[may], queries, num_queries, k)
    ordered, order = lines.sort(dim=1, descending=True, stable=True)
    flat = _starts(queries, num_queries)[:, None] + order[:, :k]
    return rows[flat.clamp(max=len(rows) - 1)], ordered[:, :k].contiguous()


def _lines(values: Tensor, queries: Tensor, num_queries: int, k: int) -> Tensor:
    """The values [p] of each query [num_queries, the most of any, but at least k], then −∞."""
    width = max(k, int(queries.bincount().max()))
    lines = torch.full((num_queries, width), -torch.inf)
    nth = torch.arange(len(queries)) - _starts(queries, num_queries)[queries]
    lines.view(-1)[queries * width + nth] = values
    return lines


def _starts(queries: Tensor, num_queries: int) -> Tensor:
    counts = queries.bincount(minlength=num_queries)
    return counts.cumsum(0) - counts
