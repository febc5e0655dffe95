"""What is each example worth: values with honest intervals, games, shifts, groups and faults.

>>> found = valuation.values(run, "test", by="label")                          # doctest: +SKIP
>>> found.verdict                                                              # doctest: +SKIP
>>> valuation.roll_up(found, run.store.table("train").column("source"))        # doctest: +SKIP

influence → significance → groups   values from scores; what survives; by source and class
knn_shapley, data_oob               values without gradients
coalitions → semivalues → shift     any players, any utility; why performance changed
nearest → chance → duplicates       what to look at: copies, leaks
nearest → faults                    … and wrong labels, outliers
"""

from __future__ import annotations

from tda.valuation.data_oob import DataOob, data_oob
from tda.valuation.duplicates import (
    DuplicateGroups,
    Leakage,
    duplicates,
    leakage,
    near_duplicates,
    near_identical,
    space_of,
)
from tda.valuation.faults import Suspects, inert, mislabelled, mislabelled_in, outliers
from tda.valuation.groupings import Groupings, read_groups
from tda.valuation.groups import Concentration, GroupValues, concentration, roll_up
from tda.valuation.influence import Values, values
from tda.valuation.knn_shapley import KnnShapley, knn_shapley, knn_shapley_of
from tda.valuation.nearest import Neighbours, Space, neighbours
from tda.valuation.semivalues import Beta, Semivalues, semivalues
from tda.valuation.shift import Mechanism, Shift, density_ratio, explain_shift
from tda.valuation.significance import Significance, significance_of

__all__ = [
    "Values", "values", "Significance", "significance_of",
    "GroupValues", "roll_up", "Concentration", "concentration", "Groupings", "read_groups",
    "KnnShapley", "knn_shapley", "knn_shapley_of", "DataOob", "data_oob",
    "Beta", "Semivalues", "semivalues",
    "Mechanism", "Shift", "explain_shift", "density_ratio",
    "DuplicateGroups", "duplicates", "near_duplicates", "Leakage", "leakage", "near_identical",
    "Neighbours", "Space", "space_of", "neighbours",
    "Suspects", "mislabelled", "mislabelled_in", "outliers", "inert",
]  # fmt: skip
