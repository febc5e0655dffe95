"""pandas: values, top k and scores as frames with ids, one row an observation.

``frame.to_parquet(path)`` writes any of them; the types hold.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tda.integrations.partner import partner
from tda.integrations.sheet import Sheet, sheet
from tda.report.artifacts import answers
from tda.report.examples import Gallery

if TYPE_CHECKING:
    from tda.recipe import Recipe
    from tda.run import Run

pandas: Any = partner("pandas", "pandas")


def values_frame(source: str | Path | Run | Sheet) -> Any:
    """One row a training example, as in ``values.parquet``; ``frame.attrs`` says of what."""
    found = sheet(source).table
    frame = found.replace_schema_metadata(None).to_pandas()
    about = found.schema.metadata or {}
    frame.attrs = {key.decode(): text.decode() for key, text in about.items()}
    return frame


def top_k_frame(run: Run, queries: Any, k: int = 10, recipe: str | Recipe = "influence") -> Any:
    """One row a query, side and rank: ``query, side, rank, train, train_index, score``.

    Only answers that have the sign of their side: proponents > 0, opponents < 0.
    """
    name = queries if isinstance(queries, str) else run.add_queries(queries)
    top = run.top_k(name, k, recipe)
    frame = pandas.DataFrame(answers(Gallery(run.store.table(f"queries/{name}")), top))
    frame.attrs = _about(run, name, recipe)
    return frame


def scores_frame(run: Run, queries: Any, recipe: str | Recipe = "influence") -> Any:
    """One row a query and training example: ``query, train, score``; ids are categories.

    It holds every score, 12 bytes each: for many of both, `tda.Run.scores` stays on disk.
    """
    name = queries if isinstance(queries, str) else run.add_queries(queries)
    asked, scores = run.store.table(f"queries/{name}").column("id"), run.scores(name, recipe)
    codes = np.indices(scores.shape, np.int32).reshape(2, -1)
    ids = [pandas.Categorical.from_codes(code, categories=of)
           for code, of in zip(codes, (asked, run.ids), strict=True)]  # fmt: skip
    columns = {"query": ids[0], "train": ids[1], "score": np.asarray(scores).ravel()}
    frame = pandas.DataFrame(columns)
    frame.attrs = _about(run, name, recipe)
    return frame


def _about(run: Run, queries: str, recipe: str | Recipe) -> dict[str, str]:
    return {"run": str(run.path), "queries": queries, "recipe": run.recipe(recipe).name}
