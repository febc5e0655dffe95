"""Scores of training examples for queries, as streamed blocks of inner products.

``prepare`` folds the whole method into the queries and one number per training row; what remains is
    score[q, i] = Σ_c ⟨Q_c[q], ∇f_{i,c}⟩ · r[c, i]
whatever the recipe. The rows are read once per call, chunk by chunk, the next one while this one is
multiplied. Products are float32; results do not depend on chunks beyond float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from tda.cache import Cache
from tda.curvature import diagonal, gram, row_ranges
from tda.errors import RecipeError, StoreError
from tda.preconditioner import (
    SpectralFunction,
    Spectrum,
    absolute_damping,
    decompose,
    identity,
    inverse,
    nothing,
)
from tda.ranking import Heaps, Ranking, TopK, clipped, ranked
from tda.recipe import Recipe

if TYPE_CHECKING:
    import dask.array as da

    from tda.store import Store, Table

__all__ = [
    "Prepared",
    "Ranking",
    "ScoreMatrix",
    "TopK",
    "block",
    "prepare",
    "scores",
    "self_influence",
    "stream",
    "top_k",
]

QUERY_TILE = 1024  # queries multiplied with a tile of rows at a time: bounds the tile of scores
BLOCK_BYTES = (32 * 2**20, 256 * 2**20)  # of one task of a full score matrix
TASKS = 256  # Dask's overhead per task is milliseconds: few and coarse


@dataclass(frozen=True)
class Prepared:
    """A query set under a recipe: queries, C arrays [m, k], and row_weights [C, n], all float32."""

    recipe: Recipe
    train: Table
    queries: tuple[Tensor, ...]
    row_weights: Tensor

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
    method = _Method.of(store, recipe)
    queries.require_complete()
    weights = _gradient_weights(queries, recipe.query, method.has_margin)
    folded = [method.fold_queries(queries, c, w) for c, w in enumerate(weights)]
    return Prepared(recipe, method.train, tuple(folded), method.row_weights().float())


def self_influence(store: Store, recipe: Recipe) -> np.ndarray:
    """Score of every training example for itself, as if it were also the query [n] float32.

    The diagonal of ``scores`` with the training set as query set, without making the rest:
    scale · Σ_c w_c · w_q w_t ‖∇f‖_F², or scale · (Σ_c w_c · w_q ‖∇f‖_F²) · (Σ_c w_c · w_t) for
    product_of_means. A normalised side has length 1 (with both, an example scores ±1, or 0 if its
    gradient vanishes).
    """
    method, sides = _Method.of(store, recipe), recipe.normalize
    query = _gradient_weights(method.train, recipe.query, method.has_margin)
    train = method.train_weights()
    lengths = torch.stack([method.lengths(c) for c in range(len(train))])
    one = (lengths > 0).double()
    left = query.sign() * one if sides in ("query", "both") else query * lengths
    if recipe.combine == "product_of_means":
        total = (method.share * left * lengths).sum(0) * (method.share * train).sum(0)
    else:
        right = train.sign() * one if sides in ("train", "both") else train * lengths
        total = (method.share * left * right).sum(0)
    return (method.scale * total).numpy().astype(np.float32)


@dataclass(frozen=True)
class _Method:
    """A recipe bound to a run."""

    recipe: Recipe
    train: Table
    cache: Cache
    has_margin: bool
    checkpoint_weights: list[float]

    @staticmethod
    def of(store: Store, recipe: Recipe) -> _Method:
        train = store.table("train")
        train.require_complete()
        has_margin = bool(store.manifest["measurement"]["has_margin"])
        weights = _checkpoint_weights(store.manifest["checkpoints"], recipe)
        return _Method(recipe, train, Cache.of(store), has_margin, weights)

    @property
    def scale(self) -> float:
        return 1 / self.train.num_rows if self.recipe.scale == "inverse_n" else 1.0

    @property
    def share(self) -> Tensor:
        """w_c [C, 1] float64."""
        return torch.tensor(self.checkpoint_weights, dtype=torch.float64)[:, None]

    def train_weights(self) -> Tensor:
        """w_i,c [C, n] float64."""
        return _gradient_weights(self.train, self.recipe.train, self.has_margin)

    def preconditioner(self, checkpoint: int) -> tuple[Spectrum, SpectralFunction]:
        """H_c's spectrum and F."""
        recipe = self.recipe
        if recipe.curvature == "identity":
            return nothing(self.train.dim), identity
        choices = (checkpoint, recipe.curvature, recipe.curvature_rows)
        arrays = self.cache.get("spectrum", choices, lambda: self._decompose(checkpoint))
        spectrum = Spectrum.from_arrays(arrays)
        where = f"recipe {recipe.name!r}, checkpoint {checkpoint}"
        return spectrum, inverse(absolute_damping(spectrum, recipe.damping, where))

    def _decompose(self, checkpoint: int) -> dict[str, np.ndarray]:
        rows = self.recipe.curvature_rows
        if rows == "link":
            weights = _column(self.train, "curvature")
        else:
            weights = _gradient_weights(self.train, rows, self.has_margin).square()
        moment = gram if self.recipe.curvature == "gram" else diagonal
        return decompose(moment(self.train, checkpoint, weights[checkpoint])).arrays()

    def fold_queries(self, queries: Table, checkpoint: int, weights: Tensor) -> Tensor:
        """scale · w_c · F(H) q [/ ‖q‖_F]  [m, k] float32, computed in float64."""
        spectrum, function = self.preconditioner(checkpoint)
        factor = self.scale * self.checkpoint_weights[checkpoint]
        unit = self.recipe.normalize in ("query", "both")
        folded = torch.empty(queries.num_rows, queries.dim)
        for start, stop in row_ranges(queries):
            q = queries.rows(checkpoint, start, stop).double() * weights[start:stop, None]
            out = spectrum.apply(function, q)
            if unit:
                out *= _reciprocal((q * out).sum(1).clamp(min=0).sqrt())[:, None]
            folded[start:stop] = factor * out
        return folded

    def lengths(self, checkpoint: int) -> Tensor:
        """‖∇f_i,c‖_F of every training row [n] float64."""
        recipe = self.recipe
        method = (recipe.curvature, recipe.curvature_rows, recipe.function, recipe.damping)

        def compute() -> dict[str, np.ndarray]:
            spectrum, function = self.preconditioner(checkpoint)
            parts = []
            for span in row_ranges(self.train):
                rows = self.train.rows(checkpoint, *span)
                largest = rows.abs().amax(1)  # squares of small gradients leave float32
                squares = spectrum.quadratic(function, rows * _reciprocal(largest)[:, None])
                parts.append(squares.sqrt() * largest)
            return {"lengths": torch.cat(parts).numpy()}

        arrays = self.cache.get("lengths", (checkpoint, *method), compute)
        return torch.from_numpy(arrays["lengths"])

    def row_weights(self) -> Tensor:
        """r [C, n] float64: everything that touches the training side."""
        weights = self.train_weights()
        if self.recipe.combine == "product_of_means":
            return (self.share * weights).sum(0, keepdim=True).expand_as(weights)
        if self.recipe.normalize in ("train", "both"):
            norms = torch.stack([self.lengths(c) for c in range(len(weights))]) * weights.abs()
            return weights * _reciprocal(norms)
        return weights


def _reciprocal(norms: Tensor) -> Tensor:
    """1/norm, 0 for a zero gradient: it has no direction, and no influence."""
    return torch.where(norms > 0, 1 / norms, 0)


def _checkpoint_weights(checkpoints: list[dict[str, Any]], recipe: Recipe) -> list[float]:
    if recipe.checkpoint_weight == "mean":
        return [1 / len(checkpoints)] * len(checkpoints)
    for checkpoint in checkpoints:
        if checkpoint.get("learning_rate") is None:
            raise RecipeError(
                "the learning rate of a checkpoint is not known",
                where=f"recipe {recipe.name!r}, checkpoint {checkpoint['name']!r}",
                wanted="checkpoint_weight='learning_rate' needs one for every checkpoint",
                do="index with checkpoints that carry a learning rate, or use "
                "dataclasses.replace(recipe, checkpoint_weight='mean')",
            )
    return [float(checkpoint["learning_rate"]) for checkpoint in checkpoints]


def _gradient_weights(table: Table, gradient: str, has_margin: bool) -> Tensor:
    """w [C, rows] float64 with w·∇f the wanted gradient: −ℓ'(f), or 1 for a margin."""
    slope = _column(table, "slope")
    return torch.ones_like(slope) if gradient == "margin" and has_margin else -slope


def _column(table: Table, name: str) -> Tensor:
    values = torch.from_numpy(table.column(name).astype(np.float64))
    wrong = ~torch.isfinite(values) | ((values < 0) & (name == "curvature"))
    if wrong.any():
        checkpoint, row = wrong.nonzero()[0].tolist()
        raise StoreError(
            f"column {name!r} holds a value no score can be made from",
            where=f"table {table.name!r}, checkpoint {checkpoint}, example {row}",
            found=values[checkpoint, row].item(),
            wanted="a number ≥ 0" if name == "curvature" else "a finite number",
            do="run `tda verify`; if the store is sound, index this example again",
        )
    return values


def block(prepared: Prepared, start: int, stop: int) -> Tensor:
    """Scores of all queries for the training examples [start, stop): [m, stop − start] float32."""
    out = torch.empty(prepared.num_queries, stop - start)
    for low, high, rows in stream(prepared.train, start, stop):
        for first, some in _query_tiles(prepared):
            last = first + some.num_queries
            out[first:last, low - start : high - start] = _tile(some, rows, low, first)
    return out


def stream(train: Table, start: int, stop: int) -> Iterator[tuple[int, int, list[Tensor]]]:
    """(low, high, rows of every checkpoint), reading one tile ahead."""

    def read(span: tuple[int, int]) -> list[Tensor]:
        return [train.rows(c, *span) for c in range(train.num_checkpoints)]

    spans = list(row_ranges(train, start, stop))
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = [reader.submit(read, span) for span in spans[:1]]
        for i, (low, high) in enumerate(spans):
            rows = coming.pop().result()
            coming += [reader.submit(read, span) for span in spans[i + 1 : i + 2]]
            yield low, high, rows


def _query_tiles(prepared: Prepared) -> Iterator[tuple[int, Prepared]]:
    for first in range(0, prepared.num_queries, QUERY_TILE):
        yield first, prepared.select(slice(first, first + QUERY_TILE))


def _tile(prepared: Prepared, rows: list[Tensor], low: int, first_query: int) -> Tensor:
    """Σ_c (Q_c X_cᵀ) · r_c  [m, r]; refuses to return a NaN."""
    total = None
    for q, x, weight in zip(prepared.queries, rows, prepared.row_weights, strict=True):
        product = (q @ x.T).mul_(weight[low : low + len(x)])
        total = product if total is None else total.add_(product)
    assert total is not None
    if not torch.isfinite(total.sum()) and not torch.isfinite(total).all():
        query, row = (~torch.isfinite(total)).nonzero()[0].tolist()
        raise StoreError(
            "a score is not a finite number",
            where=f"query {first_query + query}, training example {low + row}",
            found=total[query, row].item(),
            do="run `tda verify`; if the store is sound, use a larger damping",
        )
    return total


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
        scores = block(some, int(low), int(high)).numpy()[:, wanted - low]
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

    k is clipped to n. Memory: the answer and two tiles of rows; the full matrix is never made.
    """
    k = clipped(k, prepared.train.num_rows)
    best, worst = Heaps(prepared.num_queries, k), Heaps(prepared.num_queries, k)
    for low, _, rows in stream(prepared.train, 0, prepared.train.num_rows):
        for first, some in _query_tiles(prepared):
            tile = _tile(some, rows, low, first)
            worst.add(tile, low, first)
            best.add(tile.neg_(), low, first)
    indices, negated = best.finish()
    return ranked(prepared.train, (indices, -negated), worst.finish())
