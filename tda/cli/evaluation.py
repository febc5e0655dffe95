"""``tda evaluate``: retrain as a configuration says, and set the recipes side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from tda.cli import tables
from tda.cli.workload import open_config, queries_of
from tda.evaluate import Comparison, Design, compare, ground_truth
from tda.evaluate.comparison import Row
from tda.recipes import RECIPES, get_recipe
from tda.recipes.auto import AUTO

if TYPE_CHECKING:
    from rich.table import Table

    from tda.config import Config, EvaluateSection


def evaluate(
    config: Config,
    recipes: Sequence[str],
    name: str | None = None,
    queries: str | None = None,
) -> Comparison:
    """The ground truth of ``config``, finished now if it is not, and every recipe's LDS on it.

    queries: a query set, in place of that of [evaluate].
    """
    chosen = [*(recipes or RECIPES)]
    for recipe in chosen:  # a spelling mistake is found before anything is trained
        if recipe != AUTO:
            get_recipe(recipe, AUTO)
    train = config.build_retraining()
    section, design = config.evaluate, design_of(config.evaluate)
    opened = open_config(config)
    asked = opened.query_set(queries or section.queries)
    truth = ground_truth(
        opened.run,
        train,
        queries_of(config, asked),
        design,
        name=name,
        workers=section.workers,
    )
    return compare(opened.run, truth, asked, chosen)


def design_of(section: EvaluateSection) -> Design:
    return Design(
        kind=section.kind,
        num_subsets=section.num_subsets,
        fraction=section.fraction,
        seeds=tuple(section.seeds),
    )


def table(compared: Comparison) -> Table:
    """Recipes, best first."""
    subsets, seeds, num_queries = compared.truth.outputs.shape
    kind = compared.truth.manifest["design"]["kind"]
    title = (
        f"linear datamodeling score: {num_queries} queries {compared.queries!r}, {subsets} subsets "
        f"({kind.replace('_', ' ')}) × {seeds} seed{'s' if seeds > 1 else ''}"
    )
    ceiling = "needs two seeds" if compared.ceiling is None else f"{compared.ceiling.value:.3f}"
    columns = ("recipe", "LDS ", "95 % interval", "noise ceiling ", "seconds ")
    return tables.table(title, columns, [_cells(row, ceiling) for row in compared.rows])


def _cells(row: Row, ceiling: str) -> list[str]:
    if row.lds is None:
        return [row.recipe, "–", row.why_not or "", "", ""]
    interval = f"{row.lds.low:.3f} … {row.lds.high:.3f}"
    return [row.recipe, f"{row.lds.value:.3f}", interval, ceiling, f"{row.seconds:.2f}"]
