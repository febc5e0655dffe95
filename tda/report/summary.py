"""``summary.json``: every number of the page, exact, for programs and continuous integration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from tda.report.actions import ORDER
from tda.report.charts import value_bins
from tda.report.data import Example, Query, ReportData, Rollup, Scored
from tda.report.trust import RULE
from tda.report.words import headline, limits, reading

FORMAT = 1


def summarise(data: ReportData) -> dict[str, Any]:
    """The report as plain JSON values; undefined numbers are null, pictures are left out."""
    found = {
        "format": FORMAT,
        "headline": headline(data),
        "card": dataclasses.asdict(data.card),
        "num_train": data.num_train,
        "num_queries": data.num_queries,
        "num_checkpoints": len(data.card.checkpoints),
        "num_shown": len(data.queries),
        "selection": data.selection,
        "signs": data.signs,
        "values": _values(data),
        "most_helpful": [_scored(scored, "value") for scored in data.valuable],
        "most_harmful": [_scored(scored, "value") for scored in data.harmful],
        "suspects": [suspect(data, scored) for scored in data.suspects],
        "highest_loss": [_example(scored.example) for scored in data.highest_loss],
        "suspects_with_highest_loss": suspects_with_highest_loss(data),
        "rollups": {rollup.column: _rollup(rollup) for rollup in data.rollups},
        "class_matrix": _class_matrix(data),
        "decisions": _decisions(data),
        "trust": _trust(data),
        "removal": _removal(data),
        "difference": _difference(data),
        "agreements": [
            {**dataclasses.asdict(agreement), "reading": reading(agreement)}
            for agreement in data.agreements
        ],
        "num_others": len(data.others),
        "limits": limits(data),
        "queries": [_query(query) for query in data.queries],
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
    found = {**_example(scored.example), name: scored.score}
    if scored.low is not None:
        found |= {"ci_lo": scored.low, "ci_hi": scored.high}
    if scored.low is not None or scored.reliable is not None:
        found["reliable"] = scored.reliable
    return found


def _rollup(rollup: Rollup) -> dict[str, Any]:
    slices = [dataclasses.asdict(part) for part in rollup.slices]
    return {"slices": slices, "num_omitted": rollup.num_omitted, "gini": rollup.gini}


def _values(data: ReportData) -> dict[str, Any]:
    values = data.values
    edges, counts = value_bins(values.mean)
    return {
        "num_helping": values.num_helping,
        "num_hurting": values.num_hurting,
        "num_clearly_helping": values.num_clearly_helping,
        "num_clearly_hurting": values.num_clearly_hurting,
        "share_helping": values.num_helping / data.num_train,
        "share_hurting": values.num_hurting / data.num_train,
        "share_of_top_1_percent": values.concentration.top_1_percent,
        "share_of_top_10_percent": values.concentration.top_10_percent,
        "gini": values.concentration.gini,
        "num_reliable": values.num_reliable,
        "num_replicates": values.num_replicates,
        "independent": values.independent,
        "covers": values.covers,
        "mean": float(values.mean.mean()),
        "min": float(values.mean.min()),
        "max": float(values.mean.max()),
        "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
    }


def _class_matrix(data: ReportData) -> dict[str, Any] | None:
    found = data.class_matrix
    if found is None:
        return None
    return {
        "query_labels": found.query_labels,
        "train_labels": found.train_labels,
        "mean": found.mean.tolist(),
    }


def _query(query: Query) -> dict[str, Any]:
    return {
        **_example(query.example),
        "proponents": [_scored(scored, "score") for scored in query.proponents],
        "opponents": [_scored(scored, "score") for scored in query.opponents],
        "nearest": [_scored(scored, "cosine") for scored in query.nearest],
        "proponents_same_label": query.same_label(query.proponents),
        "opponents_same_label": query.same_label(query.opponents),
        "nearest_same_label": query.same_label(query.nearest),
        "proponents_nearest": query.shared,
    }


def _decisions(data: ReportData) -> dict[str, Any] | None:
    found = data.decisions
    if found is None:
        return None
    return {
        "num_actions": {action: found.num_actions.get(action, 0) for action in ORDER},
        "num_mislabelled": found.num_mislabelled,
        "share_mislabelled": found.share_mislabelled,
        "num_duplicate_groups": found.num_groups,
        "num_duplicates": found.num_duplicates,
        "share_duplicated": found.share_duplicated,
        "num_conflicting_groups": found.num_conflicting,
        "num_leaked_queries": found.num_leaked_queries,
        "num_leaked_examples": found.num_leaked_examples,
        "share_leaked": found.share_leaked,
        "num_inert": found.num_inert,
        "share_inert": found.share_inert,
        "num_outliers": found.num_outliers,
        "mislabelled": [
            {
                **_scored(each.scored, "value"),
                "suggested": each.suggested,
                "votes_for_label": each.own,
                "votes_for_suggested": each.other,
                "over_mean_self_influence": each.over_mean,
            }
            for each in found.mislabelled
        ],
        "duplicate_groups": [
            {
                "examples": [_example(example) for example in group.examples],
                "size": group.size,
                "similarity": group.similarity,
                "exact": group.exact,
                "same_input": group.same_input,
                "conflicting": group.conflicting,
                "value": group.value,
                "num_more": group.size - len(group.examples),
            }
            for group in found.copies
        ],
        "leaks": [
            {
                "query": _example(leak.query),
                "train": _scored(leak.train, "value"),
                "similarity": leak.similarity,
                "exact": leak.exact,
                "same_input": leak.same_input,
            }
            for leak in found.leaks
        ],
        "inert": [_scored(scored, "value") for scored in found.inert],
    }


def _trust(data: ReportData) -> dict[str, Any] | None:
    found = data.trust
    if found is None:
        return None
    return {
        "verdict": found.verdict,
        "because": found.because,
        "rule": RULE,
        "num_failed": len(found.failed),
        "num_measured": sum(check.passed is not None for check in found.checks),
        "share_reliable": next(c.value for c in found.checks if c.key == "signs"),
        "checks": {check.key: dataclasses.asdict(check) for check in found.checks},
    }


def _removal(data: ReportData) -> dict[str, Any] | None:
    found = data.removal
    if found is None:
        return None
    return {
        "unit": found.unit,
        "in_loss": found.in_loss,
        "curves": [dataclasses.asdict(curve) for curve in found.curves],
        "measured": [
            {**dataclasses.asdict(each), "outcome": each.outcome} for each in found.measured
        ],
        "num_leaked": len(found.leaked),
        "num_unbalanced": len(found.unbalanced),
        "class_balance": [{**dataclasses.asdict(c), "share": c.share} for c in found.balance],
    }


def _difference(data: ReportData) -> dict[str, Any] | None:
    found = data.difference
    if found is None:
        return None
    return {
        "other": found.other,
        "card": [list(each) for each in found.card],
        "numbers": [dataclasses.asdict(each) for each in found.numbers],
        "num_common": found.num_common,
        "num_added": found.num_added,
        "num_gone": found.num_gone,
        "rank_correlation": found.rank_correlation,
        "moved": [
            {
                **_example(each.example),
                "value_before": each.before,
                "value": each.after,
                "rank_before": each.rank_before,
                "rank": each.rank_after,
            }
            for each in found.moved
        ],
        "flags": [dataclasses.asdict(each) for each in found.flags],
    }


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
