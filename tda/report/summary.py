"""``summary.json``: every number of the page, exact, for programs and continuous integration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tda.report.charts import value_bins
from tda.report.data import Example, ReportData, Rollup, Scored
from tda.report.words import headline, limits, reading

FORMAT = 1


def summarise(data: ReportData) -> dict[str, Any]:
    """The report as plain JSON values; undefined numbers are null, pictures are left out."""
    edges, counts = value_bins(data.values.mean)
    values = data.values
    found = {
        "format": FORMAT,
        "headline": headline(data),
        "card": dataclasses.asdict(data.card),
        "num_train": data.num_train,
        "num_queries": data.num_queries,
        "num_checkpoints": len(data.card.checkpoints),
        "num_shown": len(data.queries),
        "selection": data.selection,
        "values": {
            "num_helping": values.num_helping,
            "num_hurting": values.num_hurting,
            "num_clearly_helping": values.num_clearly_helping,
            "num_clearly_hurting": values.num_clearly_hurting,
            "share_helping": values.num_helping / data.num_train,
            "share_hurting": values.num_hurting / data.num_train,
            "share_of_top_1_percent": values.top_share(0.01),
            "share_of_top_10_percent": values.top_share(0.1),
            "gini": values.gini,
            "mean": float(values.mean.mean()),
            "min": float(values.mean.min()),
            "max": float(values.mean.max()),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        },
        "most_helpful": [_scored(scored, "value") for scored in data.valuable],
        "most_harmful": [_scored(scored, "value") for scored in data.harmful],
        "suspects": [suspect(data, scored) for scored in data.suspects],
        "highest_loss": [_example(scored.example) for scored in data.highest_loss],
        "suspects_with_highest_loss": suspects_with_highest_loss(data),
        "rollups": {rollup.column: _rollup(rollup) for rollup in data.rollups},
        "class_matrix": None
        if data.class_matrix is None
        else {
            "query_labels": data.class_matrix.query_labels,
            "train_labels": data.class_matrix.train_labels,
            "mean": data.class_matrix.mean.tolist(),
        },
        "agreements": [
            {**dataclasses.asdict(agreement), "reading": reading(agreement)}
            for agreement in data.agreements
        ],
        "num_others": len(data.others),
        "limits": limits(data),
        "queries": [
            {
                **_example(query.example),
                "proponents": [_scored(scored, "score") for scored in query.proponents],
                "opponents": [_scored(scored, "score") for scored in query.opponents],
                "nearest": [_scored(scored, "cosine") for scored in query.nearest],
                "proponents_same_label": query.same_label(query.proponents),
                "opponents_same_label": query.same_label(query.opponents),
                "nearest_same_label": query.same_label(query.nearest),
                "proponents_nearest": query.shared,
            }
            for query in data.queries
        ],
    }
    return _json(found)


def over_mean_self_influence(data: ReportData, scored: Scored) -> float:
    """An example's self-influence as a multiple of the training set's mean."""
    mean = float(np.nanmean(data.self_influence, dtype=np.float64))
    return scored.score / mean if mean > 0 else 0.0


def suspect(data: ReportData, scored: Scored) -> dict[str, Any]:
    return {
        **_scored(scored, "self_influence"),
        "over_mean_self_influence": over_mean_self_influence(data, scored),
    }


def suspects_with_highest_loss(data: ReportData) -> int | None:
    """How many of the highest losses are also suspects; None where losses are unknown."""
    if not data.highest_loss:
        return None
    suspects = {scored.example.index for scored in data.suspects}
    return sum(scored.example.index in suspects for scored in data.highest_loss)


def _example(example: Example) -> dict[str, Any]:
    kept = ("index", "id", "label", "source", "group", "text", "row", "loss", "p")
    return {name: getattr(example, name) for name in kept if getattr(example, name) is not None}


def _scored(scored: Scored, name: str) -> dict[str, Any]:
    return {**_example(scored.example), name: scored.score}


def _rollup(rollup: Rollup) -> dict[str, Any]:
    slices = [dataclasses.asdict(part) for part in rollup.slices]
    return {"slices": slices, "num_omitted": rollup.num_omitted}


def _json(value: Any) -> Any:
    """Plain values only; NaN and infinities, which JSON does not have, become null."""
    if isinstance(value, dict):
        return {str(key): _json(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_json(part) for part in value]
    if isinstance(value, bool | str) or value is None:
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    return float(value) if math.isfinite(value) else None
