"""What to do about which training example, as the run proposes it: ``actions.csv``.

remove    a copy of another training example, a copy of a query, or an example that is reliably
          harmful, which it takes several trainings to tell
relabel   likely mislabelled: ``label`` is the class its neighbours vote for
review    copies under several labels
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from tda.report.data import Values
from tda.report.findings import Findings

ORDER = ("remove", "relabel", "review")  # the first that is proposed for an example holds
HARMFUL_SHARE = 0.01  # of the training set, at most, is proposed for being harmful
HEAD = ("id", "action", "label", "note", "index", "label_now", "value", "ci_lo", "ci_hi")
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of one


@dataclass(frozen=True)
class Action:
    """One proposal. label: the class proposed, for relabel. notes: every reason there is."""

    index: int
    action: str
    label: object | None
    notes: tuple[str, ...]


def propose(
    values: Values, found: Findings, train_ids: np.ndarray, query_ids: np.ndarray
) -> tuple[Action, ...]:
    """One action for each example that anything speaks against, by training index."""
    kinds: dict[int, str] = {}
    notes: dict[int, list[str]] = {}
    labels: dict[int, object] = {}

    def add(index: int, action: str, note: str) -> None:
        known = kinds.get(index, ORDER[-1])
        kinds[index] = min(known, action, key=ORDER.index)
        notes.setdefault(index, []).append(note)

    if found.leakage is not None:
        pairs = found.leakage.pairs
        for query, index in zip(pairs.left.tolist(), pairs.right.tolist(), strict=True):
            add(index, "remove", f"copy of query {query_ids[query]}")
    if found.copies is not None:
        each = zip(
            found.copies.member.tolist(),
            found.copies.representative.tolist(),
            found.copies.conflicting.tolist(),
            strict=True,
        )
        for index, first, conflicting in each:
            if conflicting:
                add(index, "review", f"copies under several labels, the first {train_ids[first]}")
            elif index != first:
                add(index, "remove", f"copy of {train_ids[first]}")
    if found.suspects is not None:
        for index in found.suspects.order.tolist():
            labels[index] = found.suspects.suggested[index]
            other, own = found.suspects.other[index], found.suspects.own[index]
            votes = f"{other:.0%} of its neighbours vote for this label, {own:.0%} for its own"
            add(index, "relabel", f"likely mislabelled: {votes}")
    for index in harmful(values):
        reason = "its training lowers the queries' score, and the sign is reliable"
        add(index, "remove", reason)
    return tuple(
        Action(
            index,
            kinds[index],
            labels.get(index) if kinds[index] == "relabel" else None,
            tuple(notes[index]),
        )
        for index in sorted(kinds)
    )


def harmful(values: Values) -> list[int]:
    """Reliably harmful examples, worst first, HARMFUL_SHARE of the training set at most."""
    if values.sure is None:
        return []
    which = np.flatnonzero(values.sure.reliable & (values.mean < 0))
    most = max(10, round(HARMFUL_SHARE * len(values.mean)))
    return which[np.argsort(values.mean[which], kind="stable")][:most].tolist()


def as_csv(actions: tuple[Action, ...], values: Values, columns: Mapping[str, np.ndarray]) -> str:
    """The file's text. What a spreadsheet would run as a formula has a ' before it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(HEAD)
    now = columns.get("label")
    for action in actions:
        low, high = values.interval(action.index)
        cells = (
            _text(columns["id"][action.index]),
            action.action,
            _text(action.label),
            _text("; ".join(action.notes)),
            action.index,
            _text(None if now is None else now[action.index]),
            repr(float(values.mean[action.index])),
            "" if low is None else repr(low),
            "" if high is None else repr(high),
        )
        writer.writerow(cells)
    return file.getvalue()


def _text(value: object) -> str:
    text = "" if value is None else str(value)
    return "'" + text if text.startswith(_FORMULA) else text
