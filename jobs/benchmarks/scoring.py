"""Queries against a synthetic store, beside the machine's own roof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.timing import Rows, both

DIM = 2048


def scoring(num_rows: int = 50_000, num_queries: int = 1000, k: int = 100) -> Rows:
    """Exact top k of a synthetic store, against bare products and against FAISS, interleaved.

    By processor seconds, which other work on the machine disturbs least.
    """
    import faiss

    from tda.recipes import RECIPES
    from tda.scorer import plain_top_k, prepare, shortlist
    from tda.store import Store

    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Store, Path(folder) / "run", num_rows, num_queries, generator)
        prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
        rows = store.table("train").rows(0, 0, num_rows)
        queries, few = prepared.queries[0], prepared.select(slice(0, 1))
        halves, coded = queries.bfloat16(), rows.bfloat16().split(1024)
        flat = faiss.IndexFlatIP(DIM)
        flat.add(rows.numpy())
        faiss.omp_set_num_threads(torch.get_num_threads())
        ways = {
            "float32 products alone": lambda: [queries @ block.T for block in rows.split(2048)],
            "bfloat16 products alone": lambda: [halves @ block.T for block in coded],
            f"exact top {k}, float32 products": lambda: plain_top_k(prepared, k),
            f"exact top {k}, bfloat16 products and what they leave in doubt": lambda: (
                shortlist.top_k(prepared, k)
            ),
            f"FAISS flat, rows in memory, top {k} of one sign": lambda: flat.search(
                queries.numpy(), k
            ),
            f"one query, exact top {k}": lambda: plain_top_k(few, k),
        }
        rounds = [{name: both(way) for name, way in ways.items()} for _ in range(4)][1:]
    busy = {name: median(each[name].busy for each in rounds) for name in ways}
    wall = {name: median(each[name].wall for each in rounds) for name in ways}
    roof = busy["bfloat16 products alone"]
    head = (
        f"{num_queries:,} queries × {num_rows:,} rows × k={DIM}, both ends",
        "processor seconds", "seconds", "of the bfloat16 roof",
    )  # fmt: skip
    one = f"one query, exact top {k}"
    return [
        head,
        *(
            (n, f"{s:.2f}", f"{wall[n]:.2f}", "" if n == one else f"{roof / s:.2f}")
            for n, s in busy.items()
        ),
    ]


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
