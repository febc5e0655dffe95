"""How certain a figure is: 95 % bootstrap intervals over queries and over subsets at once.

Both are samples: other queries would have been asked, other subsets drawn. Each draw resamples
both with replacement (the two-way, or pigeonhole, bootstrap of Owen 2007, "The pigeonhole
bootstrap", which errs on the wide side), and the figure is computed again, ranks included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.stats import rankdata

DRAWS = 1000
_LEVELS = (0.025, 0.975)

# Statistic of every query [query] when each subset is there counts[subset] times.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Ranks:
    """Ranks of every column of ``values [subset, query]`` in any resample of the subsets.

    The rank of subset s, where t is there c_t times and ties share their mean rank, is
    ½(Σ_{x_t ≤ x_s} c_t + Σ_{x_t < x_s} c_t + 1): two look-ups in one running sum.
    """

    def __init__(self, values: np.ndarray) -> None:
        columns = np.ascontiguousarray(np.asarray(values, np.float64).T)
        self._order = np.argsort(columns, axis=1, kind="stable")
        width = columns.shape[1] + 1
        rows = np.arange(len(columns))[:, None] * width
        self._upto = rankdata(columns, "max", axis=1).astype(np.int64) + rows
        self._below = rankdata(columns, "min", axis=1).astype(np.int64) - 1 + rows
        self._sums = np.zeros((len(columns), width))

    def centred(self, counts: np.ndarray) -> np.ndarray:
        """Ranks minus their mean ``[query, subset]``."""
        np.cumsum(counts[self._order], axis=1, out=self._sums[:, 1:])
        ranks = self._sums.take(self._upto) + self._sums.take(self._below)
        return (ranks - counts.sum()) / 2


def spearman_of(left: np.ndarray, right: np.ndarray) -> Statistic:
    """Spearman's ρ of the columns of two matrices ``[subset, query]``, by counts of the subsets."""
    a, b = Ranks(left), Ranks(right)
    return lambda counts: correlation(a.centred(counts), b.centred(counts), counts)


def spearman(left: np.ndarray, right: np.ndarray) -> float:
    """Spearman's ρ of two vectors; NaN when one of them is constant and ranks nothing."""
    if np.ptp(left) == 0 or np.ptp(right) == 0:
        return float("nan")
    return float(spearman_of(left[:, None], right[:, None])(np.ones(len(left)))[0])


def pearson_of(left: np.ndarray, right: np.ndarray) -> Statistic:
    """Pearson's r of the columns of two matrices ``[subset, query]``, by counts of the subsets."""
    a, b = (np.ascontiguousarray(np.asarray(x, np.float64).T) for x in (left, right))

    def centred(x: np.ndarray, counts: np.ndarray) -> np.ndarray:
        return x - (x @ counts / counts.sum())[:, None]

    return lambda counts: correlation(centred(a, counts), centred(b, counts), counts)


def correlation(a: np.ndarray, b: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Σ c a b / √(Σ c a² Σ c b²) of centred rows ``[query, subset]``.

    0 where one is constant: in a mean over queries it foretells nothing, and must not drop out.
    """
    weighted = a * counts
    product = np.einsum("qs,qs->q", weighted, b)
    size = np.einsum("qs,qs->q", weighted, a) * np.einsum("qs,s,qs->q", b, counts, b)
    return np.divide(product, np.sqrt(size), out=np.zeros_like(product), where=size > 0)


def two_way(
    statistic: Statistic,
    num_subsets: int,
    num_queries: int,
    seed: int = 0,
    then: Callable[[np.ndarray], np.ndarray] = lambda means: means,
) -> Estimate:
    """``then`` of the mean over queries, in [−1, 1], with its interval over queries and subsets."""
    random = np.random.default_rng(seed)
    subsets = random.multinomial(num_subsets, np.full(num_subsets, 1 / num_subsets), DRAWS)
    queries = random.multinomial(num_queries, np.full(num_queries, 1 / num_queries), DRAWS)
    pairs = zip(subsets.astype(np.float64), queries, strict=True)
    drawn = then(np.array([statistic(c) @ w / num_queries for c, w in pairs]))
    value = then(statistic(np.ones(num_subsets)).mean(keepdims=True))[0]
    # Repeated subsets bias every draw, by about 1/num_subsets: what counts is how they scatter.
    found = _estimate(value, drawn + (value - drawn.mean()))
    return Estimate(found.value, max(found.low, -1.0), min(found.high, 1.0))


def over(values: np.ndarray) -> Estimate:
    """The mean of ``values [query]``, with its interval over queries."""
    values = np.asarray(values, np.float64)
    random = np.random.default_rng(0)
    drawn = values[random.integers(0, len(values), (DRAWS, len(values)))].mean(1)
    return _estimate(values.mean(), drawn)


def _estimate(value: float, drawn: np.ndarray) -> Estimate:
    low, high = np.quantile(drawn, _LEVELS)
    return Estimate(float(value), float(low), float(high))
