"""Which examples to look at: wrong labels with the right one suggested, outliers, inert examples.

Candidates, not verdicts. What is usual is taken class by class: a class is not suspect for being
rare, hard or hidden in a larger one, and what is usual in a class is no fault of its members.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from tda.errors import DataError
from tda.run import Run
from tda.valuation.frames import frame
from tda.valuation.last_rows import embeddings, gradients
from tda.valuation.nearest import Neighbours, Space, neighbours

NEIGHBOURS = 15  # that vote
FAR = 3.5  # robust z-score beyond which a value is an outlier (Iglewicz and Hoaglin 1993)
INERT_SHARE = 0.001
UNUSUAL = 0.05  # chance of as few votes in the class
_VOTES = 2**22  # counted at a time


@dataclass(frozen=True, eq=False)
class Suspects:
    """Every example's case for a wrong label.

    label, suggested ``[example]``: the label it has, and the one its neighbours vote for. own,
    other ``[example]``: share of votes for each. score ``[example]``: rank by it; in [0, 2), ≥ 1
    where flagged. flagged ``[example]``. ids, or None.
    """

    label: np.ndarray
    suggested: np.ndarray
    own: np.ndarray
    other: np.ndarray
    score: np.ndarray
    flagged: np.ndarray
    ids: np.ndarray | None = None

    @property
    def order(self) -> np.ndarray:
        """Flagged examples, worst first; equal ones by index."""
        worst = np.argsort(-self.score, kind="stable")
        return worst[self.flagged[worst]]

    def to_frame(self) -> Any:
        """One row a flagged example, worst first (pandas)."""
        order = self.order
        return frame(
            {
                "id": order if self.ids is None else self.ids[order],
                "label": self.label[order],
                "suggested": self.suggested[order],
                "votes_for_label": self.own[order],
                "votes_for_suggested": self.other[order],
                "score": self.score[order],
            }
        )


def mislabelled(labels: Any, near: Neighbours, self_influence: Any = None) -> Suspects:
    """Examples whose neighbours have another label, as neighbours of its class seldom do.

    Votes are the shares of labels among an example's k neighbours, and u_c is their usual share:
    the mean vote for c of the examples labelled c. An example with label y is flagged for c ≠ y,
    its strongest other vote, where c has more votes than y and, X ~ Binomial(k, u),

        P(X ≤ k·votes(y) | u_y) < .05        too few votes for a member of its own class, and
        P(X ≤ k·votes(c) | u_c) ≥ .05        enough for a member of the other.

    (Confident learning, Northcutt et al. 2021, compares with u_c itself, which passes over half of
    the wrong labels of a class well set apart.) Within the flagged, those of larger self-influence,
    by rank in their class, come first: the model had to learn them by heart.
    Raises DataError for labels that are not classes.
    """
    label = np.asarray(labels)
    if label.dtype.kind == "f":
        raise DataError(
            "these labels are no classes", found="fractions", wanted="whole numbers, or names"
        )
    classes, code = np.unique(label, return_inverse=True)
    own, suggested, other = tally(code, len(classes), near)
    count = np.bincount(code)
    usual = np.bincount(code, weights=own) / count
    k = near.indices.shape[1]
    chance = stats.binom.cdf(np.arange(k + 1), k, usual[:, None])  # of as few votes, by class

    def unusual(votes: np.ndarray, of: np.ndarray) -> np.ndarray:
        return chance[of, np.rint(votes * k).astype(np.int64)] < UNUSUAL

    flagged = (other > own) & unusual(own, code) & ~unusual(other, suggested)
    doubt = 0.5 * (1 + other - own)  # 0 … 1
    if self_influence is not None:
        doubt = 0.5 * (doubt + _rank_within(np.asarray(self_influence, np.float64), code))
    score = doubt * (1 - 1e-9) + flagged
    return Suspects(label, classes[suggested], own, other, score, flagged)


def tally(
    code: np.ndarray, num_classes: int, near: Neighbours
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(votes for the own class, the strongest other class, votes for it) ``[example]``, as shares.

    code ``[example]``: 0 … num_classes − 1. Of equally strong classes the first.
    """
    own, other = np.empty((2, len(code)))
    strongest = np.empty(len(code), np.int64)
    size = max(1, _VOTES // num_classes)
    for start in range(0, len(code), size):
        some = slice(start, start + size)
        cast = code[near.indices[some]]
        every = np.arange(len(cast))
        votes = np.bincount(
            (every[:, None] * num_classes + cast).ravel(), minlength=len(cast) * num_classes
        ).reshape(len(cast), num_classes)
        own[some] = votes[every, code[some]]
        votes[every, code[some]] = -1
        strongest[some] = votes.argmax(1)
        other[some] = np.maximum(votes[every, strongest[some]], 0)
    k = near.indices.shape[1]
    return own / k, strongest, other / k


def mislabelled_in(run: Run, recipe: str = "influence", k: int = NEIGHBOURS) -> Suspects:
    """`mislabelled` of a run's training set: neighbours in its last hidden layer.

    Without embeddings, neighbours by |cosine| of gradients: an example that looks the same and has
    another label is an opponent, with the opposite gradient. Raises StoreError without labels.
    """
    train = run.store.table("train")
    labels = train.column("label")
    rows = embeddings(train) if train.hidden else None
    near = neighbours(rows, k) if rows is not None else gradient_neighbours(train, k)
    found = mislabelled(labels, near, run.self_influence(recipe))
    return Suspects(**{**vars(found), "ids": run.ids})


def gradient_neighbours(table: Any, k: int = NEIGHBOURS) -> Neighbours:
    """Proponents and opponents alike: the largest |cos⟨∇f_i, ∇f_j⟩| at the last checkpoint."""
    rows = gradients(table).numpy()
    n, k = len(rows), min(k, len(rows) - 1)
    # |cos| of x is the larger cosine with x and −x, so k + 1 of either sign hold the k nearest.
    space = Space(np.concatenate([rows, -rows]))
    two = space.nearest(space.unit[:n], 2 * k + 2)
    indices = two.indices % n
    keep = indices != np.arange(n)[:, None]
    keep &= np.cumsum(keep, axis=1) <= k
    return Neighbours(indices[keep].reshape(n, k), two.similarity[keep].reshape(n, k), two.recall)


def outliers(near: Neighbours, labels: Any = None) -> np.ndarray:
    """``[example]`` bool: farther from its neighbours than is usual in its class.

    d = log of the mean 1 − cos to its neighbours (distances are skewed, their logarithms hardly),
    as a robust z-score 0.6745 (d − median)/MAD within the class, above FAR.
    """
    apart = 1 - near.similarity.mean(1, dtype=np.float64)
    distance = np.log(np.maximum(apart, 1e-7))  # float32 tells no smaller ones apart
    code = np.zeros(len(distance), np.int64)
    if labels is not None:
        code = np.unique(np.asarray(labels), return_inverse=True)[1]
    found = np.zeros(len(distance), bool)
    order = np.argsort(code, kind="stable")
    for members in np.split(order, np.cumsum(np.bincount(code))[:-1]):
        mine = distance[members]
        centred = mine - np.median(mine)
        spread = np.median(np.abs(centred))
        found[members] = 0.6745 * centred > FAR * max(spread, 1e-3)
    return found


def inert(weights: Any, share: float = INERT_SHARE) -> np.ndarray:
    """``[example]`` bool: the lightest examples that together hold at most ``share`` of the weight.

    weights ``[example]``: values or self-influence, taken without sign. All of those could go
    without a change that first-order influence can see. Equal weights are all inert or all not.
    """
    size = np.abs(np.asarray(weights, np.float64))
    if size.ndim != 1 or not np.isfinite(size).all():
        raise DataError("weights are not numbers [example]", found=f"shape {list(size.shape)}")
    levels, inverse, count = np.unique(size, return_inverse=True, return_counts=True)
    held = np.cumsum(levels * count)
    return (held <= share * held[-1])[inverse] if held[-1] > 0 else np.ones(len(size), bool)


def _rank_within(values: np.ndarray, code: np.ndarray) -> np.ndarray:
    """Rank of every value in its class, 0 the smallest … 1 the largest."""
    order = np.lexsort((values, code))
    size = np.bincount(code)
    start = np.cumsum(size) - size
    rank = np.empty(len(values))
    rank[order] = np.arange(len(values)) - start[code[order]]
    return rank / np.maximum(size[code] - 1, 1)
