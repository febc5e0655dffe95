"""Values rolled up: by source, annotator, class or cluster, and source × query slice.

    value[slice, group] = Σ_{i in group} value[slice, i]

Replicates are summed before anything is tested, so a group's standard error holds whatever its
examples have in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tda.errors import DataError
from tda.valuation.frames import frame
from tda.valuation.influence import Values
from tda.valuation.significance import Significance, significance_of


@dataclass(frozen=True, eq=False)
class GroupValues:
    """Groups of training examples, valued for slices of the queries.

    groups, slices: names. count ``[group]``. total ``[slice, group]``: the summed value, tested.
    share_of_absolute ``[slice, group]``: Σ|value| of the group over that of all; a share above
    count/n weighs more than its size. share_helping: of its examples with value > 0.
    interaction ``[slice, group]``, tested: the mean value less what the group is worth for all
    slices and the slice gets from all groups; > 0 where the two suit each other.
    """

    groups: tuple[str, ...]
    slices: tuple[str, ...]
    count: np.ndarray
    total: Significance
    share_of_absolute: np.ndarray
    share_helping: np.ndarray
    interaction: Significance

    @property
    def mean(self) -> np.ndarray:
        """Value of an example of the group ``[slice, group]``."""
        return self.total.value / self.count

    def to_frame(self) -> Any:
        """One row a slice and group (pandas)."""
        num_slices, num_groups = self.total.value.shape
        cells: dict[str, Any] = {
            "value": self.total.value,
            "standard_error": self.total.standard_error,
            "ci_lo": self.total.low,
            "ci_hi": self.total.high,
            "q": self.total.q,
            "mean": self.mean,
            "share_of_absolute": self.share_of_absolute,
            "share_helping": self.share_helping,
            "interaction": self.interaction.value,
            "interaction_q": self.interaction.q,
        }
        return frame(
            {
                "slice": np.repeat(np.array(self.slices), num_groups),
                "group": np.tile(np.array(self.groups), num_slices),
                "count": np.tile(self.count, num_slices),
                **{name: cell.ravel() for name, cell in cells.items()},
            }
        )


def roll_up(values: Values | np.ndarray, groups: Any) -> GroupValues:
    """Values by group. values: of `tda.valuation.values`, or any ``[train]`` or ``[slice, train]``.

    groups: one name an example ``[train]`` – a column of the run, or clusters of your own.
    The interaction of an array of one slice is 0: a single slice suits no group better.
    """
    if isinstance(values, Values):
        slices, replicates, parts = values.slices, values.replicates, values.parts
        queries, independent = values.num_queries.astype(np.float64), values.independent
    else:
        replicates, parts = np.atleast_2d(np.asarray(values, np.float64))[None], None
        slices = tuple(str(index) for index in range(replicates.shape[1]))
        queries, independent = np.ones(len(slices)), True
    names, inverse = np.unique(np.asarray(groups), return_inverse=True)
    if inverse.shape != replicates.shape[2:]:
        raise DataError(
            "groups do not match the values",
            found=f"{list(inverse.shape)} names",
            wanted=f"one a training example [{replicates.shape[2]}]",
        )
    count = np.bincount(inverse, minlength=len(names)).astype(np.float64)
    value = replicates.mean(0)

    def summed(of: np.ndarray) -> np.ndarray:
        """Over the examples of each group: [..., train] to [..., group]."""
        rows = of.reshape(-1, of.shape[-1])
        sums = [np.bincount(inverse, weights=row, minlength=len(names)) for row in rows]
        return np.array(sums).reshape(*of.shape[:-1], len(names))

    absolute = summed(np.abs(value))
    whole = absolute.sum(1, keepdims=True)

    def interacting(of: np.ndarray) -> np.ndarray:
        mean = summed(of) / count / queries[:, None]  # of an example, for a query
        centred = mean - mean.mean(-1, keepdims=True)
        return centred - centred.mean(-2, keepdims=True)

    def tested(of: np.ndarray, pieces: np.ndarray | None) -> Significance:
        return significance_of(of, pieces, independent)

    return GroupValues(
        groups=tuple(str(name) for name in names),
        slices=slices,
        count=count.astype(np.int64),
        total=tested(summed(replicates), None if parts is None else summed(parts)),
        share_of_absolute=np.divide(absolute, whole, out=np.zeros_like(absolute), where=whole > 0),
        share_helping=summed(value > 0) / count,
        interaction=tested(interacting(replicates), None if parts is None else interacting(parts)),
    )


@dataclass(frozen=True)
class Concentration:
    """How unevenly absolute value is spread over n examples.

    gini: 0 where all weigh the same, 1 − 1/n where one has all. top_1_percent, top_10_percent:
    share of those with the most (at least one example). effective: exp(entropy) of the shares, the
    number of equal examples that would be spread as evenly (Hill 1973, order 1).
    """

    gini: float
    top_1_percent: float
    top_10_percent: float
    effective: float


def concentration(values: np.ndarray) -> Concentration:
    """Concentration of |value| ``[train]``; all of nothing is spread evenly."""
    size = np.sort(np.abs(np.asarray(values, np.float64)))[::-1]
    count, total = size.size, size.sum()
    if total == 0:
        size, total = np.ones(count), float(count)
    share = size / total
    rank = np.arange(1, count + 1)
    some = share[share > 0]
    return Concentration(
        gini=float((count + 1 - 2 * (rank * share).sum()) / count),
        top_1_percent=float(share[: max(1, count // 100)].sum()),
        top_10_percent=float(share[: max(1, count // 10)].sum()),
        effective=float(np.exp(-(some * np.log(some)).sum())),
    )
