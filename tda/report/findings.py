"""What a run says of its training set beyond the scores: intervals, wrong labels, copies, checks.

Each part is looked for on its own; one that the run lacks the means for becomes a note.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from scipy.stats import rankdata

from tda import scorer, valuation
from tda.data import evenly
from tda.errors import MismatchError, TdaError
from tda.evaluate.comparison import Row, compare
from tda.evaluate.intervals import Estimate
from tda.evaluate.record import FOLDER, GroundTruth
from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.store.files import list_folders, stat_file
from tda.valuation.faults import NEIGHBOURS, gradient_neighbours
from tda.valuation.influence import projection_parts

KNN_QUERIES = 1000  # evenly spread, for the values of k nearest neighbours
PROJECTED = 10_000  # examples that the projection's error is measured on
KNN_DISTANCES = 2 * 10**7  # at most, so fewer queries of a very large training set
_UNPROJECTED = "identity"

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Checked:
    """The linear datamodeling score of the page's recipe on a ground truth of the run."""

    name: str
    lds: Estimate
    ceiling: float | None
    num_subsets: int
    num_seeds: int


@dataclass(frozen=True, eq=False)
class Findings:
    """Everything is None, or empty, where it could not be told; ``notes`` then say why.

    values: with one slice, in sums over queries. stability: Spearman of the values of every pair of
    replicates. projection: share of the spread of values that is not the projection's noise.
    knn: KNN-Shapley values [train], for num_knn_queries. damping: λ as used at each checkpoint.
    truths: finished ground truths of this query set, by name.
    """

    values: valuation.Values | None = None
    suspects: valuation.Suspects | None = None
    outliers: np.ndarray | None = None
    copies: valuation.DuplicateGroups | None = None
    leakage: valuation.Leakage | None = None
    stability: tuple[float, ...] = ()
    projection: float | None = None
    knn: np.ndarray | None = None
    num_knn_queries: int = 0
    damping: tuple[float, ...] = ()
    checked: tuple[Checked, ...] = ()
    truths: tuple[tuple[str, GroundTruth], ...] = ()
    notes: tuple[str, ...] = ()


def find(
    run: Any, query_name: str, recipe: Recipe, self_influence: np.ndarray, with_knn: bool = True
) -> Findings:
    """Look for everything in a finished run; reads what is stored, never a model."""
    notes: list[str] = []

    def tried(what: str, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except TdaError as error:
            notes.append(f"{what}: {error.what}.")
            return None

    train = run.store.table("train")
    queries = run.store.table(f"queries/{query_name}")
    values = tried("No intervals", lambda: valuation.values(run, query_name, recipe))
    space = tried("No neighbours", lambda: valuation.space_of(train))
    labels = train.column("label") if "label" in train.columns() else None
    knn = None
    if with_knn and labels is not None and labels.dtype.kind != "f" and train.hidden:
        # First: what the searches below hold is as large as the training set.
        knn = tried("No KNN-Shapley values", lambda: knn_values(run, query_name, space))
    near = None if space is None else tried("No neighbours", lambda: _neighbours(train, space))
    suspects, outliers = None, None
    if near is not None and labels is not None:
        suspects = tried(
            "No search for wrong labels",
            lambda: valuation.mislabelled(labels, near, self_influence),
        )
        outliers = valuation.outliers(near, None if labels.dtype.kind == "f" else labels)
    elif near is not None:
        notes.append("No search for wrong labels: the run holds no labels.")
    if near is not None and near.recall < 1:
        notes.append(
            "Among so many examples the nearest were searched approximately: "
            f"{near.recall:.0%} of the true ones were found, measured on some. Wrong labels, "
            "outliers, near-copies and near-leaks rest on that; equal content is always found."
        )
    truths, checked = _ground_truths(run, query_name, recipe, notes)
    return Findings(
        values=values,
        suspects=suspects,
        outliers=outliers,
        copies=tried("No search for duplicates", lambda: valuation.duplicates(run, space=space)),
        leakage=tried(
            "No search for leaks", lambda: valuation.leakage(run, query_name, space=space)
        ),
        stability=() if values is None else _stability(values.replicates[:, 0]),
        projection=tried("The projection's error", lambda: projection_share(run, query_name)),
        knn=knn,
        num_knn_queries=len(knn_queries(train.num_rows, queries.num_rows)),
        damping=tuple(
            tried("Damping", lambda: scorer.damping_used(run.store, recipe, queries)) or ()
        ),
        checked=checked,
        truths=truths,
        notes=tuple(notes),
    )


def _neighbours(train: Any, space: valuation.Space) -> valuation.Neighbours | None:
    if train.num_rows < 2:
        return None
    return space.around.first(NEIGHBOURS) if train.hidden else gradient_neighbours(train)


def _stability(replicates: np.ndarray) -> tuple[float, ...]:
    """Spearman correlation of the values ``[replicate, train]`` of every pair of replicates."""
    count = len(replicates)
    if count < 2:
        return ()
    of_ranks = np.atleast_2d(np.corrcoef([rankdata(values) for values in replicates]))
    found = of_ranks[np.triu_indices(count, 1)]
    return tuple(found[np.isfinite(found)].tolist())


def projection_share(run: Any, query_name: str) -> float | None:
    """1 − E[error²]/Var[value] of the values under grad_dot: 1 where nothing is projected.

    Of PROJECTED training examples, spread evenly.

    The error of a value that sums B exchangeable parts is √(B·s_B²), s_B their standard deviation
    (see `tda.valuation.significance`). None where the projection has no such parts.
    """
    if run.store.manifest["projection"]["kind"] == _UNPROJECTED:
        return 1.0
    count = run.store.table("train").num_rows
    some = evenly(count, PROJECTED)
    parts = projection_parts(run, query_name, RECIPES["grad_dot"], some)
    if parts is None:
        return None
    error = len(parts) * parts.var(0, ddof=1)
    spread = float(np.mean(parts.sum(0) ** 2))
    return float(np.clip(1 - error.mean() / spread, 0, 1)) if spread > 0 else None


def knn_queries(num_train: int, num_queries: int) -> np.ndarray:
    """Which queries KNN-Shapley values are for: KNN_QUERIES, spread evenly, or as many as
    KNN_DISTANCES allow."""
    count = min(num_queries, KNN_QUERIES, max(1, KNN_DISTANCES // num_train))
    return evenly(num_queries, count)


def knn_values(run: Any, query_name: str, space: valuation.Space | None = None) -> np.ndarray:
    """KNN-Shapley values ``[train]`` of the last hidden layer by cosine, for `knn_queries`.

    space: of the training set, where it is at hand.
    """
    train, asked = run.store.table("train"), run.store.table(f"queries/{query_name}")
    some = knn_queries(train.num_rows, asked.num_rows)
    space = valuation.space_of(train) if space is None else space
    wanted = valuation.space_of(asked).unit[some]  # between directions both distances order alike
    labels = train.column("label"), asked.column("label")[some]
    return valuation.knn_shapley(space.unit, labels[0], wanted, labels[1]).value


def _ground_truths(
    run: Any, query_name: str, recipe: Recipe, notes: list[str]
) -> tuple[tuple[tuple[str, GroundTruth], ...], tuple[Checked, ...]]:
    """Finished ground truths of this training set and these queries, and the recipe's LDS on those
    with several random subsets."""
    truths, checked = [], []
    kept = run.store.path / FOLDER
    for name in list_folders(kept):
        if stat_file(kept / name / "manifest.json") is None:
            continue
        try:
            truth = GroundTruth.open(kept / name)
            row = _checked(run, truth, query_name, recipe)
        except MismatchError:
            continue  # of other queries, or of the training set before it grew
        except TdaError as error:
            notes.append(f"Ground truth {name} is left out: {error.what}.")
            continue
        truths.append((name, truth))
        if row is not None:
            checked.append(row)
    return tuple(truths), tuple(checked)


def _checked(run: Any, truth: GroundTruth, query_name: str, recipe: Recipe) -> Checked | None:
    random = truth.manifest["design"]["kind"] != "given" and len(truth.masks) > 2
    compared = compare(run, truth, query_name, [recipe] if random else [])
    if not random:
        return None
    row: Row = compared.rows[0]
    if row.lds is None or truth.path is None:
        return None
    ceiling = None if compared.ceiling is None else compared.ceiling.value
    subsets, seeds, _ = truth.outputs.shape
    return Checked(truth.path.name, row.lds, ceiling, subsets, seeds)
