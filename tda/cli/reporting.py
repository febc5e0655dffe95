"""``tda report``: the page, what changed, and the counterfactual check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tda.errors import ConfigError
from tda.report import write_report
from tda.report.counterfactual import retrain as retrained

if TYPE_CHECKING:
    from tda.cli.workload import Opened
    from tda.report import ReportData


def report(
    opened: Opened,
    queries: str,
    recipe: str | None,
    against: str | None,
    retrain: bool,
    groups: Path | None = None,
) -> Path:
    """Write the report of a query set. Raises ConfigError where it cannot retrain as asked."""
    how = _retraining(opened, queries) if retrain else None
    return write_report(
        opened.run,
        query_name=queries,
        recipe=recipe or opened.defaults.recipe,
        against=against,
        retrain=how,
        groups=groups,
    )


def summary_of(page: Path) -> dict[str, Any]:
    return json.loads(page.with_name("summary.json").read_text(encoding="utf-8"))


def _retraining(opened: Opened, queries: str) -> Any:
    """ReportData → ReportData, by the [evaluate] section of the configuration."""
    config = opened.config
    if config is None or queries not in config.workload.queries:
        raise ConfigError(
            "retraining needs a configuration that builds these queries",
            where="--retrain",
            found=opened.run.path if config is None else f"query set {queries!r}",
            do="name the configuration (.toml) in place of the run, or another query set",
        )
    train, section = config.build_retraining(), config.evaluate
    data = config.build_queries(queries)

    def measure(found: ReportData) -> ReportData:
        return retrained(
            opened.run, found, train, data, seeds=section.seeds, workers=section.workers
        )

    return measure
