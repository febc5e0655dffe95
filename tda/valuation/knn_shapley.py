"""Shapley values of training examples for a k-nearest-neighbour classifier, exact.

The utility of a coalition for a query is the share of its K nearest members that have the query's
label, (1/K) Σ_{k ≤ min(K, |S|)} 1[y_k = y]. With the training examples sorted by distance, and
m_i = 1[y_i = y] (Jia et al. 2019, "Efficient task-specific data valuation for nearest neighbor
algorithms", theorem 1):

    s_N = m_N · min(K, N)/(N K),        s_i = s_{i+1} + (m_i − m_{i+1}) · min(K, i)/(i K)

which summed by parts, with c_i = min(K, i)/(i K), is

    s_i = c_i m_i − Σ_{j > max(i, K)} m_j / (j (j − 1)).

All that costs is the order of all N distances to a query: O(N log N), no retraining, no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from tda.errors import DataError
from tda.run import Run
from tda.valuation.frames import frame
from tda.valuation.last_rows import embeddings

BLOCK_BYTES = 64 * 2**20  # of distances held at a time
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, eq=False)
class KnnShapley:
    """value ``[train]``: mean over queries of the Shapley value, in units of accuracy.

    They sum to ``utility``, the mean share of neighbours with the right label. standard_error
    ``[train]``: over queries, for other queries like these (NaN with one).
    """

    value: np.ndarray
    standard_error: np.ndarray
    utility: float
    k: int
    ids: np.ndarray | None = None

    def to_frame(self) -> Any:
        """One row a training example (pandas)."""
        ids = np.arange(len(self.value)) if self.ids is None else self.ids
        return frame({"id": ids, "value": self.value, "standard_error": self.standard_error})


def knn_shapley(
    train: Any,
    train_labels: Any,
    queries: Any,
    query_labels: Any,
    k: int = 10,
    metric: Literal["euclidean", "cosine"] = "euclidean",
) -> KnnShapley:
    """Exact values of ``train [train, dim]`` for predicting ``query_labels [query]``.

    Distances are float32; equal ones are ordered by train index. Works block by block of queries,
    on as many threads as torch may use, each with BLOCK_BYTES of distances (or one query's).
    Results do not depend on blocks or threads beyond the rounding of distances.
    Raises DataError for shapes that do not match, or features that are not finite.
    """
    x, y = _features(train, metric), np.asarray(train_labels)
    z, wanted = _features(queries, metric), np.asarray(query_labels)
    _check(x, y, z, wanted, k)
    centre = x.mean(0, keepdim=True)  # distances are small differences: keep the numbers small
    x, z = x - centre, z - centre
    squares = x.square().sum(1)
    size = max(1, BLOCK_BYTES // (4 * len(x)))

    def block(start: int) -> np.ndarray:
        """Σ s and Σ s² over the queries of a block [2, train]."""
        some = slice(start, start + size)
        distances = torch.addmm(squares[None], z[some], x.T, alpha=-2).numpy()  # less ‖z‖²
        sums = np.zeros((2, len(x)))
        for distance, label in zip(distances, wanted[some], strict=True):
            order = _order(distance)
            s = _closed_form(y[order] == label, k)
            sums[0, order] += s
            sums[1, order] += s * s
        return sums

    total = np.zeros((2, len(x)))
    for sums in _in_order(block, range(0, len(z), size)):
        total += sums
    count = len(z)
    value = total[0] / count
    variance = np.maximum(total[1] / count - value**2, 0)
    error = np.sqrt(variance / (count - 1)) if count > 1 else np.full(len(x), np.nan)
    return KnnShapley(value, error, float(value.sum()), k)


def knn_shapley_of(run: Run, queries: str, k: int = 10) -> KnnShapley:
    """The same for a run's training set and a stored query set, in the last hidden layer.

    Cosine distance at the last checkpoint. Raises StoreError where the run holds no embeddings or
    no labels.
    """
    train, asked = run.store.table("train"), run.store.table(f"queries/{queries}")
    found = knn_shapley(
        embeddings(train), train.column("label"), embeddings(asked), asked.column("label"), k,
        "cosine",
    )  # fmt: skip
    return KnnShapley(found.value, found.standard_error, found.utility, k, run.ids)


def _order(distance: np.ndarray) -> np.ndarray:
    """argsort, equal values by index; twice as fast: one sort of (value, index) as integers.

    Float bits order as integers once negative ones are flipped and the sign bit of others is set.
    """
    bits = distance.view(np.int32)
    bits = (bits ^ ((bits >> 31) | np.int32(-(2**31)))).view(np.uint32)
    keys = (bits.astype(np.uint64) << np.uint64(32)) | np.arange(len(bits), dtype=np.uint64)
    keys.sort()
    return (keys & _LOW).astype(np.int64)


def _closed_form(match: np.ndarray, k: int) -> np.ndarray:
    """s_i of the nearest, the second, …, given who has the query's label ``[train]``."""
    count = len(match)
    rank = np.arange(1, count + 1, dtype=np.float64)
    later = np.zeros(count)
    later[k:] = match[k:] / (rank[k:] * (rank[k:] - 1))
    beyond = np.append(np.cumsum(later[::-1])[::-1][1:], 0.0)
    return match * np.minimum(k, rank) / (rank * k) - beyond


def _in_order(block: Any, starts: range) -> Iterator[np.ndarray]:
    """block(start) of every start, in order, a few at a time on threads."""
    workers = max(1, torch.get_num_threads())
    with ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(block, start) for start in starts[:workers]]
        for start in starts[workers:]:
            yield running.pop(0).result()
            running.append(pool.submit(block, start))
        for last in running:
            yield last.result()


def _features(rows: Any, metric: str) -> torch.Tensor:
    features = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    features = features.reshape(len(features), -1)
    if metric not in ("euclidean", "cosine"):
        raise DataError(f"unknown metric {metric!r}", wanted="euclidean, cosine")
    return torch.nn.functional.normalize(features, dim=1) if metric == "cosine" else features


def _check(x: torch.Tensor, y: np.ndarray, z: torch.Tensor, wanted: np.ndarray, k: int) -> None:
    shapes = (tuple(x.shape), y.shape, tuple(z.shape), wanted.shape)
    if not len(z) or shapes != (
        (len(y), x.shape[1]),
        (len(x),),
        (len(wanted), x.shape[1]),
        (len(z),),
    ):
        raise DataError(
            "features and labels do not match",
            found=f"train {list(x.shape)} and {list(y.shape)}, queries {list(z.shape)} and "
            f"{list(wanted.shape)}",
            wanted="[train, dim] and [train], [query, dim] and [query]",
        )
    if not (torch.isfinite(x).all() and torch.isfinite(z).all()):
        raise DataError("a feature is not a finite number", found="NaN or infinity")
    if not isinstance(k, int) or k < 1:
        raise DataError("k is not a count", found=repr(k), wanted="a whole number ≥ 1")
