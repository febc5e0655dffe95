"""Examples that are nearly the same: within the training set, and between queries and training set.

    cos⟨h_a, h_b⟩ ≥ .995,     cos⟨∇f_a, ∇f_b⟩ ≥ .995,     λ(r_ab) too small to be chance

Two examples are near-duplicates when the model cannot tell them apart, neither by what it sees
(their last hidden layers h) nor by what it would learn from them (their gradients), and when they
are nearer to each other than the density of the examples around them explains: a small or saturated
network maps whole regions to one direction, and what lies there is no copy. λ is the number of
examples that chance brings within their distance r (Levina and Bickel 2004), and of the examples
called near-duplicates 1 in 20 at most is expected to be so by chance (Benjamini and Hochberg 1995):
`tda.valuation.chance`. Inputs as good as equal with different labels have opposed gradients: across
labels the last hidden layers must agree to rounding instead.

Three kinds are found whatever the model makes of them: equal content; equal inputs with different
labels, but in runs that were begun before inputs had digests of their own; and texts that differ by
one word in ten or less (`tda.valuation.texts`).
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
from tda.store.encoding import DIGESTS
from tda.valuation.chance import expected, rare
from tda.valuation.frames import frame
from tda.valuation.last_rows import embeddings, gradients
from tda.valuation.nearest import AROUND, ROUNDING, Neighbours, Space, unit
from tda.valuation.texts import near_texts

THRESHOLD = 0.995
SAME = 1 - 1e-5  # cosine of equal embeddings, as stored: bfloat16 keeps equal numbers equal
HELD = 2**23  # numbers of gradients held at a time
BLOCK = 256  # queries whose matches are held at a time


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of near-identical examples, ordered by left, then right index.

    left, right ``[pair]``: indices. similarity ``[pair]``: cosine in the space searched, 1 of equal
    inputs. gradient ``[pair]``: cosine of gradients, NaN where not looked at. exact ``[pair]``:
    equal content. same_input ``[pair]``: equal inputs; if not exact, under different labels.
    recall: share of the nearest examples that were looked at: below 1 in a very large set, where
    the search is approximate and only equal content and inputs are certain to be found.
    """

    left: np.ndarray
    right: np.ndarray
    similarity: np.ndarray
    gradient: np.ndarray
    exact: np.ndarray
    same_input: np.ndarray
    recall: float = 1.0

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
                "same_input": self.pairs.same_input,
            }
        )


def near_duplicates(rows: Any, threshold: float = THRESHOLD) -> Pairs:
    """All pairs of ``rows [example, dim]`` with a cosine of at least ``threshold``; left < right.

    Exact (FAISS range search): n² products, memory for the pairs found and BLOCK queries' matches.
    """
    all_rows = unit(rows)
    found = [(a[a < b], b[a < b], s[a < b]) for a, b, s in _matches(all_rows, all_rows, threshold)]
    return _pairs(found)


def near_identical(queries: Any, rows: Any, threshold: float = THRESHOLD) -> Pairs:
    """All pairs (query, example) with a cosine of at least ``threshold``; dimensions must agree."""
    return _pairs(list(_matches(unit(queries), unit(rows), threshold)))


def components(num_examples: int, pairs: Pairs) -> np.ndarray:
    """Group of every example ``[example]``: those joined by pairs share one."""
    ones = np.ones(len(pairs), bool)
    graph = coo_array((ones, (pairs.left, pairs.right)), shape=(num_examples, num_examples))
    return connected_components(graph, directed=False)[1]


def space_of(table: Any) -> Space:
    """Where examples of a table are compared: last hidden layers, or gradients without them."""
    return Space((embeddings if table.hidden else gradients)(table).numpy())


def duplicates(
    run: Run, threshold: float = THRESHOLD, space: Space | None = None
) -> DuplicateGroups:
    """Groups of near-duplicates in a run's training set.

    space: `space_of` the training set, where it is at hand. Raises StoreError if a run is
    unfinished.
    """
    train = run.store.table("train")
    space = space_of(train) if space is None else space
    pairs = _same(train, train, space, space.around, threshold, within=True)
    group = components(train.num_rows, pairs)
    size = np.bincount(group)
    member = np.flatnonzero(size[group] > 1)
    first = np.full(len(size), train.num_rows)
    np.minimum.at(first, group, np.arange(train.num_rows))
    member = member[np.lexsort((member, first[group[member]]))]
    representative = first[group[member]]
    several = _differ(train, train, pairs.left, pairs.right) | pairs.same_input & ~pairs.exact
    differs = np.zeros(len(size), bool)
    np.logical_or.at(differs, group[pairs.left], several)
    number = np.unique(representative, return_inverse=True)[1]
    return DuplicateGroups(member, number, representative, differs[group[member]], run.ids, pairs)


def leakage(
    run: Run, queries: str, threshold: float = THRESHOLD, space: Space | None = None
) -> Leakage:
    """Queries of a stored set that are in the training set, or nearly so. space: as above."""
    asked, train = run.store.table(f"queries/{queries}"), run.store.table("train")
    space = space_of(train) if space is None else space
    rows = space_of(asked).unit if asked.hidden == train.hidden else None
    if rows is None:
        raise DataError("queries and training set cannot be compared", found="other embeddings")
    near = space.nearest(rows, AROUND)
    pairs = _same(asked, train, space, near, threshold, within=False, rows=rows)
    return Leakage(pairs, asked.column("id"), train.column("id"), asked.num_rows)


def _same(
    left: Any,
    right: Any,
    space: Space,
    near: Neighbours,
    threshold: float,
    within: bool,
    rows: np.ndarray | None = None,
) -> Pairs:
    """Near-identical pairs of two tables, or within one, by the rule at the top.

    near: the nearest in ``space`` of each example of ``left``. rows: the directions of these, where
    they are not those of ``space``. Candidates are the nearest of each example, and those of equal
    content or input: in a last layer that maps thousands of examples onto one point, more pairs
    pass than can be looked at.
    """
    one, two = space.unit if rows is None else rows, space.unit
    known, read = _digests(left, right), near_texts(left, right, within)
    equal = (_equal(*both, within) for both in known)
    looked_at = _candidates(near, _checked(threshold), within), *equal, read
    a, b = _unique(*(np.concatenate(side) for side in zip(*looked_at, strict=True)))
    alike = _among(a, b, read)
    agree = [(x[a] == y[b]).all(1) for x, y in known]
    exact, same = agree[0], agree[-1]  # equal content has equal inputs
    cosine = np.empty(len(a))
    for some in _parts(len(a), two.shape[1]):
        cosine[some] = np.einsum("pd,pd->p", one[a[some]], two[b[some]])
    similarity, gradient = (np.where(of, 1.0, np.minimum(cosine, 1)) for of in (same, exact))
    close = np.ones(len(a), bool)
    if right.hidden:
        gradient = _gradient_cosines(left, right, a, b)
        close = (gradient >= threshold) | _differ(left, right, a, b) & (similarity >= SAME)
    asked = close & ~same & ~alike
    sides = (a[asked], b[asked]) if within else (a[asked],)
    chance = expected(space, near, similarity[asked], *sides)
    keep = same | alike
    keep[asked] = rare(left.num_rows, chance, *sides)
    a, b, similarity, gradient = a[keep], b[keep], similarity[keep], gradient[keep]
    return Pairs(a, b, similarity, gradient, exact[keep], same[keep], near.recall)


def _digests(left: Any, right: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of both tables' content; and of their inputs, where both have these."""
    known = {*left.columns()} & {*right.columns()}
    return [(left.column(name), right.column(name)) for name in DIGESTS if name in known]


def _candidates(near: Neighbours, threshold: float, within: bool) -> tuple[np.ndarray, np.ndarray]:
    """Those of the nearest that pass the threshold; within one table the smaller index left."""
    left, place = np.nonzero(near.similarity >= threshold - ROUNDING)
    right = near.indices[left, place].astype(np.int64)
    return (np.minimum(left, right), np.maximum(left, right)) if within else (left, right)


def _unique(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each pair once, by a, then b."""
    width = int(b.max(initial=0)) + 1
    return np.divmod(np.unique(a * width + b), width)


def _among(a: np.ndarray, b: np.ndarray, pairs: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
    """``[pair]`` bool: which of (a, b) are among ``pairs``."""
    width = int(max(b.max(initial=0), pairs[1].max(initial=0))) + 1
    return np.isin(a * width + b, pairs[0] * width + pairs[1])


def _parts(count: int, dim: int) -> Iterator[slice]:
    size = max(1, HELD // (2 * dim))
    yield from (slice(start, start + size) for start in range(0, count, size))


def _equal(a: np.ndarray, b: np.ndarray, within: bool) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of equal digests: each example with the first of ``b`` that has its own."""
    both = np.ascontiguousarray(np.concatenate([b, a])).view(np.uint64)
    order = np.lexsort(both.T)  # stable: of equal ones the first of b, or of a, leads
    leads = np.append(True, (both[order[1:]] != both[order[:-1]]).any(1))
    first = np.empty(len(both), np.int64)
    first[order] = order[leads][np.cumsum(leads) - 1]
    found = first[len(b) :]
    other = np.arange(len(a))
    keep = found < other if within else found < len(b)
    return (found[keep], other[keep]) if within else (other[keep], found[keep])


def _gradient_cosines(left: Any, right: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """cos ⟨∇f_a, ∇f_b⟩ at the last checkpoint ``[pair]``."""
    last = right.num_checkpoints - 1
    cosine = np.empty(len(a))
    for some in _parts(len(a), right.dim):
        rows = (left.gather(last, a[some]), right.gather(last, b[some]))
        x, y = (torch.nn.functional.normalize(r, dim=1) for r in rows)
        cosine[some] = (x * y).sum(1).numpy()
    return cosine


def _checked(threshold: float) -> float:
    if not 0 < threshold <= 1:
        raise DataError("the threshold is no cosine", found=threshold, wanted="0 < threshold ≤ 1")
    return threshold


def _matches(a: np.ndarray, b: np.ndarray, threshold: float) -> Iterator[tuple[np.ndarray, ...]]:
    import faiss

    radius = _checked(threshold) - ROUNDING  # FAISS takes what is above
    limit_faiss_threads()
    index = faiss.IndexFlatIP(b.shape[1])
    index.add(b)
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
        np.zeros(count, bool),
    )


def _differ(left: Any, right: Any, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``[pair]`` bool: their labels differ; False without labels."""
    one, two = _labels(left), _labels(right)
    return np.zeros(len(a), bool) if one is None or two is None else one[a] != two[b]


def _labels(table: Any) -> np.ndarray | None:
    return table.column("label") if "label" in table.columns() else None
