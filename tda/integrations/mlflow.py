"""MLflow: a report as metrics, tags and artifacts of a run.

with mlflow.start_run():
    log_report("stores/my_run")
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from tda.errors import StoreError
from tda.integrations.partner import partner
from tda.report.page import FILES

mlflow: Any = partner("mlflow", "mlflow")

_AT_ONCE = 100  # tags that a tracking server takes in one request
_LONGEST = 5000  # characters of a tag


def log_report(folder: str | Path, prefix: str = "tda") -> str:
    """Log the report in ``folder`` to the active MLflow run, or to a new one; its id.

    metrics: every number of ``summary.json`` that is not of a single example, by its path there
    (``tda.decisions.num_mislabelled``). tags: run, queries, recipe, verdict, and the hashes of
    data, measurement, model and checkpoints. artifacts: the page and the files beside it.
    Raises StoreError where there is no report.
    """
    folder = Path(folder)
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StoreError(
            "there is no report here",
            where=folder,
            found=error,
            wanted="summary.json and report.html",
            do=f"write it with `tda report {folder}`",
        ) from error
    tags = {_name(f"{prefix}.{key}"): text[:_LONGEST] for key, text in _tags(summary)}
    with nullcontext(mlflow.active_run()) if mlflow.active_run() else mlflow.start_run() as active:
        mlflow.log_metrics({_name(f"{prefix}.{key}"): n for key, n in numbers(summary)})
        for start in range(0, len(tags), _AT_ONCE):
            mlflow.set_tags(dict([*tags.items()][start : start + _AT_ONCE]))
        for name in ("report.html", *FILES):
            if (folder / name).is_file():
                mlflow.log_artifact(str(folder / name), artifact_path=prefix)
        return active.info.run_id


def numbers(summary: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """(path, number) of all that is known; lists are of examples and bins, and left out."""
    for name, value in summary.items():
        here = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from numbers(value, here)
        elif isinstance(value, bool | int | float) and math.isfinite(value):
            yield here, float(value)


def _tags(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    card, trust = summary["card"], summary["trust"] or {}
    for name in ("run", "query_set", "recipe", "measurement", "projection", "damping"):
        yield name, str(card[name])
    yield "headline", str(summary["headline"])
    yield "verdict", str(trust.get("verdict", "not judged"))
    yield from ((f"digest.{name}", str(digest)) for name, digest in card["digests"])
    for each in card["checkpoints"]:
        yield f"digest.checkpoint.{each['name']}", str(each["digest"])


def _name(text: str) -> str:
    """A key as every MLflow store takes it."""
    return re.sub(r"[^\w\-./ ]", "_", text, flags=re.ASCII)[:250]
