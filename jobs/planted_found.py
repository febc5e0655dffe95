"""What is found of faults that were planted, by kind: what planted.py and planted_text.py share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import tda
from tda import valuation
from tda.evaluate import found_at, mislabel_auc
from tda.report import write_report
from tda.report.counterfactual import retrain

CLEAN = ("studio", "catalogue", "returns")
CROWD, SCRAPE = "crowd", "scrape"
FLIPPED = 0.10  # of the labels of CROWD
INSPECTED = (0.10, 0.20)

console = Console()


def figures(run: tda.Run, made: Any, names: Sequence[str]) -> dict[str, Any]:
    """What is found of each kind of fault, by what the report shows. names: of the classes."""
    suspects = valuation.mislabelled_in(run)
    loss = run.store.table("train").column("loss")[-1]
    honest = made.source != SCRAPE  # nobody's labels there are right or wrong
    rankings = {
        "likely mislabelled": suspects.score,
        "self-influence": run.self_influence("influence"),
        "loss": loss,
    }
    values = valuation.values(run, "test", "influence")
    rankings["least valuable"] = -values.value[0]
    labels = {
        name: {
            "auc": mislabel_auc(by[honest], made.flipped[honest]).value,
            **{f"found_at_{s:.0%}": found_at(by[honest], made.flipped[honest], s).value
               for s in INSPECTED},
        }
        for name, by in rankings.items()
    }  # fmt: skip
    copies, leaks = valuation.duplicates(run), valuation.leakage(run, "test")
    nearest = np.zeros(len(made.labels))
    np.maximum.at(nearest, copies.pairs.left, copies.pairs.similarity)
    np.maximum.at(nearest, copies.pairs.right, copies.pairs.similarity)
    seen = np.zeros(len(made.labels))
    np.maximum.at(seen, leaks.pairs.right, leaks.pairs.similarity)
    groups = valuation.roll_up(values, made.source)
    by_value = np.argsort(groups.mean[0])
    flagged = np.array([suspects.flagged[made.source == g].mean() for g in groups.groups])
    worthless = groups.groups.index(SCRAPE)
    false = suspects.flagged & (made.labels == made.true) & honest
    return {
        "wrong labels": labels,
        "copies": _found(nearest > 0, nearest, made.copied),
        "leaked": _found(seen > 0, seen, made.leaked),
        "worthless source": {
            "rank by mean value": int(np.flatnonzero(by_value == worthless)[0]) + 1,
            "rank by share likely mislabelled": int((flagged > flagged[worthless]).sum()) + 1,
            "of": len(groups.groups),
            "mean value": dict(zip(groups.groups, groups.mean[0].tolist(), strict=True)),
            "share flagged": dict(zip(groups.groups, flagged.tolist(), strict=True)),
        },
        "reliable values": float(values.reliable.mean()),
        "false flags by class": {
            name: {
                "examples": int((made.labels[honest] == c).sum()),
                "flagged though right": int(false[made.labels == c].sum()),
            }
            for c, name in enumerate(names)
        },
    }


def _found(flag: np.ndarray, by: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    return {
        "auc": mislabel_auc(by, planted).value,
        "found": float(flag[planted].mean()),
        "right of those found": float(planted[flag].mean()) if flag.any() else 0.0,
    }


def tell(found: dict[str, Any]) -> None:
    table = Table("wrong labels, by", "AUC", *(f"found in the first {s:.0%}" for s in INSPECTED))
    for name, row in found["wrong labels"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row.values()))
    console.print(table)
    table = Table("kind", "AUC", "found", "right of those found")
    for name in ("copies", "leaked"):
        table.add_row(name, *(f"{value:.3f}" for value in found[name].values()))
    console.print(table)
    rank = found["worthless source"]
    console.print(
        f"the worthless source is number {rank['rank by mean value']} of {rank['of']} from below "
        f"by mean value, number {rank['rank by share likely mislabelled']} by share likely "
        "mislabelled"
    )
    table = Table("class", "examples", "flagged though right")
    for name, row in found["false flags by class"].items():
        table.add_row(name, *map(str, row.values()))
    console.print(table)


def examine(
    run: tda.Run, made: Any, names: Sequence[str], again: Any, queries: Any, seeds: Sequence[int]
) -> None:
    """Print and keep the figures, write the report; again: the training, to do what is proposed."""
    found = figures(run, made, names)
    Path(str(run.path), "planted.json").write_text(json.dumps(found, indent=1) + "\n")
    tell(found)
    page = write_report(
        run,
        query_name="test",
        recipe="influence",
        label_names=names,
        retrain=None
        if again is None
        else lambda data: retrain(run, data, again, queries, seeds=seeds),
    )
    if again is not None:
        tell_retrained(page)
    print(page)


def tell_retrained(page: Path) -> None:
    measured = json.loads(page.with_name("summary.json").read_text())["removal"]["measured"]
    head = ("trained again", "left out", "relabelled", "predicted", "measured", "95 %")
    table = Table(*head, "± over seeds", "without leaked", "came")
    for row in measured:
        interval = f"{row['low']:+.4f} to {row['high']:+.4f}"
        counts = (str(row["count"]), str(row["relabelled"]))
        more = [row["seed_error"], row["clean"]]
        table.add_row(
            row["name"],
            *counts,
            f"{row['predicted']:+.4f}",
            f"{row['change']:+.4f}",
            interval,
            *("–" if number is None else f"{number:+.4f}" for number in more),
            row["outcome"],
        )
    console.print(table)
