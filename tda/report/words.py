"""The sentences of a report: its headline, what limits it, how an agreement reads."""

from __future__ import annotations

import numpy as np

from tda.report.data import Agreement, ReportData

FITTED = 0.999
FEW_QUERIES = 30


def headline(data: ReportData) -> str:
    """The result in one sentence, counting only what is clear where that can be told."""
    values, n = data.values, f"{data.num_train:,}"
    asked = (
        "this prediction" if data.num_queries == 1 else f"these {data.num_queries:,} predictions"
    )
    helping, hurting = values.num_clearly_helping, values.num_clearly_hurting
    if helping is None or hurting is None:
        return (
            f"Of {n} training examples, {_count(values.num_helping, 'seem')} to help {asked} "
            f"and {_count(values.num_hurting, 'seem')} to hurt."
        )
    if not helping and not hurting:
        return f"None of {n} training examples makes a clear difference to {asked}."
    return (
        f"Of {n} training examples, {_count(helping, 'clearly help')} {asked}, "
        f"{_count(hurting, 'clearly hurt')}, and the rest make no clear difference."
    )


def _count(number: int, verb: str) -> str:
    return f"{number:,} {verb}{'s' * (number == 1)}" if number else f"none {verb}"


def reading(agreement: Agreement) -> str:
    """An agreement in a word, relative to what chance would give."""
    for least, word in ((0.7, "strong"), (0.4, "moderate"), (0.15, "weak"), (-0.15, "none")):
        if agreement.above_chance >= least:
            return word
    return "opposed"


def limits(data: ReportData) -> tuple[str, ...]:
    """When not to trust this page: what always holds, then what holds for this run."""
    found = [
        "Scores are first-order predictions of what removing one example would do. Read the order "
        "and the sign; do not read a score as a measured difference in loss, and do not expect "
        "removing many examples to add up.",
        f"Values are for the query set “{data.card.query_set}” only. An example that hurts these "
        "queries may be what another task needs.",
        "Self-influence marks what the model could only learn by heart: wrong labels, but also "
        "rare and correct examples. Look before removing anything, above all in small classes.",
        f"Gradients were projected ({data.card.projection}). Neighbours in a ranking whose scores "
        "are close may be in either order.",
        "The model was measured as in evaluation: dropout off, normalisation layers frozen.",
    ]
    if data.values.has_intervals:
        found.append(f"The intervals of values cover {data.values.covers}.")
    num_checkpoints = len(data.card.checkpoints)
    if num_checkpoints == 1:
        found.append(
            "There is one checkpoint. Another training run of the same model would rank examples "
            "differently; averaging several checkpoints or seeds is the surest improvement."
        )
    if data.num_queries < FEW_QUERIES:
        found.append(
            f"There are only {data.num_queries:,} queries: the values describe them, and say "
            "little about predictions in general."
        )
    if data.train_p is not None and np.nanmedian(data.train_p) > FITTED:
        found.append(
            f"Half of the training set is fitted with a probability above {FITTED}: most "
            "gradients have all but vanished, and with them the scores. An earlier checkpoint "
            "tells more."
        )
    weak = [a for a in data.others if reading(a) in _WEAK]
    if weak:
        names = ", ".join(dict.fromkeys(a.right for a in weak))
        found.append(
            f"{data.card.recipe} agrees little with: {names}. Where methods disagree, an answer "
            "rests on the choice of method as much as on the data."
        )
    return (*found, *data.notes)


_WEAK = ("weak", "none", "opposed")
