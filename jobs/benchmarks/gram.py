"""The curvature of a large store against BLAS at the same flops: a Gram matrix, decomposed."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks.synthetic import synthetic_store
from benchmarks.timing import Rows, both

ROWS, DIM, TILE = 60_000, 4096, 2048

console = Console()


def gram(num_rows: int = ROWS, dim: int = DIM) -> Rows:
    """From the files, without a cache; BLAS: XᵀX of tiles in memory, and one eigendecomposition."""
    from tda.recipes import RECIPES
    from tda.scorer import prepare
    from tda.store import Store

    generator = np.random.default_rng(0)
    tiles = [
        generator.standard_normal((min(TILE, num_rows - first), dim), dtype=np.float32)
        for first in range(0, num_rows, TILE)
    ]

    def products() -> np.ndarray:
        total = np.zeros((dim, dim))
        for tile in tiles:
            total += tile.T @ tile
        return total

    total = torch.from_numpy(products())
    bare = both(products)
    factor = both(lambda: torch.linalg.cholesky(total))
    eigen = both(lambda: torch.linalg.eigh(total))
    rows: Rows = [
        (f"{num_rows:,} rows × {dim:,}", "seconds", "processor seconds"),
        ("BLAS: XᵀX, symmetric, float32", f"{bare.wall:.1f}", f"{bare.busy:.1f}"),
        ("LAPACK: Cholesky, float64", f"{factor.wall:.1f}", f"{factor.busy:.1f}"),
        ("LAPACK: eigendecomposition, float64", f"{eigen.wall:.1f}", f"{eigen.busy:.1f}"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        synthetic_store(Path(folder) / "run", num_rows, 4, dim)
        for name in ("trak", "influence"):
            store = Store.open(Path(folder) / "run")
            table = store.table("queries/q")
            found = both(partial(prepare, store, RECIPES[name], table))
            rows.append((f"prepared for {name}", f"{found.wall:.1f}", f"{found.busy:.1f}"))
            console.print(*rows[-1])
    return rows
