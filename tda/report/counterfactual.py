"""The counterfactual check: do what the report proposes, train again, and see what happens.

Retrained are: the whole training set; without what is proposed for removal; without as many at
random; without the likely mislabelled; without the most valuable and the most harmful. Where the
training function can (a parameter ``relabel``), also with the labels proposed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from tda.errors import ConfigError
from tda.evaluate.design import Design
from tda.evaluate.record import GroundTruth
from tda.evaluate.retrain import ground_truth
from tda.report.data import ReportData
from tda.report.removal import PLAN, measured_in, orders
from tda.store.files import to_json, write_file

SHARES = (0.05, 0.1)
RELABEL = "relabel"
_DRAW = 0


def can_relabel(train: Callable[..., Any]) -> bool:
    """Whether ``train(subset, seed, relabel={training index: label})`` is understood."""
    try:
        return RELABEL in inspect.signature(train).parameters
    except (TypeError, ValueError):
        return False


def subsets_of(data: ReportData) -> dict[str, np.ndarray]:
    """What to leave out, by the name it has in the report; the first leaves nothing out."""
    assert data.decisions is not None and data.ledger is not None
    count, recipe = data.num_train, data.card.recipe
    removed = data.decisions.removed()
    found = {"nothing left out": removed[:0]}
    if len(removed):
        random = np.random.default_rng(_DRAW).choice(count, len(removed), replace=False)
        found["proposed removals"] = removed
        found["as many at random"] = np.sort(random)
    wrong = np.array(sorted(data.decisions.relabelled()), np.int64)
    if len(wrong):
        found["likely mislabelled left out"] = wrong
    for name, order in orders(data.values.mean, None).items():
        for share in SHARES:
            what = f"{name.removesuffix(' first')} {share:.0%} left out ({recipe})"
            found[what] = np.sort(order[: round(share * count)])
    return {name: some for name, some in found.items() if len(some) < count}


def retrain(
    run: Any,
    data: ReportData,
    train: Callable[..., Any],
    queries: Any,
    *,
    seeds: Sequence[int] = (0,),
    workers: int = 1,
    progress: bool = True,
) -> ReportData:
    """Train again as the report proposes; the report with what was measured.

    train, queries: as for `tda.evaluate.ground_truth`; ``train`` may take ``relabel``. What is
    finished is kept in RUN/evaluate: the same call resumes. Raises ConfigError where there is
    nothing to retrain.
    """
    assert data.decisions is not None and data.removal is not None and data.trust is not None
    subsets = subsets_of(data)
    if len(subsets) < 2:
        raise ConfigError("there is nothing to retrain", found=f"{data.num_train} examples")

    def trained(
        name: str, how: Callable[..., Any], left_out: dict[str, np.ndarray], plan: dict[str, Any]
    ) -> tuple[str, GroundTruth]:
        sets = [some.tolist() for some in left_out.values()]
        key = hashlib.blake2b(to_json([sets, plan, list(seeds)]), digest_size=4).hexdigest()
        folder = f"{name}-{key}"
        design = Design.given(sets, seeds)
        truth = ground_truth(
            run, how, queries, design, name=folder, workers=workers, progress=progress
        )
        assert truth.path is not None
        write_file(truth.path / PLAN, to_json({"subsets": list(left_out), **plan}))
        return folder, truth

    found = [trained("report", train, subsets, {})]
    relabelled = data.decisions.relabelled()
    if relabelled and can_relabel(train):
        labels = {index: _plain(label) for index, label in relabelled.items()}
        changed = {"proposed labels": subsets["nothing left out"]}
        if "proposed removals" in subsets:
            changed["all that is proposed"] = subsets["proposed removals"]
        plan = {"baseline": found[0][0], "relabelled": [sorted(labels)] * len(changed)}
        how = functools.partial(train, relabel=labels)
        found.append(trained("report-relabelled", how, changed, plan))
    measurement = run.store.manifest["measurement"]
    measured = measured_in(
        tuple(found),
        data.values.mean,
        measurement["name"],
        bool(measurement["has_margin"]),
        data.removal.leaked,
    )
    return replace(
        data,
        removal=replace(data.removal, measured=measured),
        trust=data.trust.with_removals(measured),
    )


def _plain(label: Any) -> Any:
    """A label as JSON and Python have it."""
    return json.loads(json.dumps(label.item() if isinstance(label, np.generic) else label))
