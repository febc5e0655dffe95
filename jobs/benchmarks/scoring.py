"""Queries against a synthetic store, beside the machine's own roof."""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.synthetic import forget, synthetic_store
from benchmarks.timing import Rows, both

DIM = 2048


def scoring(num_rows: int = 50_000, num_queries: int = 1000, k: int = 100) -> Rows:
    """Exact top k of a synthetic store, against bare products and against FAISS, interleaved.

    By processor seconds, which other work on the machine disturbs least.
    """
    import dask
    import faiss

    from tda.recipes import RECIPES
    from tda.scorer import plain_top_k, prepare, scores, shortlist
    from tda.store import Store

    with tempfile.TemporaryDirectory() as folder:
        store = synthetic_store(Path(folder) / "run", num_rows, num_queries, DIM)
        prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))
        short = synthetic_store(Path(folder) / "int8", num_rows, num_queries, DIM, 1, "int8")
        of_int8 = prepare(short, RECIPES["grad_dot"], short.table("queries/q"))
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
            f"exact top {k} of int8 rows": lambda: shortlist.top_k(of_int8, k),
            "all scores, streamed to Zarr": lambda: scores(prepared).to_zarr(
                str(Path(folder) / "scores.zarr"), overwrite=True
            ),
            f"FAISS flat, rows in memory, top {k} of one sign": lambda: flat.search(
                queries.numpy(), k
            ),
            f"one query, exact top {k}": lambda: plain_top_k(few, k),
        }
        with dask.config.set(scheduler="synchronous"):
            rounds = [{name: both(way) for name, way in ways.items()} for _ in range(4)][1:]
        forget(Path(folder) / "run")
        run = Store.open(Path(folder) / "run")
        again = prepare(run, RECIPES["grad_dot"], run.table("queries/q"))
        cold = both(lambda: shortlist.top_k(again, k))
    busy = {name: median(each[name].busy for each in rounds) for name in ways}
    wall = {name: median(each[name].wall for each in rounds) for name in ways}
    roof = busy["bfloat16 products alone"]
    head = (
        f"{num_queries:,} queries × {num_rows:,} rows × k={DIM}, both ends",
        "processor seconds", "seconds", "of the bfloat16 roof",
    )  # fmt: skip
    one = f"one query, exact top {k}"
    last = (
        f"exact top {k}, cold from disk", f"{cold.busy:.2f}", f"{cold.wall:.2f}",
        f"{wall['bfloat16 products alone'] / cold.wall:.2f} by the clock",
    )  # fmt: skip
    return [
        head,
        *(
            (n, f"{s:.2f}", f"{wall[n]:.2f}", "" if n == one else f"{roof / s:.2f}")
            for n, s in busy.items()
        ),
        last,
    ]
