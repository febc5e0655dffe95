"""From a finished run to :class:`ReportData`: reads what is stored, never a model.

The full score matrix is never made: a few numbers per training example are held, and the scores
of the shown queries for RANKED of the training examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, cast

import numpy as np

from tda import valuation
from tda.data import evenly
from tda.errors import DataError, RecipeError, TdaError
from tda.measurements import has_link
from tda.recipe import Recipe
from tda.report.agreement import (
    rank_agreement,
    self_influence_agreement,
    shared_agreement,
    value_agreement,
)
from tda.report.artifacts import ledger
from tda.report.card import card_of
from tda.report.data import (
    ENOUGH_QUERIES,
    Agreement,
    Query,
    ReportData,
    Scored,
    Values,
)
from tda.report.decisions import decide, valued
from tda.report.examples import Gallery
from tda.report.findings import Findings, find
from tda.report.removal import foretell
from tda.report.rollups import (
    SLICED,
    averaging,
    categories,
    class_matrix,
    labels_of,
    rollups,
)
from tda.report.trust import judge
from tda.run import Run
from tda.scorer.moments import Moments, moments, scores_at
from tda.scorer.signs import Signs, signs_of
from tda.store import Store
from tda.store.steady import SteadyStore
from tda.valuation.groupings import Groupings, read_groups

NUM_SUSPECTS = 24
NUM_EXTREMES = 10
RANKED = 10_000  # training examples whose scores are ranked under two recipes, spread evenly
COMPARED = ("trak", "grad_cos")
UNNORMALISED = "grad_dot"


def collect(
    run: Any,
    query_name: str | None = None,
    recipe: str | Recipe = "influence",
    k: int = 6,
    max_queries: int = 24,
    *,
    label_names: Sequence[str] | None = None,
    compare: Sequence[str] = COMPARED,
    agreements: Sequence[Agreement] = (),
    with_knn: bool = True,
    groups: str | Path | None = None,
) -> ReportData:
    """What the report of ``run`` shows for one stored query set.

    query_name: a stored query set (the first when None); recipe: a name or a Recipe; k: answers
    shown per query and sign; label_names: names of labels 0, 1, …; compare: recipes whose scores
    are ranked against ``recipe``'s, each costing one more pass over the scores; agreements: more
    of them, measured elsewhere; with_knn: also the values of k nearest neighbours; groups: a file
    of more columns to roll values up by (`tda.valuation.read_groups`).
    Raises DataError when no such query set is stored.
    """
    run = steady(run)
    chosen: Recipe = run.recipe(recipe)
    query_name = _query_set(run, query_name)
    queries = Gallery(run.store.table(f"queries/{query_name}"), label_names)
    train = Gallery(run.store.table("train"), label_names)
    shown, selection = select(queries, max_queries)
    own = [name for name in SLICED if train.column(name) is not None]
    given = Groupings({}) if groups is None else read_groups(groups, train.ids, own)
    notes = [f"{note[0].upper()}{note[1:]}." for note in given.notes]

    some = evenly(train.num_rows, RANKED)
    others, skipped = _other_scores(run, query_name, chosen, compare, shown, some)
    notes += skipped
    prepared = run.prepare(query_name, chosen)
    ranked = scores_at(prepared.select(np.array(shown)), some)
    asked, held = labels_of(queries), labels_of(train)
    averages = None if asked is None or held is None else averaging(asked)
    found = moments(prepared, averages)
    matrix = class_matrix(found.averages, asked, held)
    found = replace(found, averages=found.averages[:0])  # as large as the training set, each

    self_influence, self_note = _self_influence(run, chosen)
    evidence = find(run, query_name, chosen, self_influence, with_knn)
    values = _values(found, queries.num_rows, evidence)
    loss = train.last("loss")
    order = np.argsort(-values.mean, kind="stable")
    best = [int(i) for i in order[:NUM_EXTREMES] if values.mean[i] > 0]
    worst = [int(i) for i in order[::-1][:NUM_EXTREMES] if values.mean[i] < 0]
    top = run.top_k(prepared, k)
    signs = signs_of(prepared, run.store.manifest, top)
    answered, baseline_note = _answers(run, query_name, k, shown, queries, train, top, signs)
    decisions = decide(train, queries, values, self_influence, evidence)

    n, name = train.num_rows, chosen.name
    by_rank = (rank_agreement(name, other, ranked, theirs, n) for other, theirs in others.items())
    agreed = (
        *chain.from_iterable(by_rank),
        *shared_agreement(name, answered, n),
        *value_agreement(name, values.mean, evidence.knn, evidence.num_knn_queries),
        *self_influence_agreement(self_influence, loss),
    )
    measured = run.store.manifest.get("measurement", {})
    removal = foretell(
        values,
        decisions,
        evidence,
        measured.get("name", ""),
        bool(measured.get("has_margin")),
        _predicts_loss(chosen, measured),
        categories(train, "label"),
    )
    return ReportData(
        card=card_of(run, query_name, chosen, queries, train, evidence.damping),
        num_train=train.num_rows,
        num_queries=queries.num_rows,
        queries=answered,
        selection=selection,
        values=values,
        valuable=tuple(valued(train, values, i) for i in best),
        harmful=tuple(valued(train, values, i) for i in worst),
        self_influence=self_influence,
        suspects=_largest(train, self_influence, NUM_SUSPECTS),
        train_loss=loss,
        train_p=train.last("p"),
        highest_loss=() if loss is None else _largest(train, loss, NUM_EXTREMES),
        rollups=rollups(train, values, self_influence, evidence, given.columns),
        class_matrix=matrix,
        agreements=(*agreements, *agreed),
        notes=(*notes, *self_note, *baseline_note, *evidence.notes),
        decisions=decisions,
        trust=judge(values, evidence).with_removals(removal.measured),
        removal=removal,
        ledger=ledger(train, queries, values, evidence, top, given.columns, signs),
        example=train.example,
        signs="" if signs is None else signs.rule.says,
    )


def steady(run: Any) -> Any:
    """The run as it is now: its tables are looked through once for the whole report."""
    return Run(cast(Store, SteadyStore(run.store))) if isinstance(run, Run) else run


def _predicts_loss(recipe: Recipe, measurement: Mapping[str, Any]) -> bool:
    """Whether scores are predicted rises of the loss if an example is left out."""
    own = (recipe.query, recipe.train) == ("loss", "loss")
    own = own and recipe.scale == "inverse_n" and recipe.normalize == "none"
    return own and (recipe.curvature_rows == "gauss_newton" or has_link(measurement))


def _values(over: Moments, num_queries: int, found: Findings) -> Values:
    """Mean and its standard error over the queries, and what `tda.valuation` says of it."""
    mean = over.mean
    error = None
    if num_queries >= ENOUGH_QUERIES:
        error = np.sqrt(over.variance / num_queries)
    return with_certainty(Values(mean, error), found.values)


def with_certainty(values: Values, found: valuation.Values | None, part: int = 0) -> Values:
    """Values with the intervals of `tda.valuation`, a mean over the queries of slice ``part``."""
    if found is None:
        return values
    count = int(found.num_queries[part])
    every, scale = found.significance, 1 / count
    sure = valuation.Significance(
        value=every.value[part] * scale,
        standard_error=every.standard_error[part] * scale,
        low=every.low[part] * scale,
        high=every.high[part] * scale,
        p=every.p[part],
        q=every.q[part],
    )
    return replace(
        values,
        sure=sure,
        num_replicates=len(found.replicates),
        independent=found.independent,
        covers=found.covers,
    )


def _query_set(run: Any, name: str | None) -> str:
    stored = list(run.queries)
    if name is None and stored:
        return stored[0]
    if name is None or name not in stored:
        raise DataError(
            "the report needs a stored query set",
            where=run.store.path,
            found=", ".join(stored) or "none",
            wanted=name or "at least one",
            do="add one with run.add_queries(dataset), or name one that is stored",
        )
    return name


def select(queries: Gallery, count: int) -> tuple[list[int], str]:
    """Which queries to show, and the sentence that says how they were chosen.

    Half are those the model finds hardest, half are spread evenly over the others, so that a
    reader sees failures first and ordinary predictions too.
    """
    total = queries.num_rows
    loss = queries.last("loss")
    if loss is None:
        every = evenly(total, count).tolist()
        return every, "all of them" if total <= count else "spread evenly"
    hardest = [int(i) for i in np.argsort(-np.nan_to_num(loss, nan=-np.inf), kind="stable")]
    if total <= count:
        return hardest, "all of them, highest loss first"
    first, rest = hardest[: (count + 1) // 2], sorted(hardest[(count + 1) // 2 :])
    spread = evenly(len(rest), count - len(first))
    return (
        first + [rest[i] for i in spread],
        f"the {len(first)} with the highest loss, then {len(spread)} spread evenly over the rest",
    )


def _other_scores(
    run: Any,
    query_name: str,
    recipe: Recipe,
    compare: Sequence[str],
    shown: list[int],
    some: np.ndarray,
) -> tuple[dict[str, np.ndarray], list[str]]:
    scores, notes = {}, []
    for name in compare:
        if name == recipe.name:
            continue
        try:
            scores[name] = scores_at(run.prepare(query_name, name).select(np.array(shown)), some)
        except RecipeError as error:
            notes.append(f"Not compared with {name}: {error.what}.")
    return scores, notes


def _answers(
    run: Any,
    query_name: str,
    k: int,
    shown: list[int],
    queries: Gallery,
    train: Gallery,
    top: Any,
    signs: Signs | None,
) -> tuple[tuple[Query, ...], list[str]]:
    """The shown queries with their answers, and why there is no baseline if so."""
    notes = []
    try:
        nearest = run.baseline_top_k(query_name, k, shown).proponents
    except TdaError as error:
        nearest = None
        notes.append(f"No embedding baseline: {error.what}.")

    def strongest(side: str, row: int, sign: int) -> tuple[Scored, ...]:
        ranking = getattr(top, side)
        keep = sign * ranking.scores[row] > 0  # with k close to n the far end has the other sign
        found = train.scored(ranking.indices[row][keep], ranking.scores[row][keep])
        if signs is None:
            return found
        sure = getattr(signs, side)[row][keep].tolist()
        return tuple(replace(x, reliable=r) for x, r in zip(found, sure, strict=True))

    answered = tuple(
        Query(
            example=queries.example(row),
            proponents=strongest("proponents", row, 1),
            opponents=strongest("opponents", row, -1),
            nearest=()
            if nearest is None
            else train.scored(nearest.indices[place], nearest.scores[place]),
            classes=train.classes,
        )
        for place, row in enumerate(shown)
    )
    return answered, notes


def _self_influence(run: Any, recipe: Recipe) -> tuple[np.ndarray, list[str]]:
    """[train], from a recipe that can tell examples apart by it."""
    if recipe.normalize != "both":
        return np.asarray(run.self_influence(recipe)), []
    return np.asarray(run.self_influence(UNNORMALISED)), [
        f"{recipe.name} normalises every example, so the self-influence of all is the same: "
        f"suspects are those of {UNNORMALISED}."
    ]


def _largest(train: Gallery, by: np.ndarray, count: int) -> tuple[Scored, ...]:
    order = np.argsort(-np.nan_to_num(by, nan=-np.inf), kind="stable")[:count]
    order = order[np.isfinite(by[order])]
    return train.scored(order, by[order])
