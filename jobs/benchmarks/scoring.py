"""Queries against a synthetic store, beside the machine's own roof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Rows, timed

DIM = 2048


def scoring(num_rows: int = 50_000, num_queries: int = 1000, k: int = 100) -> Rows:
    """Exact top k of a synthetic store, against the float32 product alone and against FAISS."""
    import faiss

    from tda.recipes import RECIPES
    from tda.scorer import prepare, top_k
    from tda.store import Store

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Store, Path(folder) / "run", num_rows, num_queries, generator)
        prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
        rows = store.table("train").rows(0, 0, num_rows)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(rows.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        ways = {
            "float32 product alone (roof)": lambda: [
                prepared.queries[0] @ block.T for block in rows.split(2048)
            ],
            f"exact top {k}, streamed from the store": lambda: top_k(prepared, k),
            f"FAISS flat, rows in memory, top {k}": lambda: flat.search(
                prepared.queries[0].numpy(), k
            ),
        }
        seconds = {name: median(timed(way) for _ in range(3)) for name, way in ways.items()}
    roof = next(iter(seconds.values()))
    head = (f"{num_queries:,} queries × {num_rows:,} rows × k={DIM}", "seconds", "of the roof")
    return [head, *((n, f"{s:.2f}", f"{roof / s:.2f}") for n, s in seconds.items())]


def synthetic_store(store_of: Any, path: Path, num_rows: int, num_queries: int, generator: Any):
    from tda.data import Examples

    store = store_of.create(
        path,
        {
            "model": {}, "checkpoints": [{"name": "c", "digest": "0"}],
            "measurement": {"name": "m", "digest": "0", "has_margin": False},
            "projection": {"kind": "count_sketch", "dim": DIM, "seed": 0},
            "dtype": "bfloat16", "chunk_rows": 2048,
        },
    )  # fmt: skip
    for name, count in (("train", num_rows), ("queries/q", num_queries)):
        ids = np.array([f"{name}-{i}" for i in range(count)])
        digests = np.frombuffer(generator.bytes(16 * count), np.uint8).reshape(count, 16)
        table = store.plan(name, Examples(ids, digests), None)
        for chunk in range(table.num_chunks):
            start, stop = table.chunk_range(chunk)
            ones = np.ones(stop - start, np.float32)
            columns = dict.fromkeys(("loss", "p", "slope", "curvature", "grad_norm"), ones)
            rows = generator.standard_normal((stop - start, DIM), dtype=np.float32)
            table.write(0, chunk, rows, columns)
    return store
