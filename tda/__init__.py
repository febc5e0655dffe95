"""Training-data attribution: which examples made my model do that, and what is each worth?

The pipeline, in the order to read it; index once, then ask with any recipe, as often as you like:

    task → gradients → projection → featurizer → store → curvature → preconditioner → scorer

>>> task = tda.Task(model, checkpoints=[...], measurement="cross_entropy")    # doctest: +SKIP
>>> run = tda.index(task, train_dataset, "stores/my_run")                     # doctest: +SKIP
>>> run.top_k(query_dataset, k=10, recipe="influence").proponents.ids         # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tda.cluster import Cluster
    from tda.curvature.kfac import EkFac, fit_ekfac
    from tda.errors import (
        ClusterError,
        ConfigError,
        DataError,
        GradientError,
        MismatchError,
        RecipeError,
        StoreError,
        TaskError,
        TdaError,
    )
    from tda.gradients.sharded.leading import lead
    from tda.indexing import index
    from tda.measurements import MEASUREMENTS, Measurement
    from tda.projection import Projection
    from tda.recipe import Recipe
    from tda.recipes import RECIPES
    from tda.replay import Training
    from tda.run import Run, open
    from tda.scorer.ranking import Ranking, TopK
    from tda.task import Checkpoint, Task
    from tda.training.recorder import Recorder, recorded
    from tda.training.smoothing import find_noise, smoothed
    from tda.unprojected.streaming import attribute

__version__ = "0.1.0"

# Where each public name lives. They are imported when first used: torch takes seconds to load, and
# `tda --help` must not.
_HOMES = {
    "Task": "tda.task",
    "Checkpoint": "tda.task",
    "Measurement": "tda.measurements",
    "MEASUREMENTS": "tda.measurements",
    "Projection": "tda.projection",
    "index": "tda.indexing",
    "lead": "tda.gradients.sharded.leading",
    "open": "tda.run",
    "Run": "tda.run",
    "attribute": "tda.unprojected.streaming",
    "fit_ekfac": "tda.curvature.kfac",
    "EkFac": "tda.curvature.kfac",
    "Cluster": "tda.cluster",
    "Recipe": "tda.recipe",
    "RECIPES": "tda.recipes",
    "TopK": "tda.scorer.ranking",
    "Ranking": "tda.scorer.ranking",
    "Training": "tda.replay",
    "Recorder": "tda.training.recorder",
    "recorded": "tda.training.recorder",
    "smoothed": "tda.training.smoothing",
    "find_noise": "tda.training.smoothing",
    "TdaError": "tda.errors",
    "TaskError": "tda.errors",
    "DataError": "tda.errors",
    "GradientError": "tda.errors",
    "StoreError": "tda.errors",
    "MismatchError": "tda.errors",
    "RecipeError": "tda.errors",
    "ConfigError": "tda.errors",
    "ClusterError": "tda.errors",
}

__all__ = [
    "Task", "Checkpoint", "Measurement", "MEASUREMENTS", "Projection",
    "index", "open", "Run", "Cluster", "attribute", "fit_ekfac", "EkFac", "lead",
    "Recipe", "RECIPES", "TopK", "Ranking", "Training", "Recorder", "recorded",
    "smoothed", "find_noise",
    "TdaError", "TaskError", "DataError", "GradientError", "StoreError", "MismatchError",
    "RecipeError", "ConfigError", "ClusterError",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in ("evaluate", "integrations", "valuation"):  # packages of their own
        return import_module(f"tda.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'tda' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
