"""What changed between two reports: what was asked, the numbers, and which examples moved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tda.errors import StoreError
from tda.evaluate.intervals import spearman
from tda.report.artifacts import flag_lists
from tda.report.data import Example, ReportData
from tda.report.examples import MAX_ID, clean
from tda.store.files import as_place, beside, disk

NUM_MOVED = 12
SUMMARY, VALUES = "summary.json", "values.parquet"
COMPARED = (
    "num_train",
    "num_queries",
    "num_checkpoints",
    "values.mean",
    "values.gini",
    "values.share_helping",
    "values.share_of_top_1_percent",
    "decisions.num_mislabelled",
    "decisions.num_duplicates",
    "decisions.num_leaked_queries",
    "decisions.num_inert",
    "trust.num_failed",
    "trust.share_reliable",
)


@dataclass(frozen=True)
class Number:
    """A number of summary.json, in the other run and in this one."""

    key: str
    before: float | None
    after: float | None


@dataclass(frozen=True, eq=False)
class Moved:
    """A training example of both runs: its place among all common ones, 0 lowest … 1 highest."""

    example: Example
    before: float  # values
    after: float
    rank_before: float
    rank_after: float


@dataclass(frozen=True)
class Flagged:
    """Of the common examples: how many got a flag, lost it, and have it in both runs."""

    flag: str
    gained: int
    lost: int
    kept: int


@dataclass(frozen=True)
class Difference:
    """Against ``other``. rank_correlation: of the values of the common examples."""

    other: str
    card: tuple[tuple[str, str, str], ...]  # field, before, after
    numbers: tuple[Number, ...]
    num_common: int
    num_added: int
    num_gone: int
    rank_correlation: float | None
    moved: tuple[Moved, ...]
    flags: tuple[Flagged, ...]


@dataclass(frozen=True, eq=False)
class Before:
    """The other report, as its files tell."""

    name: str
    summary: Mapping[str, Any]
    ids: np.ndarray
    values: np.ndarray
    flags: list[list[str]]


def read_before(path: str | Path) -> Before:
    """The report in a run's folder. Raises StoreError where it is not there, or damaged."""
    from pyarrow import ArrowInvalid, parquet

    folder = beside(as_place(path))
    for name in (SUMMARY, VALUES):
        if not (folder / name).is_file():
            raise StoreError(
                "there is no report to compare with",
                where=folder / name,
                do=f"make it first: tda report {folder}",
            )
    try:
        with disk(folder / SUMMARY, "read"):
            summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
            table = parquet.read_table(folder / VALUES, columns=["id", "value", "flags"])
    except (ValueError, ArrowInvalid, KeyError) as error:
        raise StoreError(
            "the report to compare with cannot be read", where=folder, found=error,
            do=f"make it again: tda report {folder}",
        ) from error  # fmt: skip
    ids = np.array(table["id"].to_pylist())
    values = table["value"].to_numpy().astype(np.float64)
    return Before(folder.name, summary, ids, values, table["flags"].to_pylist())


def with_difference(data: ReportData, before: Before, summary: Mapping[str, Any]) -> ReportData:
    """The report with what changed since ``before``; ``summary`` is that of ``data``."""
    assert data.ledger is not None
    ids = data.ledger.columns["id"]
    where = {name: place for place, name in enumerate(before.ids.tolist())}
    pairs = [(i, where[name]) for i, name in enumerate(ids.tolist()) if name in where]
    here = np.array([i for i, _ in pairs], np.int64)
    there = np.array([j for _, j in pairs], np.int64)
    now, then = data.values.mean[here], before.values[there]
    rank = spearman(now, then) if len(pairs) > 1 else float("nan")
    ours = flag_lists(data.ledger.flags, data.num_train).to_pylist()
    return replace(
        data,
        difference=Difference(
            clean(before.name, MAX_ID),
            _card(before.summary.get("card", {}), summary["card"]),
            tuple(Number(k, _number(before.summary, k), _number(summary, k)) for k in COMPARED),
            len(pairs),
            len(ids) - len(pairs),
            len(before.ids) - len(pairs),
            rank if np.isfinite(rank) else None,
            _moved(data, here, now, then),
            _flags([ours[i] for i in here], [before.flags[j] for j in there]),
        ),
    )


def _number(summary: Mapping[str, Any], key: str) -> float | None:
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value if isinstance(value, int | float) else None


def _card(before: Any, after: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Fields of the card that differ, as text."""
    then, now = _flat(before), _flat(after)
    return tuple(
        (name, then.get(name, "–"), now.get(name, "–"))
        for name in dict.fromkeys([*now, *then])
        if then.get(name) != now.get(name) and name != "run"
    )


def _flat(card: Any) -> dict[str, str]:
    found = {}
    for name, value in dict(card).items():
        if name == "checkpoints":
            found["checkpoints"] = ", ".join(str(each.get("digest")) for each in value)
        elif isinstance(value, list):
            found |= {f"{name}: {part[0]}": str(part[1]) for part in value}
        else:
            found[name] = str(value)
    return {clean(k, 80): clean(v, 200) for k, v in found.items()}


def _moved(
    data: ReportData, here: np.ndarray, now: np.ndarray, then: np.ndarray
) -> tuple[Moved, ...]:
    """The common examples whose places among all common ones differ most."""
    count = max(1, len(here) - 1)
    after, before = (np.argsort(np.argsort(v, kind="stable")) / count for v in (now, then))
    order = np.argsort(-np.abs(after - before), kind="stable")[:NUM_MOVED]
    assert data.example is not None
    return tuple(
        Moved(
            data.example(int(here[i])),
            float(then[i]), float(now[i]), float(before[i]), float(after[i]),
        )
        for i in order
        if after[i] != before[i]
    )  # fmt: skip


def _flags(ours: list[list[str]], theirs: list[list[str]]) -> tuple[Flagged, ...]:
    names = sorted({name for each in (*ours, *theirs) for name in each})
    found = []
    for name in names:
        a = np.array([name in each for each in ours])
        b = np.array([name in each for each in theirs])
        counts = (int((a & ~b).sum()), int((b & ~a).sum()), int((a & b).sum()))
        found.append(Flagged(name, *counts))
    return tuple(found)
