"""Second moments of gradients: what a model's curvature is made of.

moments.py      H = mean h·x xᵀ of stored rows, as sums that merge
updating.py     the same of a table that grows, loses rows and changes: only these are read
sampling.py     pairs (example, label), drawn by what they add to it
table.py        the table ``curvature`` of a run: rows whose second moment is Gauss–Newton's
gauss_newton.py its products v ↦ Gv with the model at hand, nothing stored
kfac/           factored over the two sides of each parameter: K-FAC, EK-FAC
"""

from tda.curvature.moments import (
    EXACT_FLOPS,
    Diagonal,
    Gram,
    Moment,
    Part,
    Picked,
    WeightedRows,
    diagonal,
    gram,
    row_ranges,
    second_moments,
    squared_norms,
)

__all__ = [
    "EXACT_FLOPS",
    "Diagonal",
    "Gram",
    "Moment",
    "Part",
    "Picked",
    "WeightedRows",
    "diagonal",
    "gram",
    "row_ranges",
    "second_moments",
    "squared_norms",
]
