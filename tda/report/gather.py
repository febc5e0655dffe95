"""From a finished run to :class:`ReportData`: reads what is stored, never a model.

The full score matrix is reduced lazily, block by block; only the rows of the shown queries and
one number per training example are ever held.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import dask
import numpy as np

from tda.errors import DataError, RecipeError, TdaError
from tda.recipe import Recipe
from tda.recipes import get_recipe
from tda.report.agreement import rank_agreement, self_influence_agreement, shared_agreement
from tda.report.data import (
    ENOUGH_QUERIES,
    Agreement,
    Card,
    Checkpoint,
    ClassMatrix,
    Query,
    ReportData,
    Scored,
    Values,
)
from tda.report.examples import Gallery, clean
from tda.report.rollups import class_matrix_factors, rollups

NUM_SUSPECTS = 24
NUM_EXTREMES = 10
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
    dampings: Sequence[float] = (),
) -> ReportData:
    """What the report of ``run`` shows for one stored query set.

    query_name: a stored query set (the first when None); recipe: a name or a Recipe; k: answers
    shown per query and sign; label_names: names of labels 0, 1, …; compare: recipes whose scores
    are ranked against ``recipe``'s, each costing one more pass over the scores; agreements: more
    of them, measured elsewhere (across checkpoints, against retraining); dampings: λ as used at
    each checkpoint.
    Raises DataError when no such query set is stored.
    """
    recipe = get_recipe(recipe)
    query_name = _query_set(run, query_name)
    queries = Gallery(run.store.table(f"queries/{query_name}"), label_names)
    train = Gallery(run.store.table("train"), label_names)
    shown, selection = select(queries, max_queries)
    notes: list[str] = []

    scores = run.scores(query_name, recipe)
    others, skipped = _other_scores(run, query_name, recipe, compare)
    notes += skipped
    factors = class_matrix_factors(queries, train)
    lazy: dict[str, Any] = {
        "sums": scores.map_blocks(
            _sums, dtype=np.float64, chunks=((2,) * scores.numblocks[0], scores.chunks[1])
        ),
        "rows": scores[shown],
        "others": {name: other[shown] for name, other in others.items()},
    }
    if factors is not None:
        lazy["matrix"] = factors.query @ scores @ factors.train
    (found,) = dask.compute(lazy)  # one pass over the blocks serves every reduction

    values = _values(found["sums"], queries.num_rows)
    self_influence, self_note = _self_influence(run, recipe)
    notes += self_note
    loss = train.last("loss")
    order = np.argsort(-values.mean, kind="stable")
    best = [i for i in order[:NUM_EXTREMES] if values.mean[i] > 0]
    worst = [i for i in order[::-1][:NUM_EXTREMES] if values.mean[i] < 0]
    answered, baseline_note = _answers(run, query_name, recipe, k, shown, queries, train)
    notes += baseline_note

    found_agreements: tuple[Agreement, ...] = ()
    for name, rows in found["others"].items():
        found_agreements += rank_agreement(recipe.name, name, found["rows"], rows)
    found_agreements += shared_agreement(recipe.name, answered, train.num_rows)
    found_agreements += self_influence_agreement(self_influence, loss)
    return ReportData(
        card=_card(run, query_name, recipe, queries, train, dampings),
        num_train=train.num_rows,
        num_queries=queries.num_rows,
        queries=answered,
        selection=selection,
        values=values,
        valuable=train.scored(best, values.mean[best]),
        harmful=train.scored(worst, values.mean[worst]),
        self_influence=self_influence,
        suspects=_largest(train, self_influence, NUM_SUSPECTS),
        train_loss=loss,
        train_p=train.last("p"),
        highest_loss=() if loss is None else _largest(train, loss, NUM_EXTREMES),
        rollups=rollups(train, values.mean, self_influence),
        class_matrix=None
        if factors is None
        else ClassMatrix(factors.query_labels, factors.train_labels, found["matrix"]),
        agreements=(*agreements, *found_agreements),
        notes=tuple(notes),
    )


def _sums(block: np.ndarray) -> np.ndarray:
    """Σ s and Σ s² over the queries of a block [query, train], as [2, train] float64; no copy."""
    squares = np.einsum("qt,qt->t", block, block, dtype=np.float64)
    return np.stack([block.sum(axis=0, dtype=np.float64), squares])


def _values(sums: np.ndarray, num_queries: int) -> Values:
    """Mean and its standard error from the sums [2 · blocks, train] of all blocks of queries."""
    total, squares = sums.reshape(-1, 2, sums.shape[1]).sum(axis=0)
    mean = total / num_queries
    if num_queries < ENOUGH_QUERIES:
        return Values(mean)
    variance = np.maximum(squares - num_queries * mean**2, 0) / (num_queries - 1)
    return Values(mean, np.sqrt(variance / num_queries))


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
        every = sorted(set(np.linspace(0, total - 1, min(count, total)).round().astype(int)))
        return [int(i) for i in every], "all of them" if total <= count else "spread evenly"
    hardest = [int(i) for i in np.argsort(-np.nan_to_num(loss, nan=-np.inf), kind="stable")]
    if total <= count:
        return hardest, "all of them, highest loss first"
    first, rest = hardest[: (count + 1) // 2], sorted(hardest[(count + 1) // 2 :])
    spread = np.linspace(0, len(rest) - 1, count - len(first)).round().astype(int)
    return (
        first + [rest[i] for i in spread],
        f"the {len(first)} with the highest loss, then {len(spread)} spread evenly over the rest",
    )


def _other_scores(
    run: Any, query_name: str, recipe: Recipe, compare: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    scores, notes = {}, []
    for name in compare:
        if name == recipe.name:
            continue
        try:
            scores[name] = run.scores(query_name, name)
        except RecipeError as error:
            notes.append(f"Not compared with {name}: {error.what}.")
    return scores, notes


def _answers(
    run: Any,
    query_name: str,
    recipe: Recipe,
    k: int,
    shown: list[int],
    queries: Gallery,
    train: Gallery,
) -> tuple[tuple[Query, ...], list[str]]:
    """The shown queries with their top answers, and why the baseline is missing if it is."""
    top = run.top_k(query_name, k, recipe)
    notes = []
    try:
        nearest = run.baseline_top_k(query_name, k).proponents
    except TdaError as error:
        nearest = None
        notes.append(f"No embedding baseline: {error.what}.")

    def strongest(ranking: Any, row: int, sign: int) -> tuple[Scored, ...]:
        keep = sign * ranking.scores[row] > 0  # with k close to n the far end has the other sign
        return train.scored(ranking.indices[row][keep], ranking.scores[row][keep])

    answered = tuple(
        Query(
            example=queries.example(row),
            proponents=strongest(top.proponents, row, 1),
            opponents=strongest(top.opponents, row, -1),
            nearest=()
            if nearest is None
            else train.scored(nearest.indices[row], nearest.scores[row]),
            classes=train.classes,
        )
        for row in shown
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


def _card(
    run: Any,
    query_name: str,
    recipe: Recipe,
    queries: Gallery,
    train: Gallery,
    dampings: Sequence[float],
) -> Card:
    manifest: Mapping[str, Any] = run.store.manifest
    measurement = manifest.get("measurement", {})
    digests = [("measurement", measurement.get("digest"))]
    digests += [
        (f"model {key}".removesuffix(" digest"), value)
        for key, value in _digests(manifest.get("model", {}))
    ]
    data = manifest.get("data", {}).get("train", {})
    digests.append(("training data", data.get("digest") or _content_digest(train)))
    digests.append((f"queries {query_name}", _content_digest(queries)))
    return Card(
        run=clean(run.store.path.name, 120),
        query_set=clean(query_name, 120),
        recipe=recipe.name,
        summary=recipe.summary,
        formula=recipe.formula,
        explained=recipe.explain(),
        reference=recipe.reference,
        damping=damping_text(recipe),
        measurement=clean(measurement.get("name", "unknown"), 120),
        projection=_projection(manifest.get("projection", {})),
        dtype=clean(manifest.get("dtype", "unknown"), 40),
        checkpoints=_checkpoints(manifest, queries, train, dampings),
        facts=tuple(
            (clean(key, 60), clean(value, 200))
            for key, value in manifest.get("model", {}).items()
            if not isinstance(value, Mapping | list) and not _is_digest(key)
        ),
        digests=tuple((clean(key, 80), clean(value, 200)) for key, value in digests if value),
        versions=tuple(
            (clean(key, 60), clean(value, 60))
            for key, value in sorted(manifest.get("versions", {}).items())
        ),
    )


def damping_text(recipe: Recipe) -> str:
    """The damping of a recipe in words."""
    if recipe.function == "identity":
        return "none: this recipe uses no curvature"
    if recipe.damping == "auto":
        return "automatic, not tuned: λ = tr(H)/n, the mean squared row norm over n"
    return f"λ = {recipe.damping:g} · tr(H)/k, that many times the mean eigenvalue"


def _checkpoints(
    manifest: Mapping[str, Any], queries: Gallery, train: Gallery, dampings: Sequence[float]
) -> tuple[Checkpoint, ...]:
    def mean(gallery: Gallery, checkpoint: int) -> float | None:
        loss = gallery.column("loss")
        if loss is None or not np.isfinite(loss[checkpoint]).any():
            return None
        return float(np.nanmean(loss[checkpoint], dtype=np.float64))

    return tuple(
        Checkpoint(
            name=clean(checkpoint.get("name", position), 120),
            digest=clean(checkpoint.get("digest", ""), 200),
            step=checkpoint.get("step"),
            learning_rate=checkpoint.get("learning_rate"),
            train_loss=mean(train, position),
            query_loss=mean(queries, position),
            damping=float(dampings[position]) if dampings else None,
        )
        for position, checkpoint in enumerate(manifest.get("checkpoints", []))
    )


def _is_digest(key: str) -> bool:
    return "digest" in key or "hash" in key


def _digests(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(key, str(value)) for key, value in facts.items() if _is_digest(key)]


def _content_digest(gallery: Gallery) -> str | None:
    digests = gallery.column("digest")
    if digests is None:
        return None
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16).hexdigest()


def _projection(spec: Mapping[str, Any]) -> str:
    """Kind first, then what makes it this one: "count_sketch, dim 2048, seed 0"."""
    rest = [
        f"{key} {value}"
        for key, value in spec.items()
        if key != "kind" and not _is_digest(key) and isinstance(value, str | int | float)
    ]
    return clean(", ".join([str(spec.get("kind", "unknown")), *rest]), 300)
