"""Values by label, source and group, and which label helps which."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from tda.report.data import ClassMatrix, Rollup, Slice, Values
from tda.report.examples import MAX_ID, Gallery, clean
from tda.report.findings import Findings
from tda.valuation import GroupValues, concentration, roll_up
from tda.valuation.groupings import ABSENT

SLICED = ("label", "source", "group")  # columns of a run
MAX_SLICES = 30
MAX_CLASSES = 12

Categories = tuple[list[str], np.ndarray]  # names, and the index of each example's


def categories(gallery: Gallery, column: str) -> Categories | None:
    """(names, index of each example's name) of a column with categories; None if it has none.

    Labels that are not integers are targets of a regression, not categories.
    """
    values = gallery.column(column)
    if values is None or values.ndim != 1:
        return None
    if column == "label" and not gallery.classes:
        return None
    if column != "label":
        return named(values)
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return [gallery.label(int(index)) or "?" for index in first], inverse


def named(column: np.ndarray) -> Categories:
    """Of names ``[example]``."""
    unique, inverse = np.unique(column, return_inverse=True)
    return [clean(value, MAX_ID) or ABSENT for value in unique], inverse


def rollups(
    train: Gallery,
    values: Values,
    self_influence: np.ndarray,
    evidence: Findings,
    groups: Mapping[str, np.ndarray] = MappingProxyType({}),
) -> tuple[Rollup, ...]:
    """One roll-up for each column that sorts the training examples into two or more slices.

    groups: columns besides those of the run, ``[train]``.
    """
    found = []
    num_queries = 1 if evidence.values is None else int(evidence.values.num_queries[0])
    for column in (*SLICED, *groups):
        given = groups.get(column)
        sorted_out = categories(train, column) if given is None else named(given)
        if sorted_out is None or not 2 <= len(sorted_out[0]) < train.num_rows:
            continue
        names, inverse = sorted_out
        sure = None if evidence.values is None else roll_up(evidence.values, inverse)
        flagged = None if evidence.suspects is None else evidence.suspects.flagged
        found.append(
            _rollup(column, names, inverse, values.mean, self_influence, flagged, sure, num_queries)
        )
    return tuple(found)


def _rollup(
    column: str,
    names: list[str],
    inverse: np.ndarray,
    value: np.ndarray,
    self_influence: np.ndarray,
    flagged: np.ndarray | None,
    sure: GroupValues | None,
    num_queries: int,
) -> Rollup:
    def total(of: np.ndarray) -> np.ndarray:
        return np.bincount(inverse, weights=of, minlength=len(names))

    def share(of: np.ndarray) -> np.ndarray:
        return of / of.sum() if of.sum() > 0 else np.zeros_like(of)

    count = total(np.ones_like(value))
    influence, itself = share(total(np.abs(value))), share(total(np.abs(self_influence)))
    mean, helping = total(value) / count, total(value > 0) / count
    shares = None if flagged is None else total(flagged) / count

    def interval(i: int) -> dict[str, Any]:
        """The 95 % interval of a slice's mean value; that of `roll_up` is of its sum."""
        if sure is None or not np.isfinite(sure.total.low[0, i]):
            return {}
        scale = 1 / (count[i] * num_queries)
        return {
            "low": float(sure.total.low[0, i] * scale),
            "high": float(sure.total.high[0, i] * scale),
            "reliable": bool(sure.total.reliable[0, i]),
        }

    slices = [
        Slice(
            name=names[i],
            count=int(count[i]),
            mean=float(mean[i]),
            share_helping=float(helping[i]),
            share_of_influence=float(influence[i]),
            share_of_self_influence=float(itself[i]),
            gini=concentration(value[inverse == i]).gini,
            share_flagged=None if shares is None else float(shares[i]),
            **interval(i),
        )
        for i in np.argsort(-influence, kind="stable")[:MAX_SLICES].tolist()
    ]
    return Rollup(
        column,
        tuple(slices),
        len(names) - len(slices),
        concentration(influence).gini,
    )


def labels_of(gallery: Gallery) -> Categories | None:
    """The classes of a table, where it has between two and MAX_CLASSES."""
    found = categories(gallery, "label")
    return found if found is not None and 2 <= len(found[0]) <= MAX_CLASSES else None


def averaging(labels: Categories) -> np.ndarray:
    """Weights of the mean over each class ``[class, example]``."""
    names, of = labels
    member = (of[None, :] == np.arange(len(names))[:, None]).astype(np.float64)
    return member / member.sum(axis=1, keepdims=True)


def class_matrix(
    averages: np.ndarray, queries: Categories | None, train: Categories | None
) -> ClassMatrix | None:
    """Mean scores of class on class, from those of query classes ``[query label, train]``."""
    if queries is None or train is None:
        return None
    names, of = train
    sums = [np.bincount(of, weights=row, minlength=len(names)) for row in averages]
    return ClassMatrix(tuple(queries[0]), tuple(names), np.array(sums) / np.bincount(of))
