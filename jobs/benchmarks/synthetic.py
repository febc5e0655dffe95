"""Stores of random rows, as a run would have written them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

COLUMNS = ("loss", "p", "slope", "curvature", "grad_norm")


def synthetic_store(
    path: Path,
    num_rows: int,
    num_queries: int,
    dim: int,
    num_checkpoints: int = 1,
    dtype: str = "bfloat16",
    tables: tuple[str, ...] = ("train", "queries/q"),
    see: Callable[[str, int, np.ndarray], None] = lambda name, start, rows: None,
) -> Any:
    """A finished store: tables ``queries/q`` and ``train`` of standard normal rows.

    see(table, first row, rows [r, dim] float32) is called with what is then rounded and stored.
    """
    from tda.examples import Examples
    from tda.store import Store
    from tda.store.encoding import row_bytes

    generator = np.random.default_rng(0)
    chunk_rows = max(1, 8 * 2**20 // row_bytes(dim, dtype))
    store = Store.create(
        path,
        {
            "model": {},
            "checkpoints": [{"name": str(c), "digest": str(c)} for c in range(num_checkpoints)],
            "measurement": {"name": "m", "digest": "0", "has_margin": False},
            "projection": {"kind": "count_sketch", "dim": dim, "seed": 0},
            "dtype": dtype, "chunk_rows": min(chunk_rows, 4096),
        },
    )  # fmt: skip
    for name, count in (("train", num_rows), ("queries/q", num_queries)):
        if name not in tables:
            continue
        ids = np.array([f"{name}-{i}" for i in range(count)])
        digests = np.frombuffer(generator.bytes(16 * count), np.uint8).reshape(count, 16)
        table = store.plan(name, Examples(ids, digests), None)
        for checkpoint, chunk in table.places():
            start, stop = table.chunk_range(chunk)
            columns = dict.fromkeys(COLUMNS, np.ones(stop - start, np.float32))
            rows = generator.standard_normal((stop - start, dim), dtype=np.float32)
            table.write(checkpoint, chunk, rows, columns)
            see(name, start, rows)
    return store


def forget(path: Path) -> None:
    """Drop the pages of all files below from the page cache."""
    os.sync()
    for file in path.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
