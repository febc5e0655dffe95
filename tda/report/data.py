"""What a report shows, as frozen values of plain numpy arrays, numbers and strings.

Nothing here knows of a store or a model: :func:`tda.report.collect` makes a :class:`ReportData`
from a run, :func:`tda.report.render` turns one into a page, and a test writes one by hand.
Axes are the engine's: query, train, checkpoint; a score > 0 means "training on it helps".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from tda.valuation import Concentration, concentration

if TYPE_CHECKING:
    from tda.report.decisions import Decisions
    from tda.report.difference import Difference
    from tda.report.removal import Removal
    from tda.report.trust import Trust
    from tda.valuation import Significance

CLEAR = 3.0
"""A mean counts as clear when it is this many standard errors from zero (.3 % by chance)."""
ENOUGH_QUERIES = 8
"""With fewer queries than this a standard error over queries says nothing; none is given."""


@dataclass(frozen=True, eq=False)
class Example:
    """One example as the reader sees it; what the run does not hold is None."""

    index: int
    id: str
    label: str | None = None
    source: str | None = None
    group: str | None = None
    text: str | None = None
    image: np.ndarray | None = None  # uint8 [H, W] or [H, W, 3]
    row: tuple[float, ...] | None = None  # a tabular example's numbers
    loss: float | None = None  # at the last checkpoint
    p: float | None = None  # probability the model gives the label, at the last checkpoint


@dataclass(frozen=True, eq=False)
class Scored:
    """An example with the one number it is ranked by (score, cosine, value, self-influence).

    low, high: a value's 95 % interval, and whether its sign survives; None where not known.
    """

    example: Example
    score: float
    low: float | None = None
    high: float | None = None
    reliable: bool | None = None


@dataclass(frozen=True, eq=False)
class Query:
    """One query with its answer and, beside it, the answer of the embedding baseline."""

    example: Example
    proponents: tuple[Scored, ...]  # score > 0, strongest first
    opponents: tuple[Scored, ...]  # score < 0, strongest first
    nearest: tuple[Scored, ...] = ()  # cosine of last hidden layers, highest first
    classes: bool = True  # labels are classes, not targets of a regression

    def same_label(self, answer: tuple[Scored, ...]) -> int | None:
        """How many of ``answer`` carry the query's class; None when it has none."""
        if self.example.label is None or not self.classes or not answer:
            return None
        return sum(scored.example.label == self.example.label for scored in answer)

    @property
    def shared(self) -> int | None:
        """How many proponents are also among the nearest; None without the baseline."""
        if not self.nearest or not self.proponents:
            return None
        near = {scored.example.index for scored in self.nearest}
        return sum(scored.example.index in near for scored in self.proponents)


@dataclass(frozen=True, eq=False)
class Values:
    """The value of each training example: its mean score over *all* queries of the set.

    ``mean`` [train]; ``error`` [train] is the standard error of that mean over the queries, or
    None when there are too few. ``sure`` [train]: how it changes with the training, from
    ``num_replicates`` of them; ``covers`` says what that is.
    """

    mean: np.ndarray
    error: np.ndarray | None = None
    sure: Significance | None = None
    num_replicates: int = 0
    independent: bool = False
    covers: str = "nothing: it was not measured"

    @property
    def has_intervals(self) -> bool:
        return self.sure is not None and bool(np.isfinite(self.sure.low).any())

    def interval(self, index: int) -> tuple[float | None, float | None]:
        """The 95 % interval of a value; (None, None) where it is not known."""
        if self.sure is None or not np.isfinite(self.sure.low[index]):
            return None, None
        return float(self.sure.low[index]), float(self.sure.high[index])

    def reliable(self, index: int) -> bool | None:
        """Whether the sign of a value survives; None where that cannot be told."""
        if self.sure is None or not np.isfinite(self.sure.q[index]):
            return None
        return bool(self.sure.reliable[index])

    @property
    def num_reliable(self) -> int | None:
        """How many signs survive; None where no test can be made: it takes several trainings."""
        tested = self.sure is not None and bool(np.isfinite(self.sure.q).any())
        return int(self.sure.reliable.sum()) if tested and self.sure is not None else None

    @property
    def num_helping(self) -> int:
        return int(np.count_nonzero(self.mean > 0))

    @property
    def num_hurting(self) -> int:
        return int(np.count_nonzero(self.mean < 0))

    @property
    def num_clearly_helping(self) -> int | None:
        if self.error is None:
            return None
        return int(np.count_nonzero((self.mean > 0) & (self.mean > CLEAR * self.error)))

    @property
    def num_clearly_hurting(self) -> int | None:
        if self.error is None:
            return None
        return int(np.count_nonzero((self.mean < 0) & (-self.mean > CLEAR * self.error)))

    @cached_property
    def concentration(self) -> Concentration:
        """How unevenly |value| is spread over the training examples."""
        return concentration(self.mean)


@dataclass(frozen=True)
class Slice:
    """The training examples with one value in one column."""

    name: str
    count: int
    mean: float  # mean value
    share_helping: float  # share of them with value > 0
    share_of_influence: float  # Σ|value| here over Σ|value| everywhere
    share_of_self_influence: float
    low: float | None = None  # the 95 % interval of ``mean``
    high: float | None = None
    reliable: bool | None = None
    gini: float = 0.0  # of |value| within the slice
    share_flagged: float | None = None  # likely mislabelled, of the slice's examples


@dataclass(frozen=True)
class Rollup:
    """Values by label, source or group; the slices with the most influence, most first."""

    column: str
    slices: tuple[Slice, ...]
    num_omitted: int = 0
    gini: float = 0.0  # of Σ|value| over slices: 0 where all slices carry the same

    @property
    def largest_mean(self) -> float:
        return max((abs(part.mean) for part in self.slices), default=0.0)


@dataclass(frozen=True, eq=False)
class ClassMatrix:
    """Mean score of the training examples of one label on the queries of another."""

    query_labels: tuple[str, ...]
    train_labels: tuple[str, ...]
    mean: np.ndarray  # [query label, train label]

    @property
    def strongest(self) -> float:
        return float(np.abs(self.mean).max(initial=0.0))

    def row(self, query_label: int) -> list[float]:
        return [float(mean) for mean in self.mean[query_label]]


RETRAINING = "retraining"


@dataclass(frozen=True)
class Agreement:
    """How far two ways of asking give the same answer.

    ``measure`` says what ``value`` is; ``low`` and ``high`` are its range over ``count`` queries
    (or checkpoint pairs); ``chance`` is what unrelated answers would give. An agreement with the
    measured effect of retraining has ``right=RETRAINING``, and is the only one that proves a thing.
    """

    left: str
    right: str
    measure: str
    value: float
    chance: float = 0.0
    low: float | None = None
    high: float | None = None
    count: int | None = None

    @property
    def above_chance(self) -> float:
        """``value`` rescaled so that 0 is chance and 1 is the same answer."""
        return (self.value - self.chance) / max(1e-9, 1 - self.chance)


@dataclass(frozen=True)
class Checkpoint:
    name: str
    digest: str
    step: int | None = None
    learning_rate: float | None = None
    train_loss: float | None = None  # mean over the training set
    query_loss: float | None = None  # mean over the query set
    damping: float | None = None  # λ as used, in the unit of the curvature's eigenvalues


@dataclass(frozen=True)
class Card:
    """What was asked, how, of what: enough to ask again and get the same page."""

    run: str
    query_set: str
    recipe: str
    summary: str
    formula: str
    explained: str  # what was computed, field by field of the recipe
    reference: str
    damping: str
    measurement: str
    projection: str
    dtype: str
    checkpoints: tuple[Checkpoint, ...]
    facts: tuple[tuple[str, str], ...] = ()  # of the model, from the manifest
    digests: tuple[tuple[str, str], ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, eq=False)
class Ledger:
    """What the files beside the page hold, whole: every example, every query's answer.

    columns: of the training set by name (``id``, and ``label``, ``source``, ``group`` where there
    are), as stored. flags: name → [train] bool. others: values of other kinds, [train].
    answers: columns of ``top_k.parquet``.
    """

    columns: Mapping[str, np.ndarray]
    flags: Mapping[str, np.ndarray]
    others: Mapping[str, np.ndarray]
    answers: Mapping[str, np.ndarray]


@dataclass(frozen=True, eq=False)
class ReportData:
    """Everything in one report. ``num_train`` and ``num_queries`` count the whole sets."""

    card: Card
    num_train: int
    num_queries: int
    queries: tuple[Query, ...]  # those shown
    selection: str  # how the shown queries were chosen
    values: Values
    valuable: tuple[Scored, ...]
    harmful: tuple[Scored, ...]
    self_influence: np.ndarray  # [train]
    suspects: tuple[Scored, ...]  # highest self-influence first
    train_loss: np.ndarray | None = None  # [train], last checkpoint
    train_p: np.ndarray | None = None  # [train], last checkpoint
    highest_loss: tuple[Scored, ...] = ()  # the loss baseline, the same for every query
    decisions: Decisions | None = None
    trust: Trust | None = None
    removal: Removal | None = None
    difference: Difference | None = None
    ledger: Ledger | None = None
    example: Callable[[int], Example] | None = None  # any training example, by index
    rollups: tuple[Rollup, ...] = ()
    class_matrix: ClassMatrix | None = None
    agreements: tuple[Agreement, ...] = ()
    signs: str = ""  # what the sign of a reliable score has passed; nothing where that is unknown
    notes: tuple[str, ...] = field(default=())  # what could not be shown, and why

    @property
    def shows(self) -> str:
        """How examples are drawn: "image", "text", "row", or "id" when only names are known."""
        shown = [query.example for query in self.queries]
        shown += [scored.example for scored in self.suspects]
        for kind, of in (
            ("image", lambda e: e.image),
            ("text", lambda e: e.text),
            ("row", lambda e: e.row),
        ):
            if any(of(example) is not None for example in shown):
                return kind
        return "id"

    @property
    def retraining(self) -> Agreement | None:
        """The agreement with retrained models, where one was measured."""
        return next((a for a in self.agreements if a.right == RETRAINING), None)

    @property
    def others(self) -> tuple[Agreement, ...]:
        """Agreements with other ways of asking the question of this page, lowest first."""
        others = (a for a in self.agreements if a.left == self.card.recipe)
        return tuple(
            sorted((a for a in others if a.right != RETRAINING), key=lambda a: a.above_chance)
        )

    @property
    def has_labels(self) -> bool:
        return any(scored.example.label is not None for scored in self.suspects)

    @property
    def has_sources(self) -> bool:
        every = [scored.example for scored in self.suspects]
        return any(e.source is not None or e.group is not None for e in every)
