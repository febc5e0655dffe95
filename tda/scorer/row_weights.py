"""One number a stored row: which multiple of ∇f stands for an example or counts in H."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from tda.errors import StoreError

if TYPE_CHECKING:
    from tda.store import Table


def gradient_weights(table: Table, gradient: str, has_margin: bool) -> Tensor:
    """w [C, rows] float64 with w·∇f the wanted gradient: −ℓ'(f), or 1 for a margin."""
    slope = column(table, "slope")
    return torch.ones_like(slope) if gradient == "margin" and has_margin else -slope


def curvature_weights(table: Table, rows: str, has_margin: bool) -> Tensor:
    """h [C, rows] float64, H = mean h·∇f∇fᵀ: ℓ''(f), or the square of the gradient's weight.

    The rows of "gauss_newton" carry theirs, which makes up for how they were drawn.
    """
    if rows in ("link", "gauss_newton"):
        return column(table, "curvature")
    return gradient_weights(table, rows, has_margin).square()


def column(table: Table, name: str) -> Tensor:
    """A column [C, rows] float64. Raises StoreError naming a row no score can be made from."""
    values = torch.from_numpy(table.column(name).astype(np.float64))
    wrong = ~torch.isfinite(values) | ((values < 0) & (name == "curvature"))
    if wrong.any():
        checkpoint, row = wrong.nonzero()[0].tolist()
        raise StoreError(
            f"column {name!r} holds a value no score can be made from",
            where=f"table {table.name!r}, checkpoint {checkpoint}, example {row}",
            found=values[checkpoint, row].item(),
            wanted="a number ≥ 0" if name == "curvature" else "a finite number",
            do="run `tda verify`; if the store is sound, index this example again",
        )
    return values
