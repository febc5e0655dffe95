"""Why did performance change between two data sets? Which mechanism moved, and what did that cost.

A data set is drawn by mechanisms, P(of | given), one after another: P(x) then P(y | x), or
P(source) then P(x | source). Between source data and target data some of them moved. For a
coalition S of mechanisms taken from the target and the rest from the source,

    v(S) = E_source[ w_S · ℓ ] − E_source[ ℓ ],     w_S = Π_{m in S} p_target(m) / p_source(m)

and each mechanism is given its Shapley value in v (Zhang et al. 2023, "Why did the model fail?
Attributing model performance changes to distribution shifts", eq. 1–4). Together they explain
v(all); what is left of the observed difference is shown.

Ratios are those of classifiers that tell target from source: r(x) = p/(1 − p) · n_source/n_target
on examples they were not fitted on, and P(of | given) moved by r(of, given)/r(given).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
from sklearn.compose import make_column_transformer
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline, make_union
from sklearn.preprocessing import (
    FunctionTransformer,
    OneHotEncoder,
    PolynomialFeatures,
    StandardScaler,
)

from tda.errors import DataError
from tda.valuation.frames import frame
from tda.valuation.semivalues import coefficients

FOLDS = 5
WIDE = 40  # features; with their squares and products, 860
RARE = 20  # examples of a category that a classifier sees; fewer tell little of its ratio
ENOUGH = 0.1  # of the source examples must still count after weighting
_Z = 1.959963984540054


@dataclass(frozen=True)
class Mechanism:
    """P(of | given): names of columns; without ``given`` a marginal."""

    of: tuple[str, ...]
    given: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"P({', '.join(self.of)}{' | ' if self.given else ''}{', '.join(self.given)})"


@dataclass(frozen=True, eq=False)
class Shift:
    """The difference ℓ̄_target − ℓ̄_source, shared out over mechanisms, in units of ℓ.

    value ``[mechanism]``, with standard_error and a 95 % interval over source examples (ratios
    taken as known). observed: the difference, observed_error its standard error; explained: v(all);
    unexplained: the rest.
    effective ``[mechanism]``: share of the source examples that still count once weighted for this
    mechanism alone, (Σw)²/(n Σw²) (Kish 1965) · min(1, Σw/n), before ratios are cut; the latter is
    the share of the target that they cover, as E_source[w] = 1 where they cover all of it.
    effective_all: for all mechanisms. clipped: share of source examples whose ratio was cut.
    """

    mechanisms: tuple[str, ...]
    value: np.ndarray
    standard_error: np.ndarray
    low: np.ndarray
    high: np.ndarray
    observed: float
    observed_error: float
    explained: float
    effective: np.ndarray
    effective_all: float
    clipped: float

    @property
    def unexplained(self) -> float:
        return self.observed - self.explained

    @property
    def verdict(self) -> str:
        """Whether the two data sets overlap enough for weighting to say anything."""
        if self.effective_all < ENOUGH:
            return (
                f"not reliable: the source data hardly cover the target ({self.effective_all:.1%} "
                "of the examples count once weighted)"
            )
        chance = _Z * self.observed_error
        if abs(self.observed) <= chance:
            return "the observed difference is within chance: there is little to explain"
        if abs(self.unexplained) <= chance:
            return "the mechanisms explain the observed difference to within chance"
        share = abs(self.unexplained / self.observed)
        return f"{share:.0%} of the observed difference is left unexplained"

    def to_frame(self) -> Any:
        """One row a mechanism (pandas)."""
        return frame(
            {
                "mechanism": list(self.mechanisms),
                "value": self.value,
                "standard_error": self.standard_error,
                "ci_lo": self.low,
                "ci_hi": self.high,
                "effective": self.effective,
            }
        )


def explain_shift(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    source_metric: Any,
    target_metric: Any,
    mechanisms: Sequence[Mechanism],
    *,
    classifier: Any = None,
    clip: float = 20.0,
    seed: int = 0,
) -> Shift:
    """Share out mean(target_metric) − mean(source_metric) over what may have moved.

    source, target: columns by name, ``[example]`` or ``[example, dim]``; strings and integers are
    categories, other numbers are quantities. *_metric ``[example]``: what is averaged (a loss, or
    0/1 for right) of one fixed model. classifier: tells target from source, with predict_proba, and
    takes the columns side by side, categories as whole numbers; by default a quadratic logistic
    regression on one-hot codes. clip: a ratio is cut to [1/clip, clip].

    Raises DataError where a mechanism names an unknown column, lengths differ, or a quantity is not
    finite, or what the classifier makes of it.
    """
    old, new = np.asarray(source_metric, np.float64), np.asarray(target_metric, np.float64)
    columns = sorted({name for m in mechanisms for name in (*m.of, *m.given)})
    _check(source, target, old, new, columns, mechanisms)
    ratios: dict[tuple[str, ...], np.ndarray] = {(): np.ones(len(old))}

    def ratio(names: tuple[str, ...]) -> np.ndarray:
        key = tuple(sorted(set(names)))
        if key not in ratios:
            ratios[key] = _ratio([(source[n], target[n]) for n in key], classifier, seed)
        return ratios[key]

    raw = np.stack([ratio((*m.of, *m.given)) / ratio(m.given) for m in mechanisms])
    moved = np.clip(raw, 1 / clip, clip)
    weights = _coalition_weights(moved)
    weights = weights / weights.mean(1, keepdims=True)
    means = weights @ old / len(old)
    shares = coefficients(len(mechanisms))
    value = shares @ (means - old.mean())
    # v is linear in the weights, which are normalised: each example's part of v(S) is w(ℓ − v(S)).
    scattered = shares @ (weights * (old[None] - means[:, None]))
    error = scattered.std(1, ddof=1) / np.sqrt(len(old))
    kept = _effective(_coalition_weights(raw))
    return Shift(
        mechanisms=tuple(str(m) for m in mechanisms),
        value=value,
        standard_error=error,
        low=value - _Z * error,
        high=value + _Z * error,
        observed=float(new.mean() - old.mean()),
        observed_error=float(np.sqrt(new.var(ddof=1) / len(new) + old.var(ddof=1) / len(old))),
        explained=float(means[-1] - old.mean()),
        effective=kept[1 << np.arange(len(mechanisms))],
        effective_all=float(kept[-1]),
        clipped=float((raw != moved).any(0).mean()),
    )


def density_ratio(source: Any, target: Any, classifier: Any = None, seed: int = 0) -> np.ndarray:
    """p_target/p_source at every source example ``[example]``, of columns given as arrays.

    Each example is judged by a classifier that was fitted without it (FOLDS folds). Raises
    DataError where a quantity, or what a classifier makes of it, is not finite.
    """
    pair = np.asarray(source), np.asarray(target)
    for where, column in zip(("source", "target"), pair, strict=True):
        _require_finite("values", where, column)
    return _ratio([pair], classifier, seed)


def _coalition_weights(moved: np.ndarray) -> np.ndarray:
    """w_S of every coalition ``[2^mechanism, example]``, of mean 1 only where they overlap."""
    weights = np.ones((1, moved.shape[1]))
    for row in moved:
        weights = np.concatenate([weights, weights * row])
    return weights


def _effective(weights: np.ndarray) -> np.ndarray:
    """(E w)²/E w² · min(1, E w) of every row: weights all alike and tiny count for nothing."""
    mean = weights.mean(1)
    return mean**2 / (weights**2).mean(1) * np.minimum(1, mean)


def _ratio(pairs: Sequence[tuple[Any, Any]], classifier: Any, seed: int) -> np.ndarray:
    old, new = len(pairs[0][0]), len(pairs[0][1])
    features, categorical = _features(pairs)
    is_new = np.repeat([0, 1], [old, new])
    model = _default(categorical, features) if classifier is None else classifier
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    p = cross_val_predict(model, features, is_new, cv=folds, method="predict_proba")[:old, 1]
    if not np.isfinite(p).all():
        raise DataError(
            "the classifier that tells target from source gives no probability",
            where=f"example {int(np.argmax(~np.isfinite(p)))} of the source",
            found=f"{p[~np.isfinite(p)][0]} of {type(model).__name__}",
            wanted="finite numbers from predict_proba",
            do="give another classifier, or leave out columns that are the same everywhere",
        )
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return p / (1 - p) * old / new


def _default(categorical: list[int], features: np.ndarray) -> Any:
    """Logistic regression on all squares and products: exact for a log ratio of two Gaussians.

    Categories are one-hot. Of more than WIDE features, the squares and products are those of
    WIDE/2 principal components, besides all features themselves.
    """
    squares = PolynomialFeatures(2, include_bias=False)
    steps = [
        _codes(categorical, features),
        StandardScaler(),
        squares,
        StandardScaler(),
        LogisticRegression(C=0.1, max_iter=1000),
    ]
    if steps[0].fit_transform(features).shape[1] > WIDE:
        leading = make_pipeline(PCA(WIDE // 2), squares)
        steps[2] = make_union(FunctionTransformer(), leading)
    return make_pipeline(*steps)


def _codes(categorical: list[int], features: np.ndarray) -> Any:
    """One-hot codes of categories; those of fewer than RARE examples are one category.

    Where these hold most of the examples, it is all but the WIDE most frequent that are one.
    """
    one_hot = partial(OneHotEncoder, sparse_output=False, handle_unknown="ignore")
    small = [index for index in categorical if _mostly_rare(features[:, index])]
    return make_column_transformer(
        (one_hot(min_frequency=RARE), [index for index in categorical if index not in small]),
        (one_hot(max_categories=WIDE), small),
        remainder="passthrough",
    )


def _mostly_rare(column: np.ndarray) -> bool:
    seen = np.unique(column, return_counts=True)[1] * (1 - 1 / FOLDS)
    return bool(seen[seen < RARE].sum() > seen.sum() / 2)


def _features(pairs: Sequence[tuple[Any, Any]]) -> tuple[np.ndarray, list[int]]:
    """(both data sets under each other ``[example, feature]``, which features are categories)."""
    blocks: list[np.ndarray] = []
    categorical: list[int] = []
    width = 0
    for old, new in pairs:
        both = np.concatenate([np.asarray(old), np.asarray(new)])
        both = both.reshape(len(both), -1)
        if both.dtype.kind not in "fc":
            both = np.stack([np.unique(c, return_inverse=True)[1] for c in both.T], axis=1)
            categorical += range(width, width + both.shape[1])
        blocks.append(both.astype(np.float64))
        width += both.shape[1]
    return np.concatenate(blocks, axis=1), categorical


def _check(
    source: Mapping[str, Any],
    target: Mapping[str, Any],
    old: np.ndarray,
    new: np.ndarray,
    columns: Sequence[str],
    mechanisms: Sequence[Mechanism],
) -> None:
    for where, data, metric in (("source", source, old), ("target", target, new)):
        for name in columns:
            if name not in data or len(data[name]) != len(metric):
                raise DataError(
                    f"column {name!r} of the {where} does not go with its metric",
                    found=f"{len(data[name])} examples" if name in data else "no such column",
                    wanted=f"{len(metric)} examples",
                )
            _require_finite(name, where, np.asarray(data[name]))
        if metric.ndim != 1 or len(metric) < 2 * FOLDS or not np.isfinite(metric).all():
            raise DataError(
                f"the metric of the {where} cannot be used",
                found=f"shape {list(metric.shape)}",
                wanted=f"finite numbers [example], {2 * FOLDS} or more",
            )
    names = sorted(name for m in mechanisms for name in m.of)
    twice = [a for a, b in pairwise(names) if a == b]
    if not mechanisms or twice:
        raise DataError(
            "mechanisms do not make up a data set",
            found=f"{twice[0]!r} is drawn by two of them" if twice else "none",
            wanted="each column drawn by at most one mechanism, one or more of them",
        )


def _require_finite(name: str, where: str, column: np.ndarray) -> None:
    if column.dtype.kind not in "fc" or np.isfinite(column).all():
        return
    missing = ~np.isfinite(column).reshape(len(column), -1).all(1)
    raise DataError(
        f"column {name!r} of the {where} is not finite",
        where=f"example {int(np.argmax(missing))}",
        found=f"NaN or infinity in {int(missing.sum())} of {len(column)} examples",
        wanted="finite numbers, or strings for categories",
        do="leave these examples out, or fill them in",
    )
