"""Data-OOB: an example is worth what learners that did not see it make of it.

    ψ_i = Σ_b 1[i ∉ bag b] · T(y_i, f_b(x_i)) / Σ_b 1[i ∉ bag b]

Kwon and Zou 2023, "Data-OOB: out-of-bag estimate as a simple and efficient data value", eq. 2: T is
1[y = ŷ] for classes. No validation set, no model of yours. Low: hard, rare, or wrongly labelled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.base import is_classifier
from sklearn.ensemble import BaggingClassifier, BaggingRegressor
from sklearn.tree import DecisionTreeClassifier

from tda.errors import DataError
from tda.valuation.frames import frame


@dataclass(frozen=True, eq=False)
class DataOob:
    """Per training example: value ψ, its standard error over bags, and how many bags left it out.

    value: share of right predictions, or minus the mean squared error of a regression. NaN where
    no bag left the example out. vote: the label most of those learners predict (classes only).
    standard_error covers the draw of bags, not of the data.
    """

    value: np.ndarray
    standard_error: np.ndarray
    num_bags: np.ndarray
    vote: np.ndarray | None

    def to_frame(self) -> Any:
        """One row a training example (pandas)."""
        columns = {
            "value": self.value,
            "standard_error": self.standard_error,
            "num_bags": self.num_bags,
        }
        return frame(columns if self.vote is None else {**columns, "vote": self.vote})


def data_oob(
    features: Any,
    labels: Any,
    *,
    learner: Any = None,
    num_bags: int = 500,
    seed: int = 0,
    workers: int | None = None,
) -> DataOob:
    """Values of ``features [train, ...]`` with ``labels [train]`` by a bagging of weak learners.

    learner: a scikit-learn classifier, or a regressor for numbers; by default a decision tree, as
    in the paper. workers: processes to fit with.
    """
    x = np.asarray(features, np.float32)
    x, y = x.reshape(len(x), -1), np.asarray(labels)
    if y.shape != (len(x),) or len(x) < 2:
        raise DataError(
            "features and labels do not match",
            found=f"{list(x.shape)} and {list(y.shape)}",
            wanted="[train, ...] and [train], two examples or more",
        )
    learner = DecisionTreeClassifier() if learner is None else learner
    bagging = BaggingClassifier if is_classifier(learner) else BaggingRegressor
    fitted = bagging(learner, n_estimators=num_bags, random_state=seed, n_jobs=workers).fit(x, y)
    return _out_of_bag(fitted, x, y) if is_classifier(learner) else _errors(fitted, x, y)


def _bags(fitted: Any, x: np.ndarray) -> Any:
    """(who was left out, what the learner predicts for them) of every bag."""
    for learner, bag in zip(fitted.estimators_, fitted.estimators_samples_, strict=True):
        out = np.setdiff1d(np.arange(len(x)), bag)
        if len(out):
            yield out, learner.predict(x[out])


def _out_of_bag(fitted: Any, x: np.ndarray, y: np.ndarray) -> DataOob:
    votes = np.zeros((len(x), len(fitted.classes_)))
    for out, predicted in _bags(fitted, x):
        votes[out, predicted.astype(np.int64)] += 1  # learners are fitted on class positions
    count = votes.sum(1)
    right = votes[np.arange(len(x)), np.searchsorted(fitted.classes_, y)]
    value, error = _mean(right, right, count)
    return DataOob(value, error, count.astype(np.int64), fitted.classes_[votes.argmax(1)])


def _errors(fitted: Any, x: np.ndarray, y: np.ndarray) -> DataOob:
    count, total, squares = np.zeros((3, len(x)))
    for out, predicted in _bags(fitted, x):
        scored = -((predicted - y[out]) ** 2)
        count[out] += 1
        total[out] += scored
        squares[out] += scored**2
    value, error = _mean(total, squares, count)
    return DataOob(value, error, count.astype(np.int64), None)


def _mean(total: np.ndarray, squares: np.ndarray, count: np.ndarray) -> tuple:
    """(mean, its standard error) from sums; NaN where there is too little to tell."""
    some = np.where(count > 0, count, np.nan)
    value = total / some
    variance = np.maximum(squares / some - value**2, 0) / np.where(count > 1, count - 1, np.nan)
    return value, np.sqrt(variance)
