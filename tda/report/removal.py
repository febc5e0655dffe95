"""What removing training examples is predicted to do to the queries, and what it did.

    predicted change of the mean loss = Σ_{i left out} value_i        (value: mean over queries)

First order: effects are taken to add up, which they do less the more is removed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tda.errors import DataError
from tda.evaluate.intervals import over
from tda.evaluate.record import GroundTruth
from tda.report.data import Values
from tda.report.decisions import Decisions
from tda.report.findings import Findings
from tda.store.files import read_file

FRACTIONS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)
LOG_ODDS = ("cross_entropy", "binary_cross_entropy")  # f = log(p/(1−p))
PLAN = "plan.json"
UNBALANCED = 2.0  # times the share that all classes lose together
FEW = 3


@dataclass(frozen=True)
class Curve:
    """Removing more and more in one order. predicted: change of the mean loss at each fraction."""

    name: str
    fractions: tuple[float, ...]
    predicted: tuple[float, ...]


@dataclass(frozen=True)
class Measured:
    """One retraining: how much was left out, what was foretold, and what happened.

    ``change`` of the mean over queries, over seeds, with its interval over queries. ``seed_error``:
    standard error of the change over seeds; None with one. ``clean``: the change over the queries
    that are not in the training set themselves; None where all are like that.
    """

    name: str
    count: int  # examples left out
    relabelled: int  # examples trained on with the label proposed
    predicted: float
    change: float
    low: float
    high: float
    num_seeds: int
    seed_error: float | None = None
    clean: float | None = None

    @property
    def outcome(self) -> str:
        """Whether it went as foretold, by both errors together (2 standard errors)."""
        reach = max(self.high - self.change, self.change - self.low)
        if self.seed_error is not None:
            reach = float(np.hypot(reach, 2 * self.seed_error))
        if abs(self.change) <= reach:
            return "within chance"
        return "as foretold" if self.change * self.predicted > 0 else "against"


@dataclass(frozen=True)
class ClassLoss:
    """How much of a class the proposed removals would take."""

    label: str
    count: int
    removed: int
    unbalanced: bool

    @property
    def share(self) -> float:
        return self.removed / self.count


@dataclass(frozen=True)
class Removal:
    """unit: what changes, in words. in_loss: whether predictions are in the unit of the loss.
    leaked: the queries that are in the training set too."""

    curves: tuple[Curve, ...]
    measured: tuple[Measured, ...]
    unit: str
    in_loss: bool
    balance: tuple[ClassLoss, ...]
    leaked: tuple[int, ...] = ()

    @property
    def unbalanced(self) -> tuple[ClassLoss, ...]:
        return tuple(each for each in self.balance if each.unbalanced)


def foretell(
    values: Values,
    decisions: Decisions,
    found: Findings,
    measurement: str,
    has_margin: bool,
    in_loss: bool,
    classes: tuple[Sequence[str], np.ndarray] | None,
) -> Removal:
    """classes: (names, class of each training example), or None."""
    suspects = None if found.suspects is None else found.suspects.score
    value = values.mean
    leaked = () if found.leakage is None else np.unique(found.leakage.pairs.left).tolist()
    measured = measured_in(found.truths, value, measurement, has_margin, leaked)
    is_loss = not has_margin or measurement in LOG_ODDS
    return Removal(
        tuple(_curve(name, order, value) for name, order in orders(value, suspects).items()),
        measured,
        "mean loss of the queries" if is_loss else "minus the mean margin of the queries",
        in_loss and is_loss,
        () if classes is None else class_balance(decisions.removed(), *classes),
        tuple(leaked),
    )


def orders(value: np.ndarray, suspects: np.ndarray | None) -> dict[str, np.ndarray]:
    """Training indices in the order of removal, by its name."""
    found = {
        "most valuable first": np.argsort(-value, kind="stable"),
        "most harmful first": np.argsort(value, kind="stable"),
    }
    if suspects is not None:
        found["likely mislabelled first"] = np.argsort(-suspects, kind="stable")
    return found


def _curve(name: str, order: np.ndarray, value: np.ndarray) -> Curve:
    running = np.concatenate([[0.0], np.cumsum(value[order], dtype=np.float64)])
    counts = [round(fraction * len(order)) for fraction in FRACTIONS]
    return Curve(name, FRACTIONS, tuple(float(running[count]) for count in counts))


def losses(outputs: np.ndarray, measurement: str, has_margin: bool) -> np.ndarray:
    """What a ground truth keeps, as a loss: log(1 + e^{−f}) of log-odds f, else its negative."""
    if has_margin and measurement in LOG_ODDS:
        return np.logaddexp(0, -np.asarray(outputs, np.float64))
    return -np.asarray(outputs, np.float64)


def measured_in(
    truths: tuple[tuple[str, GroundTruth], ...],
    value: np.ndarray,
    measurement: str,
    has_margin: bool,
    leaked: Sequence[int] = (),
) -> tuple[Measured, ...]:
    """Every given subset of these ground truths that was compared with leaving nothing out.

    leaked: queries that are in the training set, whose copies may be among what is left out.
    """
    known = dict(truths)
    return tuple(
        each
        for name, truth in truths
        for each in _measured(name, truth, known, value, measurement, has_margin, leaked)
    )


def _measured(
    name: str,
    truth: GroundTruth,
    truths: Mapping[str, GroundTruth],
    value: np.ndarray,
    measurement: str,
    has_margin: bool,
    leaked: Sequence[int],
) -> list[Measured]:
    """Every subset of a ground truth that was given, against the one that leaves nothing out."""
    if truth.manifest["design"]["kind"] != "given":
        return []
    plan = read_plan(truth)
    base = truths.get(plan.get("baseline", name), truth)
    whole = np.flatnonzero(base.masks.all(1))
    if not len(whole):
        return []
    seeds = min(base.outputs.shape[1], truth.outputs.shape[1])

    def loss_of(outputs: np.ndarray) -> np.ndarray:
        return losses(outputs[:seeds], measurement, has_margin)  # [seed, query]

    clean = np.setdiff1d(np.arange(truth.outputs.shape[2]), leaked)
    before = loss_of(base.outputs[whole[0]])
    names = plan.get("subsets") or [f"{name} {s + 1}" for s in range(len(truth.masks))]
    changed = plan.get("relabelled", [[] for _ in names])
    if len(names) != len(truth.masks) or len(changed) != len(names):
        raise DataError("this plan is of another ground truth", where=truth.path)
    found = []
    for mask, outputs, what, relabelled in zip(
        truth.masks, truth.outputs, names, changed, strict=True
    ):
        left_out = np.flatnonzero(mask == 0)
        if not len(left_out) and not relabelled:
            continue
        each = loss_of(outputs) - before
        change, of_seed = over(each.mean(0)), each.mean(1)
        predicted = value[left_out].sum() + value[np.array(relabelled, np.int64)].sum()
        found.append(
            Measured(
                str(what), len(left_out), len(relabelled), float(predicted),
                change.value, change.low, change.high, seeds,
                float(of_seed.std(ddof=1) / seeds**0.5) if seeds > 1 else None,
                float(each[:, clean].mean()) if len(leaked) and len(clean) else None,
            )
        )  # fmt: skip
    return found


def read_plan(truth: GroundTruth) -> dict:
    """What the subsets of a ground truth were made for; empty where nobody said."""
    file = None if truth.path is None else truth.path / PLAN
    data = None if file is None else read_file(file)
    if data is None:
        return {}
    try:
        plan = json.loads(data)
    except ValueError as error:
        raise DataError("this plan cannot be read", where=file, found=error) from error
    return plan if isinstance(plan, dict) else {}


def class_balance(
    removed: np.ndarray, names: Sequence[str], of: np.ndarray
) -> tuple[ClassLoss, ...]:
    """How removals fall on classes, the hardest hit first.

    Unbalanced: a class loses UNBALANCED times the share that all lose, FEW examples or more.
    """
    count = np.bincount(of, minlength=len(names))
    taken = np.bincount(of[removed], minlength=len(names))
    overall = len(removed) / len(of)
    share = taken / np.maximum(count, 1)
    return tuple(
        ClassLoss(
            names[c],
            int(count[c]),
            int(taken[c]),
            bool(taken[c] >= FEW and share[c] > UNBALANCED * overall),
        )
        for c in np.argsort(-share, kind="stable")
    )
