"""Ground truth by retraining, and how close attribution comes to it.

>>> truth = evaluate.ground_truth(run, train, queries, evaluate.Design())      # doctest: +SKIP
>>> evaluate.lds(run.scores(queries, recipe="influence"), truth)               # doctest: +SKIP
>>> evaluate.noise_ceiling(truth)                                              # doctest: +SKIP

design → retrain → record → metrics (with intervals) → comparison
"""

from __future__ import annotations

from tda.evaluate.comparison import Comparison, Row, compare
from tda.evaluate.design import Design
from tda.evaluate.ensemble import Ensemble
from tda.evaluate.intervals import Estimate
from tda.evaluate.metrics import (
    Stability,
    curve,
    found_at,
    lds,
    lds_of_queries,
    leave_one_out_correlation,
    mislabel_auc,
    noise_ceiling,
    removal_design,
    stability,
)
from tda.evaluate.record import GroundTruth
from tda.evaluate.retrain import ground_truth
from tda.evaluate.tail_patch import tail_patch

__all__ = [
    "Design", "GroundTruth", "ground_truth", "Ensemble",
    "Estimate", "lds", "lds_of_queries", "leave_one_out_correlation", "noise_ceiling",
    "removal_design", "curve", "tail_patch", "mislabel_auc", "found_at", "Stability", "stability",
    "Comparison", "Row", "compare",
]  # fmt: skip
