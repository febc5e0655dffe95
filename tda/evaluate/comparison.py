"""Recipes side by side on one ground truth."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tda.errors import MismatchError, RecipeError
from tda.evaluate.intervals import Estimate
from tda.evaluate.metrics import lds_of_predictions, noise_ceiling, predictions
from tda.evaluate.record import GroundTruth
from tda.examples import Examples
from tda.recipe import Recipe
from tda.run import Run
from tda.store.files import Place, to_json, write_file

_RESULTS = "results.json"


@dataclass(frozen=True)
class Row:
    """One recipe: its LDS and the seconds its scores took, or why there are none.

    The first recipe that needs a curvature also pays for it: the store keeps it for the next.
    """

    recipe: str
    lds: Estimate | None
    seconds: float | None = None
    why_not: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Rows, best first, and the LDS that no method can be expected to pass."""

    queries: str
    truth: GroundTruth
    ceiling: Estimate | None
    rows: tuple[Row, ...]

    def write(self) -> Place:
        """RUN/evaluate/NAME/results.json, whole or not at all."""
        assert self.truth.path is not None
        subsets, seeds, queries = self.truth.outputs.shape
        path = self.truth.path / _RESULTS
        about: dict[str, Any] = {
            "design": self.truth.manifest["design"],
            "num_subsets": subsets,
            "num_seeds": seeds,
            "num_queries": queries,
            "queries": self.queries,
            "noise_ceiling": None if self.ceiling is None else asdict(self.ceiling),
            "rows": [asdict(row) for row in self.rows],
        }
        write_file(path, to_json(about))
        return path


def compare(
    run: Run, truth: GroundTruth, queries: str, recipes: Sequence[str | Recipe]
) -> Comparison:
    """The LDS of every recipe on the stored query set that the ground truth was made with.

    A recipe that asks for what the run does not hold has a row that says so.
    Raises MismatchError where the run, or its query set, is not the one that was retrained.
    """
    _require_same(run, truth, queries)
    rows = [_row(run, truth, queries, run.recipe(recipe)) for recipe in recipes]
    rows.sort(key=lambda row: -row.lds.value if row.lds else 1.0)
    return Comparison(queries, truth, noise_ceiling(truth), tuple(rows))


def _row(run: Run, truth: GroundTruth, queries: str, recipe: Recipe) -> Row:
    started = time.perf_counter()
    try:
        predicted = predictions(run.scores(queries, recipe=recipe), truth)
    except RecipeError as error:
        return Row(recipe.name, None, why_not=error.what)
    seconds = time.perf_counter() - started
    return Row(recipe.name, lds_of_predictions(predicted, truth), seconds)


def _require_same(run: Run, truth: GroundTruth, queries: str) -> None:
    table = run.store.table(f"queries/{queries}")
    digest = Examples(table.column("id"), table.column("digest")).digest()
    pairs = {
        "training set": (run.store.manifest["data"]["train"], truth.manifest["train"]),
        "query set": (digest, truth.manifest["queries"]["digest"]),
    }
    for name, (here, there) in pairs.items():
        if here != there:
            raise MismatchError(
                f"the ground truth is of another {name}",
                where=truth.path,
                found=here,
                wanted=there,
                do="retrain under another name, or name the query set it was made with",
            )
