"""Scores of training examples for queries, as streamed blocks of inner products.

``prepare`` folds the whole method into the queries and one number per training row; what remains is
    score[q, i] = Σ_c ⟨Q_c[q], ∇f_{i,c}⟩ · r[c, i]
whatever the recipe. The rows are read once per call, chunk by chunk, the next one while this one is
multiplied. Results do not depend on chunks beyond float32 rounding.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from tda.cluster import run, shares
from tda.curvature import row_ranges
from tda.errors import RecipeError, StoreError
from tda.malloc import keep_freed
from tda.products import fast_products
from tda.progress import Tick
from tda.recipe import Recipe
from tda.scorer.embedding import Embedding, reciprocal
from tda.scorer.operators import Operators
from tda.scorer.ranking import Found, Heaps, Ranking, TopK, clipped, merged, ranked

if TYPE_CHECKING:
    import dask.array as da

    from tda.store import Store, Table

__all__ = [
    "Prepared",
    "Ranking",
    "ScoreMatrix",
    "TopK",
    "block",
    "damping_used",
    "prepare",
    "scores",
    "self_influence",
    "stream",
    "top_k",
]

T = TypeVar("T")
Coded = tuple[Tensor, Tensor | None]

DECODED_BYTES = 8 * 2**20  # float32 rows at a time: enough for BLAS, and caches hold them
AHEAD = 4  # chunks
QUERY_TILE = 1024  # queries multiplied with a tile of rows at a time
TILE_SCORES = 2**24  # at most in a tile: rows of few dimensions come many at a time
BLOCK_BYTES = (32 * 2**20, 256 * 2**20)  # of one task of a full score matrix
TASKS = 256  # Dask's overhead per task is milliseconds: few and coarse


@dataclass(frozen=True)
class Prepared:
    """A query set under a recipe.

    queries: C arrays [m, k], float32, or float64 where float32 would lose their small parts.
    row_weights: [C, n] float32. damping: λ of every checkpoint; empty without a curvature.
    """

    recipe: Recipe
    train: Table
    queries: tuple[Tensor, ...]
    row_weights: Tensor
    damping: tuple[float, ...] = ()

    @property
    def num_queries(self) -> int:
        return len(self.queries[0])

    def select(self, which: slice | np.ndarray) -> Prepared:
        """The same for some of the queries."""
        return replace(self, queries=tuple(q[which] for q in self.queries))


def prepare(store: Store, recipe: Recipe, queries: Table) -> Prepared:
    """Preconditions, normalises and weights a stored query set; reads the training rows only to
    find a curvature or the training norms, once per store (then ``cache/`` has them).

    Raises StoreError if a table is unfinished, RecipeError if the run lacks what the recipe needs.
    """
    embedding = Embedding.of(store, recipe, queries)
    weights = embedding.query_weights()
    folded, damping = [], []
    for group in embedding.groups:
        folded += [embedding.fold(group, weights[group[0]])] * len(group)
        damping += [embedding.operators.at(group).damping] * len(group)
    known = tuple(damping) if recipe.curvature != "identity" else ()
    rows = embedding.row_weights().float()
    return Prepared(recipe, embedding.train, tuple(folded), rows, known)


def damping_used(store: Store, recipe: Recipe, queries: Table | None = None) -> list[float]:
    """λ of every checkpoint, in units of the curvature's eigenvalues; empty without a curvature.

    Where blocks have their own, its mean over dimensions. ``queries`` matter to recipes whose
    curvature is partly theirs. Raises as `prepare` does.
    """
    if recipe.curvature == "identity":
        return []
    operators = Operators.of(store, recipe, queries)
    return [operators.at(group).damping for group in operators.groups for _ in group]


def self_influence(store: Store, recipe: Recipe) -> np.ndarray:
    """Score of every training example for itself, as if it were also the query [n] float32.

    The diagonal of ``scores`` with the training set as query set, without making the rest:
    scale · Σ_c w_c · w_q w_t ⟨F ∇f, ∇f⟩ / norms, or, for product_of_means, scale ·
    (Σ_c w_c · w_q ⟨F ∇f, ∇f⟩) · (Σ_c w_c · w_t). With both sides of unit F-norm an example scores
    ±1, or 0 if its gradient vanishes.
    """
    embedding = Embedding.of(store, recipe)
    if store.manifest.get("metric") == "adam_update":
        raise RecipeError(
            "self-influence needs each training example as a query, but this run holds its update",
            where=f"recipe {recipe.name!r}",
            do="use a run of another metric",
        )
    query, train = embedding.query_weights(), embedding.train_weights()
    own = embedding.own_products()
    if recipe.normalize != "none":
        norms = [embedding.lengths(c, recipe.norm) for c in range(len(train))]
        shorter = reciprocal(torch.stack(norms))
        if recipe.normalize in ("query", "both"):
            query = query.sign() * shorter
        if recipe.normalize in ("train", "both"):
            train = train.sign() * shorter
    if recipe.combine == "product_of_means":
        total = (embedding.shares * query * own).sum(0) * (embedding.shares * train).sum(0)
    else:
        total = (embedding.shares * query * own * train).sum(0)
    return (embedding.scale * total).numpy().astype(np.float32)


def block(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Scores of all queries for the training examples [start, stop): [m, stop − start] float32."""
    out = torch.empty(prepared.num_queries, stop - start)
    for low, high, rows in stream(prepared.train, start, stop):
        for first, some in query_tiles(prepared, high - low):
            last = first + some.num_queries
            out[first:last, low - start : high - start] = _tile(some, rows, low, first)
    return out


def stream(train: Table, start: int, stop: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(low, high, rows of every checkpoint float32), read ahead and decoded where they are used."""
    size = max(1, DECODED_BYTES // (4 * train.dim))
    for low, high, parts in ahead(coded(train, start, stop)):
        for first in range(low, high, size):
            last = min(first + size, high)
            cut = slice(first - low, last - low)
            yield first, last, [decoded(x[cut], f if f is None else f[cut]) for x, f in parts]


def coded(train: Table, start: int, stop: int) -> Iterator[tuple[int, int, list[Coded]]]:
    """(low, high, ``Table.coded_rows`` of every checkpoint): large chunks one by one, as views."""
    for low, high in row_ranges(train, start, stop, DECODED_BYTES):
        yield low, high, [train.coded_rows(c, low, high) for c in range(train.num_checkpoints)]


def decoded(rows: Tensor, factor: Tensor | None) -> Tensor:
    """Stored rows [r, k] as float32."""
    return rows.float() if factor is None else rows.float().mul_(factor[:, None])


def ahead(items: Iterator[T]) -> Iterator[T]:
    """The same, made in a thread while earlier ones are used."""
    keep_freed()
    done = object()
    with ThreadPoolExecutor(max_workers=1) as maker:
        coming = deque(maker.submit(next, items, done) for _ in range(AHEAD))
        while (item := coming.popleft().result()) is not done:
            coming.append(maker.submit(next, items, done))
            yield cast(T, item)


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


def top_k(prepared: Prepared, k: int) -> TopK:
    """The exact k best and worst training examples of every query in one pass over the rows.

    k is clipped to n. Memory: the answer, a few pairs for each score in it, and two tiles of rows;
    the full matrix is never made. Products are float32, or bfloat16 with what those leave in doubt
    scored again (see ``shortlist``). The workers of an open cluster have ranges of the rows.
    """
    return _top_k(prepared, clipped(k, prepared.train.num_rows), shortened=True)


def plain_top_k(prepared: Prepared, k: int) -> TopK:
    """``top_k`` by products in the precision of the queries alone; k ≤ n."""
    return _top_k(prepared, k, shortened=False)


def _top_k(prepared: Prepared, k: int, shortened: bool) -> TopK:
    spans = shares(prepared.train.num_rows, prepared.train.chunk_rows, each=2)
    parts = run(Ends(prepared, k, shortened), spans)
    best, worst = (merged([part[end] for part in parts], k) for end in (0, 1))
    return ranked(prepared.train, (best[0], -best[1]), worst)


@dataclass(frozen=True)
class Ends:
    """The k smallest negated scores, and the k smallest scores, among a range of the rows.

    shortened: by a ``shortlist``, where that is the faster way.
    """

    prepared: Prepared
    k: int
    shortened: bool = False

    def __call__(self, span: tuple[int, int], tick: Tick) -> tuple[Found, Found]:
        from tda.scorer import shortlist

        num_rows = span[1] - span[0]
        k = min(self.k, num_rows)
        if self.shortened and shortlist.pays(self.prepared, k, num_rows):
            return shortlist.ends(self.prepared, k, span, tick)
        best, worst = (Heaps(self.prepared.num_queries, k) for _ in range(2))
        for low, high, rows in stream(self.prepared.train, *span):
            for first, some in query_tiles(self.prepared, high - low):
                tile = _tile(some, rows, low, first)
                worst.add(tile, low, first)
                best.add(tile.neg_(), low, first)
            tick(high - low)
        return best.finish(), worst.finish()
