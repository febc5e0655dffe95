"""The decision tables: what to relabel, remove, look at, or leave, each with its evidence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tda.report.actions import Action, propose
from tda.report.data import Example, Scored, Values
from tda.report.examples import Gallery
from tda.report.findings import Findings
from tda.valuation import inert

NUM_MISLABELLED = 24
NUM_GROUPS = 12
NUM_COPIES = 6  # shown of each group
NUM_LEAKS = 12
NUM_INERT = 6


@dataclass(frozen=True, eq=False)
class Mislabelled:
    """An example whose neighbours have another label. own, other: their shares of the votes."""

    scored: Scored  # with its value
    suggested: str
    own: float
    other: float
    over_mean: float  # self-influence over the training set's mean


@dataclass(frozen=True, eq=False)
class Copies:
    """A group of near-identical training examples; the first is the one to keep."""

    examples: tuple[Example, ...]  # those shown
    size: int
    similarity: float  # the smallest that joined them
    exact: bool
    same_input: bool
    conflicting: bool
    value: float  # Σ value of the group


@dataclass(frozen=True, eq=False)
class Leak:
    """A query that is near-identical to a training example."""

    query: Example
    train: Scored  # with its value
    similarity: float
    exact: bool
    same_input: bool


@dataclass(frozen=True, eq=False)
class Decisions:
    """Counts are of the whole training set, None where nothing could be looked for."""

    mislabelled: tuple[Mislabelled, ...]
    num_mislabelled: int | None
    copies: tuple[Copies, ...]
    num_groups: int | None
    num_duplicates: int | None  # examples beyond the first of each group
    num_conflicting: int | None  # groups under several labels
    leaks: tuple[Leak, ...]
    num_leaked_queries: int | None
    num_leaked_examples: int | None
    inert: tuple[Scored, ...]
    num_inert: int
    num_outliers: int | None
    actions: tuple[Action, ...]
    num_train: int
    num_queries: int

    def examples(self) -> Iterator[Example]:
        """Every example the tables show."""
        yield from (each.scored.example for each in self.mislabelled)
        yield from (example for group in self.copies for example in group.examples)
        for leak in self.leaks:
            yield from (leak.query, leak.train.example)
        yield from (scored.example for scored in self.inert)

    @property
    def num_actions(self) -> dict[str, int]:
        """How many examples each action is proposed for."""
        return dict(Counter(action.action for action in self.actions))

    @property
    def share_mislabelled(self) -> float | None:
        return None if self.num_mislabelled is None else self.num_mislabelled / self.num_train

    @property
    def share_duplicated(self) -> float | None:
        return None if self.num_duplicates is None else self.num_duplicates / self.num_train

    @property
    def share_leaked(self) -> float | None:
        """Of the queries."""
        return (
            None if self.num_leaked_queries is None else self.num_leaked_queries / self.num_queries
        )

    @property
    def share_inert(self) -> float:
        return self.num_inert / self.num_train

    def removed(self) -> np.ndarray:
        """Training indices proposed for removal."""
        return np.array([a.index for a in self.actions if a.action == "remove"], np.int64)

    def relabelled(self) -> dict[int, object]:
        """Training index → the label proposed."""
        return {a.index: a.label for a in self.actions if a.action == "relabel"}


def decide(
    train: Gallery,
    queries: Gallery,
    values: Values,
    self_influence: np.ndarray,
    found: Findings,
) -> Decisions:
    """The tables of a run from what was found in it."""
    idle = inert(np.nan_to_num(values.mean))
    suspects, copies, leakage = found.suspects, found.copies, found.leakage
    pairs = None if leakage is None else leakage.pairs
    groups, num_conflicting = _groups(train, values, found)
    return Decisions(
        mislabelled=_mislabelled(train, values, self_influence, found),
        num_mislabelled=None if suspects is None else int(suspects.flagged.sum()),
        copies=groups,
        num_groups=None if copies is None else len(np.unique(copies.group)),
        num_duplicates=None
        if copies is None
        else len(copies.member) - len(np.unique(copies.group)),
        num_conflicting=num_conflicting,
        leaks=_leaks(train, queries, values, found),
        num_leaked_queries=None if pairs is None else len(np.unique(pairs.left)),
        num_leaked_examples=None if pairs is None else len(np.unique(pairs.right)),
        inert=tuple(valued(train, values, i) for i in np.flatnonzero(idle)[:NUM_INERT].tolist()),
        num_inert=int(idle.sum()),
        num_outliers=None if found.outliers is None else int(found.outliers.sum()),
        actions=propose(values, found, train.ids, queries.ids),
        num_train=train.num_rows,
        num_queries=queries.num_rows,
    )


def valued(train: Gallery, values: Values, index: int) -> Scored:
    """A training example with its value and what is known of its certainty."""
    low, high = values.interval(index)
    return Scored(
        train.example(index), float(values.mean[index]), low, high, values.reliable(index)
    )


def _mislabelled(
    train: Gallery, values: Values, self_influence: np.ndarray, found: Findings
) -> tuple[Mislabelled, ...]:
    suspects = found.suspects
    if suspects is None:
        return ()
    mean = float(np.nanmean(self_influence, dtype=np.float64)) or 1.0
    return tuple(
        Mislabelled(
            valued(train, values, index),
            train.label_name(suspects.suggested[index]) or "?",
            float(suspects.own[index]),
            float(suspects.other[index]),
            float(self_influence[index]) / mean,
        )
        for index in suspects.order[:NUM_MISLABELLED].tolist()
    )


def _groups(
    train: Gallery, values: Values, found: Findings
) -> tuple[tuple[Copies, ...], int | None]:
    """Groups to show, those under several labels first, then the largest; and how many conflict."""
    copies = found.copies
    if copies is None:
        return (), None
    starts = np.unique(copies.group, return_index=True)[1]
    sizes = np.diff(np.append(starts, len(copies.group)))
    conflicting = copies.conflicting[starts]
    of_member = dict(zip(copies.member.tolist(), copies.group.tolist(), strict=True))
    group_of_pair = np.array([of_member[i] for i in copies.pairs.left.tolist()], np.int64)
    shown = []
    for g in np.lexsort((starts, -sizes, ~conflicting))[:NUM_GROUPS].tolist():
        members = copies.member[starts[g] : starts[g] + sizes[g]]
        mine = group_of_pair == g
        shown.append(
            Copies(
                tuple(train.example(i) for i in members[:NUM_COPIES].tolist()),
                int(sizes[g]),
                float(copies.pairs.similarity[mine].min()),
                bool(copies.pairs.exact[mine].all()),
                bool(copies.pairs.same_input[mine].all()),
                bool(conflicting[g]),
                float(values.mean[members].sum()),
            )
        )
    return tuple(shown), int(conflicting.sum())


def _leaks(train: Gallery, queries: Gallery, values: Values, found: Findings) -> tuple[Leak, ...]:
    """The strongest first."""
    if found.leakage is None:
        return ()
    pairs = found.leakage.pairs
    order = np.lexsort((pairs.left, -pairs.similarity, ~pairs.exact))[:NUM_LEAKS]
    return tuple(
        Leak(
            queries.example(int(pairs.left[i])),
            valued(train, values, int(pairs.right[i])),
            float(pairs.similarity[i]),
            bool(pairs.exact[i]),
            bool(pairs.same_input[i]),
        )
        for i in order
    )
