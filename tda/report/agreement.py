"""How far answers agree: the cheap half of knowing whether to trust one."""

from __future__ import annotations

import numpy as np

from tda.evaluate.intervals import spearman
from tda.report.data import Agreement, Query


def rank_agreement(
    left: str, right: str, a: np.ndarray, b: np.ndarray, num_train: int
) -> tuple[Agreement, ...]:
    """Spearman correlation of two score matrices [query, train], query by query.

    They may hold some of the training examples alone.
    """
    some = a.shape[1]
    of = "all scores" if some == num_train else f"the scores of {some:,} training examples"
    each = np.array([spearman(row_a, row_b) for row_a, row_b in zip(a, b, strict=True)])
    each = each[np.isfinite(each)]
    if each.size == 0:
        return ()
    return (
        Agreement(
            left=left,
            right=right,
            measure=f"rank correlation of {of}, mean over the queries shown",
            value=float(each.mean()),
            low=float(each.min()),
            high=float(each.max()),
            count=int(each.size),
        ),
    )


def shared_agreement(
    recipe: str, queries: tuple[Query, ...], num_train: int
) -> tuple[Agreement, ...]:
    """Share of the proponents that are also among the nearest in embedding space."""
    each = np.array(
        [q.shared / len(q.proponents) for q in queries if q.shared is not None], dtype=float
    )
    if each.size == 0:
        return ()
    nearest = max(len(query.nearest) for query in queries)
    return (
        Agreement(
            left=recipe,
            right="embedding kNN",
            measure=f"share of proponents also among the {nearest} nearest, mean over queries",
            value=float(each.mean()),
            chance=min(1.0, nearest / num_train),
            low=float(each.min()),
            high=float(each.max()),
            count=int(each.size),
        ),
    )


def value_agreement(
    recipe: str, value: np.ndarray, knn: np.ndarray | None, num_queries: int
) -> tuple[Agreement, ...]:
    """Spearman correlation of the values and those of k nearest neighbours (KNN-Shapley), which
    are those for num_queries of the queries."""
    each = float("nan") if knn is None else spearman(value, knn)
    if not np.isfinite(each):
        return ()
    return (
        Agreement(
            left=recipe,
            right="KNN-Shapley",
            measure="rank correlation of the values of all training examples, KNN-Shapley's for "
            f"{num_queries:,} of the queries",
            value=each,
            count=int(value.size),
        ),
    )


def self_influence_agreement(
    self_influence: np.ndarray, loss: np.ndarray | None
) -> tuple[Agreement, ...]:
    """Spearman correlation of self-influence and loss over the training set."""
    if loss is None:
        return ()
    both = np.isfinite(self_influence) & np.isfinite(loss)
    value = spearman(self_influence[both], loss[both]) if both.sum() > 1 else float("nan")
    if not np.isfinite(value):
        return ()
    return (
        Agreement(
            left="self-influence",
            right="loss",
            measure="rank correlation; near 1, loss alone would find the same suspects",
            value=value,
            count=int(both.sum()),
        ),
    )
