"""``tda value``: what each training example is worth, as files and tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import tda
from tda.cli import tables
from tda.errors import ConfigError, DataError, RecipeError, StoreError, TdaError
from tda.report.artifacts import flags, parquet, value_columns
from tda.report.data import Ledger, Values
from tda.report.examples import Gallery
from tda.report.findings import Findings, knn_values
from tda.report.gather import with_certainty
from tda.store.files import write_file
from tda.valuation import GroupValues, data_oob, roll_up, values
from tda.valuation.groupings import Groupings, read_groups
from tda.valuation.last_rows import embeddings

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.table import Table

    from tda.run import Run
    from tda.valuation import Values as Found

COLUMNS = ("label", "source", "group")
FOLDER = "value"  # of a run; the report has a values.parquet of its own
NAME, GROUPS = "values.parquet", "groups.parquet"


@dataclass(frozen=True, eq=False)
class Valued:
    """Values of a run's training examples for the slices of a query set, per query.

    others: values of other kinds by name, ``[train]``; why_not: those that there are not.
    given: groupings from a file, by name.
    """

    run: Run
    queries: str
    found: Found
    self_influence: np.ndarray | None
    others: dict[str, np.ndarray]
    groups: dict[str, GroupValues]
    given: dict[str, np.ndarray]
    why_not: tuple[str, ...]
    metric: str | None = None

    def values(self, part: int) -> Values:
        """Those of one slice, a mean over its queries."""
        mean = self.found.value[part] / self.found.num_queries[part]
        return with_certainty(Values(mean), self.found, part)

    def write(self, path: Path) -> list[Path]:
        """The values at ``path``, the roll-ups beside them; each whole or not at all."""
        train = Gallery(self.run.store.table("train"))
        present = {name: train.column(name) for name in COLUMNS}
        own = {name: c for name, c in present.items() if c is not None and c.ndim == 1}
        held = {**own, **self.given}
        parts: list[dict[str, Any]] = []
        for part, name in enumerate(self.found.slices):
            mine = self.values(part)
            book = Ledger({"id": train.ids, **held}, flags(mine, Findings()), self.others, {})
            columns = value_columns(mine, self.self_influence, book)
            parts.append({"slice": [name] * train.num_rows, **columns})
        about = {
            "run": str(self.run.path),
            "queries": self.queries,
            "recipe": self.found.recipe,
            "metric": self.metric or "that of the recipe",
            "value": "mean over the queries of the slice; above 0: it helps",
            "intervals": f"95 %; they cover {self.found.covers}",
        }
        write_file(path, parquet(_joined(parts), about))
        if not self.groups:
            return [path]
        beside = path.with_name(GROUPS if path.name == NAME else f"{path.stem}-groups.parquet")
        write_file(beside, parquet(_joined(list(self._group_rows())), about))
        return [path, beside]

    def _group_rows(self) -> Iterator[dict[str, Any]]:
        queries = self.found.num_queries
        for column, found in self.groups.items():
            for part, name in enumerate(found.slices):
                scale = 1 / (found.count * queries[part])
                yield {
                    "column": [column] * len(found.groups),
                    "slice": [name] * len(found.groups),
                    "group": list(found.groups),
                    "count": found.count,
                    "value": found.total.value[part] * scale,
                    "ci_lo": found.total.low[part] * scale,
                    "ci_hi": found.total.high[part] * scale,
                    "q": found.total.q[part],
                    "reliable": found.total.reliable[part],
                    "share_of_absolute": found.share_of_absolute[part],
                    "share_helping": found.share_helping[part],
                    "interaction": found.interaction.value[part],
                    "interaction_q": found.interaction.q[part],
                }

    def tables(self, limit: int) -> Iterator[Table]:
        """The most and least valuable of every slice, then the groups."""
        ids = self.run.ids
        for part, name in enumerate(self.found.slices):
            mine = self.values(part)
            order = np.argsort(-mine.mean, kind="stable")
            most = min(limit, len(order) // 2)
            rows = [_row(mine, ids, int(i)) for i in (*order[:most], *order[len(order) - most :])]
            title = (
                f"{name}: value for a query ({self.found.num_queries[part]} of them), best first"
            )
            columns = ("example", "value ", "95 % interval ", "p ", "q ", "reliable")
            yield tables.table(title, columns, rows)
        for column, groups in self.groups.items():
            for part, name in enumerate(groups.slices):
                yield self._group_table(column, groups, part, f"by {column}, {name}")

    def _group_table(self, column: str, groups: GroupValues, part: int, title: str) -> Table:
        scale = 1 / (groups.count * self.found.num_queries[part])
        share, total = groups.share_of_absolute[part], groups.total
        order = np.argsort(-share, kind="stable")[:30]
        rows = [
            (
                groups.groups[g],
                f"{groups.count[g]:,}",
                f"{total.value[part, g] * scale[g]:+.3g}",
                _interval(total.low[part, g] * scale[g], total.high[part, g] * scale[g]),
                f"{share[g]:.1%}",
                f"{groups.share_helping[part, g]:.0%}",
            )
            for g in order
        ]
        columns = (column, "examples ", "mean value ", "95 % interval ", "of all influence ",
                   "above zero ")  # fmt: skip
        return tables.table(title, columns, rows)


def value(
    run: Run,
    queries: str,
    recipe: str,
    *,
    by: str | None = None,
    only: str | None = None,
    others: Sequence[str] = (),
    bags: int = 0,
    groups: str | Path | None = None,
    metric: str | None = None,
) -> Valued:
    """by: slices of the queries by a column; only: ``COLUMN=NAME``, one slice; others: runs of
    independent trainings on the same data; bags: of Data-OOB, 0 for none; groups: a file of
    groupings, see `read_groups`; metric: see `tda.valuation.metrics`.
    """
    if by and only:
        raise ConfigError("--by and --slice say two things", do="give one of them")
    asked = run.store.table(f"queries/{queries}").columns()
    if by is not None and (by not in COLUMNS or by not in asked):
        raise ConfigError(
            "the queries cannot be sliced by this",
            where="--by",
            found=by,
            wanted=", ".join(name for name in COLUMNS if name in asked) or "they have no labels",
        )
    chosen = run.recipe(recipe)
    own = [name for name in COLUMNS if name in run.store.table("train").columns()]
    given = Groupings({}) if groups is None else read_groups(groups, run.ids, own)
    slices: Any = by if only is None else _chosen(run, queries, only)
    runs = [run, *(tda.open(path) for path in others)]
    for each in runs:
        if queries not in each.queries:
            raise StoreError(
                f"this run has no query set {queries!r}", where=each.path,
                wanted=", ".join(each.queries) or "none is stored",
            )  # fmt: skip
    found = values(runs, queries, chosen, slices, metric)
    if only is not None:
        found = _one_slice(found, only)
    why_not = list(given.notes)
    itself = None
    try:
        itself = run.self_influence(chosen if chosen.normalize != "both" else "grad_dot")
    except RecipeError as error:
        why_not.append(f"no self-influence: {error.what}")
    rolled = {
        name: roll_up(found, run.store.table("train").column(name))
        for name in own
        if _is_category(run.store.table("train").column(name))
    }
    rolled |= {name: roll_up(found, column) for name, column in given.columns.items()}
    return Valued(
        run,
        queries,
        found,
        itself,
        _model_free(run, queries, bags, why_not),
        rolled,
        given.columns,
        tuple(why_not),
        metric,
    )


def place(run: Path, by: str | None, only: str | None) -> Path:
    """Where values are written by default."""
    if by is not None:
        return run / FOLDER / f"values-by-{by}.parquet"
    return run / FOLDER / (NAME if only is None else "values-slice.parquet")


def _chosen(run: Run, queries: str, only: str) -> np.ndarray:
    """``COLUMN=NAME`` as one name a query: those meant, and the rest."""
    column, equals, name = only.partition("=")
    table = run.store.table(f"queries/{queries}")
    if not equals or column not in table.columns():
        raise ConfigError(
            "this slice cannot be read",
            where="--slice",
            found=only,
            wanted="COLUMN=NAME, a column of the query set: "
            + ", ".join(c for c in COLUMNS if c in table.columns()),
        )
    names = table.column(column).astype(str)
    if not (names == name).any():
        raise DataError(
            f"no query has {column} {name!r}",
            where="--slice",
            wanted=", ".join(np.unique(names)[:20].tolist()),
        )
    return np.where(names == name, "in", "out")


def _one_slice(found: Found, name: str) -> Found:
    """The slice "in" alone: q is then taken over its values only."""
    place = found.slices.index("in")
    parts = None if found.parts is None else found.parts[:, [place]]
    return replace(
        found,
        slices=(name,),
        num_queries=found.num_queries[[place]],
        replicates=found.replicates[:, [place]],
        parts=parts,
    )


def _model_free(run: Run, queries: str, bags: int, why_not: list[str]) -> dict[str, np.ndarray]:
    """KNN-Shapley, and Data-OOB if asked for, where there are embeddings and classes."""
    train = run.store.table("train")
    label = train.column("label") if "label" in train.columns() else None
    if label is None or label.dtype.kind == "f" or not train.hidden:
        why_not.append("no KNN-Shapley and Data-OOB: they take embeddings and classes")
        return {}
    found = {}
    try:
        found["knn_shapley"] = knn_values(run, queries)
    except TdaError as error:
        why_not.append(f"no KNN-Shapley: {error.what}")
    if bags:
        found["data_oob"] = data_oob(embeddings(train), label, num_bags=bags).value
    return found


def _is_category(column: np.ndarray) -> bool:
    return column.ndim == 1 and column.dtype.kind != "f" and len(np.unique(column)) < len(column)


def _joined(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Columns of several parts under each other."""
    return {name: [value for part in parts for value in _listed(part[name])] for name in parts[0]}


def _listed(column: Any) -> list[Any]:
    return column if isinstance(column, list) else column.tolist()


def _row(mine: Values, ids: np.ndarray, index: int) -> tuple[str, ...]:
    low, high = mine.interval(index)
    sure, reliable = mine.sure, mine.reliable(index)
    return (
        str(ids[index]),
        f"{mine.mean[index]:+.3g}",
        "–" if low is None or high is None else _interval(low, high),
        "–" if sure is None else _known(sure.p[index]),
        "–" if sure is None else _known(sure.q[index]),
        "–" if reliable is None else "yes" if reliable else "no",
    )


def _interval(low: float, high: float) -> str:
    return f"{low:+.3g} … {high:+.3g}" if np.isfinite(low) else "–"


def _known(number: float) -> str:
    return f"{number:.2g}" if np.isfinite(number) else "–"
