"""What needs no gradient, shown beside every answer: a method has to beat these to be of use."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tda.curvature import row_ranges
from tda.errors import StoreError
from tda.scorer.ranking import Heaps, TopK, clipped, ranked
from tda.store import Store, Table

_TILE = 1024  # queries at a time


def embedding_top_k(
    store: Store, queries: Table, k: int, only: Sequence[int] | None = None
) -> TopK:
    """Nearest and farthest training examples: cos(h_q, h_i), h the last hidden layer.

    At the last checkpoint; ``only``: of some of the queries, in this order. Raises StoreError where
    the run holds no embeddings.
    """
    train = store.table("train")
    for table in (train, queries):
        table.require_complete()
        if not table.hidden:
            raise StoreError(
                "the run holds no embeddings",
                where=store.path,
                do="index a model whose last layer is linear, or do without this baseline",
            )
    last = train.num_checkpoints - 1
    k = clipped(k, train.num_rows)
    wanted = _unit(torch.cat([queries.embedding(last, *span) for span in row_ranges(queries)]))
    wanted = wanted if only is None else wanted[list(only)]
    best, worst = Heaps(len(wanted), k), Heaps(len(wanted), k)
    for start, stop in row_ranges(train):
        rows = _unit(train.embedding(last, start, stop))
        for first in range(0, len(wanted), _TILE):
            cosine = wanted[first : first + _TILE] @ rows.T
            worst.add(cosine, start, first)
            best.add(cosine.neg(), start, first)
    indices, negated = best.finish()
    return ranked(train, (indices, -negated), worst.finish())


def _unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1)
