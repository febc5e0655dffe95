"""How well scores foretell what retraining does. All in float64, all blind to a positive rescaling.

scores  ``[query, train]``, positive where training on the example helps (``run.scores``, or arrays)
truth   a `GroundTruth`: masks ``[subset, train]``, outputs ``[subset, seed, query]``
values  ``[train]``, one number an example, e.g. self-influence

Rank correlations average ties; everything that takes the first k orders equal scores by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import dask
import numpy as np

from tda.errors import DataError
from tda.evaluate.design import Design
from tda.evaluate.intervals import (
    Estimate,
    Ranks,
    correlation,
    over,
    pearson_of,
    spearman_of,
    two_way,
)
from tda.evaluate.record import GroundTruth

_DECIMALS = 12  # float64 has 16, a sum over a million examples 13 of them


def lds(scores: Any, truth: GroundTruth) -> Estimate:
    """Linear datamodeling score: the mean of `lds_of_queries`, over queries and subsets."""
    return lds_of_predictions(predictions(scores, truth), truth)


def lds_of_predictions(predicted: np.ndarray, truth: GroundTruth) -> Estimate:
    """`lds` of what `predictions` gave, or of any other guess ``[subset, query]``."""
    return two_way(spearman_of(predicted, truth.mean), len(truth.masks), truth.outputs.shape[2])


def lds_of_queries(scores: Any, truth: GroundTruth) -> np.ndarray:
    """LDS(q) = Spearman_S( Σ_{i∈S} score[q, i] , mean_seed f(q; S, seed) )  ``[query]``.

    Park et al. 2023, TRAK, definition 2.3; 0 for a query whose scores or outputs are all equal.
    Adding a constant to a query's scores changes nothing as long as the subsets are of one size.
    """
    return spearman_of(predictions(scores, truth), truth.mean)(np.ones(len(truth.masks)))


def leave_one_out_correlation(scores: Any, truth: GroundTruth) -> Estimate:
    """mean_q Pearson_i( score[q, i] , f(q; all) − f(q; all∖{i}) ), the i that were left out.

    Koh and Liang 2017, figure 2. Σ_{j≠i} score[q, j] is the same up to a constant and the sign, as
    −f(q; all∖{i}) is: f(q; all) need not be known. ``lds`` gives the rank correlation.
    Raises DataError unless every subset leaves one example out.
    """
    if (truth.masks.sum(1) != truth.masks.shape[1] - 1).any():
        raise DataError(
            "this ground truth did not leave out single examples",
            where=truth.path,
            do="make one with Design(kind='leave_one_out')",
        )
    statistic = pearson_of(predictions(scores, truth), truth.mean)
    return two_way(statistic, len(truth.masks), truth.outputs.shape[2])


def noise_ceiling(truth: GroundTruth) -> Estimate | None:
    """The LDS that E[f(q; S)] itself would have, were it known; None with a single seed.

    r = mean over queries and pairs of seeds of Spearman_S(f(q; S, k), f(q; S, l)) is the
    reliability of one seed; R = K·r / (1 + (K − 1)·r) that of the mean of K (Spearman 1910, Brown
    1910); the true outputs correlate with that mean by √R (Spearman 1904).
    """
    num_subsets, num_seeds, num_queries = truth.outputs.shape
    if num_seeds < 2:
        return None
    seeds = [Ranks(truth.outputs[:, k]) for k in range(num_seeds)]

    def reliability(counts: np.ndarray) -> np.ndarray:
        ranks = [seed.centred(counts) for seed in seeds]
        return np.mean([correlation(a, b, counts) for a, b in combinations(ranks, 2)], axis=0)

    def of_the_mean(r: np.ndarray) -> np.ndarray:
        r = np.clip(r, 0, None)
        return np.sqrt(num_seeds * r / (1 + (num_seeds - 1) * r))

    return two_way(reliability, num_subsets, num_queries, then=of_the_mean)


def predictions(scores: Any, truth: GroundTruth) -> np.ndarray:
    """Σ_{i∈S} score[q, i] / Σ_i |score[q, i]|  ``[subset, query]``, to twelve decimals.

    So ties stay ties, whatever the order of summation. A Dask array is never made whole.
    Raises DataError when shapes do not match, or a score is not finite.
    """
    wanted = (truth.outputs.shape[2], truth.masks.shape[1])
    if tuple(scores.shape) != wanted:
        raise DataError(
            "the scores are not of the queries and the training set that were retrained",
            found=f"scores {list(scores.shape)}",
            wanted=f"[query, train] = {list(wanted)}",
            do="ask for the scores of the same query set in the same order",
        )
    exact = scores.astype(np.float64)
    sums, sizes = dask.compute(exact @ truth.masks.T.astype(np.float64), abs(exact).sum(1))
    return np.round(_finite(sums).T / np.where(sizes > 0, sizes, 1), _DECIMALS)


def removal_design(
    values: np.ndarray,
    fractions: Sequence[float],
    *,
    keep: bool = False,
    seeds: Sequence[int] = (0,),
) -> Design:
    """The design of a curve: leave out the examples of the highest values, a fraction a subset.

    keep: leave out all others instead (retention). Its ground truth goes to `curve`; put 0 among
    the fractions for where the curve begins.
    """
    order = _ranking(values)
    cuts = [round(fraction * len(order)) for fraction in fractions]
    sets = [order[cut:] if keep else order[:cut] for cut in cuts]
    return Design.given([some.tolist() for some in sets], seeds)


def curve(truth: GroundTruth) -> list[Estimate]:
    """mean_q f(q; S) of every subset, with its interval over queries (data-removal curves).

    A method that finds what helps the queries makes the curve of `removal_design` fall fast.
    """
    return [over(outputs) for outputs in truth.mean]


def mislabel_auc(values: np.ndarray, wrong: np.ndarray) -> Estimate:
    """P(value of a wrong label > value of a right one) + ½ P(equal), over examples.

    The area under the ROC curve (Mann and Whitney 1947). wrong ``[train]``: which labels are.
    """
    wrong, ranks = _wrong(values, wrong), Ranks(_finite(values)[:, None])

    def statistic(counts: np.ndarray) -> np.ndarray:
        pairs = (counts @ wrong) * (counts @ ~wrong)
        return ranks.centred(counts) @ (counts * wrong) / max(pairs, 1) + 0.5

    return two_way(statistic, len(wrong), 1)


def found_at(values: np.ndarray, wrong: np.ndarray, share: float = 0.1) -> Estimate:
    """The part of the wrong labels found by checking the ``share`` of examples of highest value."""
    order, is_wrong = _ranking(values), _wrong(values, wrong)
    is_wrong = is_wrong[order]

    def statistic(counts: np.ndarray) -> np.ndarray:
        each = counts[order]
        before = np.cumsum(each) - each
        checked = np.clip(np.ceil(share * each.sum()) - before, 0, each)
        return np.array([checked @ is_wrong / max(each @ is_wrong, 1)])

    return two_way(statistic, len(order), 1)


@dataclass(frozen=True)
class Stability:
    """How much of an answer stays when the seed, or the checkpoint, is another one."""

    rank_correlation: Estimate
    top_k_jaccard: Estimate
    k: int


def stability(scores: Sequence[Any], k: int = 10) -> Stability:
    """Agreement of several score matrices ``[query, train]``, mean over queries and pairs of them.

    rank_correlation: Spearman over training examples. top_k_jaccard: |A∩B| / |A∪B| of the k
    proponents (Jaccard 1912).
    """
    given = [np.asarray(matrix, np.float64) for matrix in scores]
    if len(given) < 2 or len({matrix.shape for matrix in given}) > 1:
        raise DataError(
            "stability compares score matrices of one shape",
            found=[list(matrix.shape) for matrix in given],
            wanted="two or more, [query, train]",
        )
    k = min(k, given[0].shape[1])
    ranks = [
        spearman_of(a.T, b.T)(np.ones(a.shape[1])) for a, b in combinations(map(_finite, given), 2)
    ]
    tops = [[set(_ranking(row)[:k]) for row in matrix] for matrix in given]
    shared = [
        [len(x & y) / len(x | y) for x, y in zip(a, b, strict=True)]
        for a, b in combinations(tops, 2)
    ]
    return Stability(over(np.mean(ranks, axis=0)), over(np.mean(shared, axis=0)), k)


def _ranking(values: np.ndarray) -> np.ndarray:
    """Indices from the highest value to the lowest; equal values by index."""
    return np.argsort(-_finite(values), kind="stable")


def _finite(values: Any) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if not np.isfinite(values).all():
        raise DataError("a score is not a finite number", found="NaN or infinity")
    return values


def _wrong(values: Any, wrong: Any) -> np.ndarray:
    wrong = np.asarray(wrong, bool)
    if wrong.shape != np.shape(values) or wrong.all() or not wrong.any():
        raise DataError(
            "which labels are wrong cannot be compared with these values",
            found=f"{wrong.sum()} of {wrong.size} wrong, values {list(np.shape(values))}",
            wanted="one of each an example; some wrong, some right",
        )
    return wrong
