"""Examples that are nearly the same: within the training set, and between queries and training set.

Two examples are near-duplicates when the model cannot tell them apart, neither by what it sees (the
cosine of their last hidden layers) nor by what it would learn from them (the cosine of their
gradients). Equal content is always found, whatever the model makes of it.

A trained network may map much of a class onto one point of its last layer; so where gradients are
stored both cosines must pass. Equal inputs with different labels have opposed gradients: across
labels the last hidden layers must agree to rounding instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from tda.errors import DataError
from tda.run import Run
from tda.scorer.ranking import limit_faiss_threads
from tda.valuation.frames import frame
from tda.valuation.last_rows import embeddings, gradients

THRESHOLD = 0.995
SAME = 1 - 1e-5  # cosine of equal embeddings, as stored: bfloat16 keeps equal numbers equal
ROUNDING = 1e-6  # of a cosine in float32
CANDIDATES = 32  # nearest of each example that are looked at
PAIRS = 4096  # whose gradients are held at a time
BLOCK = 256  # queries whose matches are held at a time


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of near-identical examples, ordered by left, then right index.

    left, right ``[pair]``: indices. similarity ``[pair]``: cosine in the space searched. gradient
    ``[pair]``: cosine of gradients, NaN where not looked at. exact ``[pair]``: equal content.
    """

    left: np.ndarray
    right: np.ndarray
    similarity: np.ndarray
    gradient: np.ndarray
    exact: np.ndarray

    def __len__(self) -> int:
        return len(self.left)


@dataclass(frozen=True, eq=False)
class DuplicateGroups:
    """Near-duplicates of the training set, joined into groups (single linkage).

    member, group ``[member]``: training indices and the number of their group, both ascending by
    group; representative ``[member]``: the group's smallest index, the one to keep. conflicting
    ``[member]``: the group holds more than one label. pairs: what joined them.
    """

    member: np.ndarray
    group: np.ndarray
    representative: np.ndarray
    conflicting: np.ndarray
    ids: np.ndarray
    pairs: Pairs

    @property
    def redundant(self) -> np.ndarray:
        """Training indices that could go, one of each group staying."""
        return self.member[self.member != self.representative]

    def to_frame(self) -> Any:
        """One row a member (pandas)."""
        return frame(
            {
                "group": self.group,
                "id": self.ids[self.member],
                "keep": self.member == self.representative,
                "conflicting_labels": self.conflicting,
            }
        )


@dataclass(frozen=True, eq=False)
class Leakage:
    """Queries that are near-identical to training examples: their results are no test."""

    pairs: Pairs  # left: query, right: training example
    query_ids: np.ndarray
    train_ids: np.ndarray
    num_queries: int

    @property
    def share(self) -> float:
        """Of the queries."""
        return len(np.unique(self.pairs.left)) / self.num_queries

    def to_frame(self) -> Any:
        """One row a pair (pandas)."""
        return frame(
            {
                "query": self.query_ids[self.pairs.left],
                "train": self.train_ids[self.pairs.right],
                "similarity": self.pairs.similarity,
                "gradient": self.pairs.gradient,
                "exact": self.pairs.exact,
            }
        )


def near_duplicates(rows: Any, threshold: float = THRESHOLD) -> Pairs:
    """All pairs of ``rows [example, dim]`` with a cosine of at least ``threshold``; left < right.

    Exact (FAISS range search): n² products, memory for the pairs found and BLOCK queries' matches.
    """
    unit = _unit(rows)
    found = [(a[a < b], b[a < b], s[a < b]) for a, b, s in _matches(unit, unit, threshold)]
    return _pairs(found)


def near_identical(queries: Any, rows: Any, threshold: float = THRESHOLD) -> Pairs:
    """All pairs (query, example) with a cosine of at least ``threshold``; dimensions must agree."""
    return _pairs(list(_matches(_unit(queries), _unit(rows), threshold)))


def components(num_examples: int, pairs: Pairs) -> np.ndarray:
    """Group of every example ``[example]``: those joined by pairs share one."""
    ones = np.ones(len(pairs), bool)
    graph = coo_array((ones, (pairs.left, pairs.right)), shape=(num_examples, num_examples))
    return connected_components(graph, directed=False)[1]


def duplicates(run: Run, threshold: float = THRESHOLD) -> DuplicateGroups:
    """Groups of near-duplicates in a run's training set.

    Raises StoreError if it is unfinished.
    """
    train = run.store.table("train")
    pairs = _same(train, train, threshold, within=True)
    group = components(train.num_rows, pairs)
    size = np.bincount(group)
    member = np.flatnonzero(size[group] > 1)
    first = np.full(len(size), train.num_rows)
    np.minimum.at(first, group, np.arange(train.num_rows))
    member = member[np.lexsort((member, first[group[member]]))]
    representative = first[group[member]]
    labels = _labels(train)
    differs = np.zeros(len(size), bool)
    if labels is not None:
        np.logical_or.at(differs, group[pairs.left], labels[pairs.left] != labels[pairs.right])
    number = np.unique(representative, return_inverse=True)[1]
    return DuplicateGroups(member, number, representative, differs[group[member]], run.ids, pairs)


def leakage(run: Run, queries: str, threshold: float = THRESHOLD) -> Leakage:
    """Queries of a stored set that are in the training set, or nearly so."""
    asked, train = run.store.table(f"queries/{queries}"), run.store.table("train")
    pairs = _same(asked, train, threshold, within=False)
    return Leakage(pairs, asked.column("id"), run.ids, asked.num_rows)


def _same(left: Any, right: Any, threshold: float, within: bool) -> Pairs:
    """Near-identical pairs of two tables, or within one, by the rule at the top.

    Candidates are the CANDIDATES nearest of each example, and those of equal content: in a last
    layer that maps thousands of examples onto one point, more pairs pass than can be looked at.
    """
    has_embedding = bool(right.hidden and left.hidden)
    read = embeddings if has_embedding else gradients
    one, two = (torch.nn.functional.normalize(read(t), dim=1).numpy() for t in (left, right))
    a, b = _candidates(one, two, threshold, within)
    content = left.column("digest"), right.column("digest")
    a, b = (np.concatenate(x) for x in zip((a, b), _equal(*content, within), strict=True))
    a, b = np.unique(np.stack([a, b]), axis=1)
    exact = (content[0][a] == content[1][b]).all(1)
    similarity = np.where(exact, 1.0, np.minimum(np.einsum("pd,pd->p", one[a], two[b]), 1))
    if not has_embedding:
        return Pairs(a, b, similarity, similarity, exact)
    gradient = _gradient_cosines(left, right, a, b)
    keep = exact | (gradient >= threshold)
    labels = _labels(left), _labels(right)
    if labels[0] is not None and labels[1] is not None:
        keep |= (labels[0][a] != labels[1][b]) & (similarity >= SAME)
    return Pairs(a[keep], b[keep], similarity[keep], gradient[keep], exact[keep])


def _candidates(
    one: np.ndarray, two: np.ndarray, threshold: float, within: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of unit rows that pass the threshold; within one table each pair once."""
    index = _index(two, threshold)
    similarity, found = index.search(one, min(CANDIDATES + within, len(two)))
    left, place = np.nonzero(similarity >= threshold - ROUNDING)
    right = found[left, place]
    if not within:
        return left, right
    other = left != right
    return np.minimum(left, right)[other], np.maximum(left, right)[other]


def _equal(a: np.ndarray, b: np.ndarray, within: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of equal digests: each example with the first of ``b`` that has its own."""
    _, first, inverse = np.unique(
        np.concatenate([b, a]), axis=0, return_index=True, return_inverse=True
    )
    found = first[inverse.ravel()[len(b) :]]
    other = np.arange(len(a))
    keep = found < other if within else found < len(b)
    return (found[keep], other[keep]) if within else (other[keep], found[keep])


def _gradient_cosines(left: Any, right: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """cos ⟨∇f_a, ∇f_b⟩ at the last checkpoint ``[pair]``."""
    last = right.num_checkpoints - 1
    cosine = np.empty(len(a))
    for start in range(0, len(a), PAIRS):
        some = slice(start, start + PAIRS)
        rows = (left.gather(last, a[some]), right.gather(last, b[some]))
        x, y = (torch.nn.functional.normalize(r, dim=1) for r in rows)
        cosine[some] = (x * y).sum(1).numpy()
    return cosine


def _index(unit: np.ndarray, threshold: float) -> Any:
    import faiss

    if not 0 < threshold <= 1:
        raise DataError("the threshold is no cosine", found=threshold, wanted="0 < threshold ≤ 1")
    limit_faiss_threads()
    index = faiss.IndexFlatIP(unit.shape[1])
    index.add(unit)
    return index


def _matches(a: np.ndarray, b: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, ...]]:
    index, radius = _index(b, threshold), threshold - ROUNDING  # FAISS takes what is above
    for start in range(0, len(a), BLOCK):
        limits, similarity, right = index.range_search(a[start : start + BLOCK], radius)
        left = np.repeat(np.arange(len(limits) - 1), np.diff(limits).astype(np.int64)) + start
        yield left, right, np.minimum(similarity.astype(np.float64), 1)


def _pairs(found: Sequence[tuple[np.ndarray, ...]]) -> Pairs:
    left, right, similarity = (
        np.concatenate([part[i] for part in found] or [np.zeros(0)]) for i in range(3)
    )
    order = np.lexsort((right, left))
    count = len(order)
    return Pairs(
        left[order].astype(np.int64),
        right[order].astype(np.int64),
        similarity[order],
        np.full(count, np.nan),
        np.zeros(count, bool),
    )


def _unit(rows: Any) -> np.ndarray:
    """Rows of length 1, float32; a row of zeros is like nothing."""
    values = torch.as_tensor(np.asarray(rows), dtype=torch.float32)
    if values.ndim != 2 or not torch.isfinite(values).all():
        raise DataError(
            "rows cannot be compared",
            found=f"shape {list(values.shape)}",
            wanted="finite numbers [example, dim]",
        )
    return np.ascontiguousarray(torch.nn.functional.normalize(values, dim=1).numpy())


def _labels(table: Any) -> np.ndarray | None:
    return table.column("label") if "label" in table.columns() else None
