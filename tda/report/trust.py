"""Whether to act on the page: every check there is, its rule, and the verdict they come to."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from tda.report.data import Values
from tda.report.findings import Findings
from tda.report.removal import Measured

LDS = 0.1
STABLE = 0.4
SHARP = 0.5
RIGHT = 0.75
NOT, PLAUSIBLE, LARGE, RELIABLE = (
    "not reliably attributable",
    "plausible, not confirmed by retraining",
    "reliable in the large, not example by example",
    "reliably attributable",
)
RULE = (
    f"A check fails where the LDS against retrained models is below {LDS:g} or its interval "
    "reaches zero; where the values of two checkpoints (or the mean values of two sets of "
    f"trainings) correlate by less than {STABLE:g} on average; where more than {1 - SHARP:.0%} of "
    "the squared values is noise of the projection; where no value keeps its sign; where, of the "
    "removals that were retrained and changed the loss clearly, fewer than "
    f"{RIGHT:.0%} changed it in the direction predicted. If the LDS, the projection or the "
    f"removals fail: {NOT}. If the LDS passes: {RELIABLE}, or {LARGE} where signs or stability "
    f"fail or could not be measured. Without an LDS: {PLAUSIBLE}, if values are stable; else {NOT}."
)


@dataclass(frozen=True)
class Check:
    """One check: what was measured, how, and whether it passes; ``passed`` None: not measured."""

    key: str  # in summary.json
    name: str
    explained: str
    value: float | None
    low: float | None = None
    high: float | None = None
    passed: bool | None = None


@dataclass(frozen=True)
class Trust:
    checks: tuple[Check, ...]
    covers: str  # what the intervals of values cover
    independent: bool
    num_replicates: int

    @property
    def failed(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.passed is False)

    def passed(self, kind: str) -> bool | None:
        """Whether all checks of a kind pass; None where none was made."""
        made = [c.passed for c in self.checks if c.key.startswith(kind) and c.passed is not None]
        return all(made) if made else None

    def with_removals(self, measured: tuple[Measured, ...]) -> Trust:
        """With the check by what retraining without some examples showed."""
        others = [check for check in self.checks if check.key != "removals"]
        return replace(self, checks=(*others, _removals(measured)))

    @property
    def verdict(self) -> str:
        """By RULE."""
        retrained, stable, signs = (self.passed(kind) for kind in ("lds", "stability", "signs"))
        if False in (retrained, self.passed("projection"), self.passed("removals")):
            return NOT
        if retrained:
            return RELIABLE if stable and signs else LARGE
        return PLAUSIBLE if stable else NOT

    @property
    def reads(self) -> str:
        """The verdict as one of the words an agreement reads as."""
        return {NOT: "weak", RELIABLE: "strong"}.get(self.verdict, "moderate")

    @property
    def because(self) -> str:
        """The verdict's reason in one sentence."""
        known = "Retraining confirms the scores. " if self.passed("lds") else ""
        if self.failed:
            return known + "Failed: " + "; ".join(check.name for check in self.failed) + "."
        if known:
            return known + "No check fails."
        if self.passed("stability"):
            return "No check fails, but no random subsets were retrained."
        return "There is one replicate and no retraining: nothing shows how far to trust it."


def judge(values: Values, found: Findings) -> Trust:
    """All checks of a run."""
    checks = [*_retraining(found), _stability(values, found), _projection(found), _signs(values)]
    return Trust(tuple(checks), values.covers, values.independent, values.num_replicates)


def _retraining(found: Findings) -> list[Check]:
    name = "agreement with retrained models (LDS)"
    if not found.checked:
        return [
            Check("lds", name, "Not measured: RUN/evaluate holds no random subsets of these "
                  "queries. `tda evaluate CONFIG` retrains on some.", None)
        ]  # fmt: skip
    return [
        Check(
            f"lds_{each.name}",
            name,
            f"Linear datamodeling score on {each.num_subsets} random subsets × {each.num_seeds} "
            f"seeds ({each.name})"
            + ("" if each.ceiling is None else f"; noise allows {each.ceiling:.2f}"),
            each.lds.value,
            each.lds.low,
            each.lds.high,
            each.lds.value >= LDS and each.lds.low > 0,
        )
        for each in found.checked
    ]


def _stability(values: Values, found: Findings) -> Check:
    what = "trainings" if values.independent else "checkpoints"
    name = f"stability of values across {what}"
    if not found.stability:
        return Check(
            "stability",
            name,
            "Not measured: this recipe gives one value from all checkpoints, or there is one "
            "checkpoint. Checkpoints of several seeds tell most.",
            None,
        )
    each = np.array(found.stability)
    if values.independent:
        count = values.num_replicates
        each = count * each / (1 + (count - 1) * each)
        told = (
            f"Rank correlation that the mean of {count} trainings is expected to have with the "
            "mean of as many others: r of every pair, raised by Spearman and Brown's K·r/(1+(K−1)r)"
        )
    else:
        told = (
            f"Rank correlation of the values of {values.num_replicates} checkpoints, which depend "
            "on each other"
        )
    return Check(
        "stability",
        name,
        f"{told}; mean and range over pairs",
        float(each.mean()),
        float(each.min()),
        float(each.max()),
        bool(each.mean() >= STABLE),
    )


def _removals(measured: tuple[Measured, ...]) -> Check:
    """Relabelled examples are left out: what the right label adds is not predicted."""
    name = "removals that went where predicted"
    clear = [m for m in measured if not m.relabelled and m.low * m.high > 0]
    if not clear:
        return Check(
            "removals",
            name,
            "Not measured: no removal was retrained that changed the loss clearly. "
            "`tda report CONFIG --retrain` does what the page proposes.",
            None,
        )
    right = float(np.mean([m.predicted * m.change > 0 for m in clear]))
    return Check(
        "removals",
        name,
        f"Share of the {len(clear)} retrained removals with a clear change, by their intervals",
        right,
        passed=right >= RIGHT,
    )


def _projection(found: Findings) -> Check:
    name = "share of values that is not noise of the projection"
    if found.projection is None:
        return Check(
            "projection",
            name,
            "Not measured: the dimensions of this projection are not exchangeable.",
            None,
        )
    return Check(
        "projection",
        name,
        "1 − (squared error)/(squared value), over 10,000 examples at most, by parts of the "
        "projection's dimensions, of plain inner products of gradients; a preconditioner can raise "
        "or lower it",
        found.projection,
        passed=found.projection >= SHARP,
    )


def _signs(values: Values) -> Check:
    number = values.num_reliable
    name = "share of values whose sign survives"
    if number is None:
        return Check(
            "signs",
            name,
            "Not measured: it takes two trainings, as checkpoints of one depend on each other.",
            None,
        )
    return Check(
        "signs",
        name,
        f"t-test over {values.num_replicates} trainings at a false discovery rate of 5 %",
        number / len(values.mean),
        passed=number > 0,
    )
