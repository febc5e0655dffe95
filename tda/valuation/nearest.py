"""The nearest examples by cosine (FAISS): exact where that takes seconds, else over k-means cells.

An exact search costs m·n products of m queries with n examples. Beyond EXACT of them the examples
are sorted into about 4√n cells and a query looks into the nearest: as many as SCANNED products
allow, and PROBES at least, so that n queries cost about n·√n. What that misses is measured:
``recall`` is the share of the true neighbours found, of some queries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tda.data import evenly
from tda.errors import DataError
from tda.scorer.ranking import limit_faiss_threads

EXACT = 5 * 10**8  # products of a query with an example: 22,000 examples among each other
SCANNED = 10**9
PROBES, MOST_PROBES = 4, 64
AROUND = 16  # neighbours that a space keeps of its examples: copies form chains, votes take 15
SAMPLE = 1024  # examples that a property of the whole is measured on
ROUNDING = 1e-6  # of a cosine in float32
_MEASURED = 256  # queries that recall is measured on
_BLOCK = 2**16  # queries searched at a time
_TRAINED_ON = 40  # examples a cell: fewer make FAISS warn

Closest = tuple[np.ndarray, np.ndarray]  # cosines float32 and cells int64 [query, probe]


@dataclass(frozen=True, eq=False)
class Neighbours:
    """The nearest examples: indices (int32) and cosine ``[query, k]``, nearest first.

    recall: share of the true neighbours that are among them; 1 where the search was exact.
    """

    indices: np.ndarray
    similarity: np.ndarray
    recall: float = 1.0

    def first(self, k: int) -> Neighbours:
        return replace(self, indices=self.indices[:, :k], similarity=self.similarity[:, :k])


class Space:
    """Examples as directions, to be searched. rows ``[example, dim]``: finite numbers."""

    def __init__(self, rows: Any) -> None:
        self.unit = unit(rows)

    def nearest(self, queries: np.ndarray, k: int) -> Neighbours:
        """The k nearest of every query ``[query, dim]`` (of unit length)."""
        k = min(k, len(self.unit))
        if len(queries) * len(self.unit) <= EXACT:
            return Neighbours(*_search(self._flat, queries, k))
        cells, own = self._cells
        closest = own if queries is self.unit else self._closest(cells, queries)
        indices, similarity = _search(cells, queries, k, closest)
        short = np.flatnonzero((indices < 0).any(1))  # its cells hold fewer than k: no −1 goes out
        indices[short], similarity[short] = _search(self._flat, queries[short], k)
        return Neighbours(indices, similarity, self._recall(queries, similarity))

    def others(self, k: int) -> Neighbours:
        """The k nearest others of every example; fewer where there are fewer."""
        k = min(k, len(self.unit) - 1)
        found = self.nearest(self.unit, k + 1)
        itself = found.indices == np.arange(len(self.unit), dtype=np.int32)[:, None]
        itself[~itself.any(1), -1] = True  # among more than k copies of it: drop the last of them
        indices, similarity = (
            of[~itself].reshape(len(self.unit), k) for of in (found.indices, found.similarity)
        )
        return Neighbours(indices, similarity, found.recall)

    @cached_property
    def around(self) -> Neighbours:
        """The AROUND nearest others, searched once for all that ask."""
        return self.others(AROUND)

    @cached_property
    def sample(self) -> np.ndarray:
        """Cosines ``[example, k]`` of SAMPLE examples, evenly spread, and their AROUND nearest."""
        some = evenly(len(self.unit), SAMPLE)
        return self.nearest(self.unit[some], AROUND + 1).similarity[:, 1:]  # the nearest is itself

    @cached_property
    def _flat(self) -> Any:
        import faiss

        index = faiss.IndexFlatIP(self.unit.shape[1])
        index.add(self.unit)
        return index

    @cached_property
    def _cells(self) -> tuple[Any, Closest]:
        """(examples sorted into cells, the closest cells of each example)."""
        import faiss
        from faiss.contrib.ivf_tools import add_preassigned

        limit_faiss_threads()
        n, dim = self.unit.shape
        cells = int(4 * n**0.5)
        index = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, cells, faiss.METRIC_INNER_PRODUCT)
        index.cp.niter = 5
        some = np.random.default_rng(0).choice(n, min(n, _TRAINED_ON * cells), replace=False)
        index.train(self.unit[np.sort(some)])
        own = self._closest(index, self.unit)
        add_preassigned(index, self.unit, np.ascontiguousarray(own[1][:, 0]))
        return index, own

    def _closest(self, index: Any, queries: np.ndarray) -> Closest:
        """Cells to look into, as many as can be afforded."""
        limit_faiss_threads()
        afforded = SCANNED * index.nlist // (len(queries) * len(self.unit))
        probes = min(max(PROBES, afforded), MOST_PROBES, index.nlist)
        return index.quantizer.search(queries, probes)

    def _recall(self, queries: np.ndarray, similarity: np.ndarray) -> float:
        some = evenly(len(queries), _MEASURED)
        k, exact = similarity.shape[1], np.empty(len(some), np.float32)
        for start in range(0, len(some), 16):
            part = torch.from_numpy(queries[some[start : start + 16]] @ self.unit.T)
            exact[start : start + 16] = part.topk(k, dim=1).values[:, -1].numpy()
        return float((similarity[some] >= exact[:, None] - ROUNDING).mean())


def neighbours(rows: Any, k: int) -> Neighbours:
    """The k nearest others of every row; fewer where there are fewer."""
    return Space(rows).others(k)


def unit(rows: Any) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros is like nothing."""
    values = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    if values.ndim != 2 or not torch.isfinite(values).all():
        raise DataError(
            "rows cannot be compared",
            found=f"shape {list(values.shape)}",
            wanted="finite numbers [example, dim]",
        )
    return np.ascontiguousarray(torch.nn.functional.normalize(values, dim=1).numpy())


def _search(
    index: Any, queries: np.ndarray, k: int, closest: Closest | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(indices int32, cosines) ``[query, k]``, a block of queries at a time; in these cells."""
    limit_faiss_threads()
    indices = np.empty((len(queries), k), np.int32)
    similarity = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _BLOCK):
        some = slice(start, start + _BLOCK)
        block = np.ascontiguousarray(queries[some])
        if closest is None:
            similarity[some], indices[some] = index.search(block, k)
        else:
            near, cells = (of[some] for of in closest)
            index.nprobe = cells.shape[1]
            similarity[some], indices[some] = index.search_preassigned(block, k, cells, near)
    return indices, similarity
