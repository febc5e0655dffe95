"""How far two recipes agree about a query, and which groups of examples its answer comes from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tda.evaluate.intervals import spearman
from tda.explorer.asking import Explorer, Question, Ranked, extremes
from tda.explorer.library import COLUMNS, Shelf
from tda.recipe import Recipe


@dataclass(frozen=True)
class Comparison:
    """Two answers to one question. ``chance`` is the overlap that unrelated answers would have."""

    left: tuple[Ranked, Ranked]  # proponents, opponents
    right: tuple[Ranked, Ranked]
    overlap: tuple[float, float]  # shares of the k strongest that both have: for, against
    chance: float
    spearman: float | None  # of all scores; None where one side's are all equal
    num_train: int


def compare(explorer: Explorer, question: Question, other: Recipe, k: int) -> Comparison:
    """The question under its own recipe and under another: overlap@k, and the rank correlation of
    the scores of the whole training set."""
    ours, theirs = explorer.scores(question), explorer.scores(question.using(other))
    left, right = extremes(ours, k), extremes(theirs, k)
    shared = [np.isin(a.indices, b.indices).mean() for a, b in zip(left, right, strict=True)]
    rank = spearman(ours, theirs)
    n = len(ours)
    return Comparison(
        left=left,
        right=right,
        overlap=(float(shared[0]), float(shared[1])),
        chance=min(k, n) / n,
        spearman=rank if np.isfinite(rank) else None,
        num_train=n,
    )


@dataclass(frozen=True)
class Group:
    """The training examples with one value in one column."""

    name: str
    count: int
    total: float  # Σ score
    mean: float
    share: float  # of Σ|score| over the training set
    share_of_examples: float
    share_helping: float  # of the group's examples, with a score > 0


@dataclass(frozen=True)
class Groups:
    column: str
    groups: tuple[Group, ...]  # the largest share first


def group_view(explorer: Explorer, question: Question) -> list[Groups]:
    """The scores of a question summed by every column that sorts the training examples out."""
    scores = explorer.scores(question)
    shelf = explorer.library.train
    found = (_grouped(shelf, column, scores) for column in COLUMNS)
    return [groups for groups in found if groups is not None]


def _grouped(shelf: Shelf, column: str, scores: np.ndarray) -> Groups | None:
    sorted_out = shelf.categories(column)
    if sorted_out is None or not 2 <= len(sorted_out[0]) < shelf.num_rows:
        return None
    names, each = sorted_out

    def total(of: np.ndarray) -> np.ndarray:
        return np.bincount(each, weights=of, minlength=len(names))

    count = total(np.ones_like(scores))
    size, sums, helping = total(np.abs(scores)), total(scores), total(scores > 0)
    whole = size.sum() or 1.0
    order = np.argsort(-size, kind="stable")
    return Groups(
        column,
        tuple(
            Group(
                name=names[i],
                count=int(count[i]),
                total=float(sums[i]),
                mean=float(sums[i] / count[i]),
                share=float(size[i] / whole),
                share_of_examples=float(count[i] / len(scores)),
                share_helping=float(helping[i] / count[i]),
            )
            for i in order
        ),
    )
