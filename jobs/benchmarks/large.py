"""One query against a million rows, and a thousand against ten million.

A million int8 rows of 2,048 numbers are written and asked, in one process: warm, cold (the files
dropped from the page cache before), and how much of the exact answer of the float32 rows the int8
rows give. Ten million rows are one chunk of 4,096 linked many times over: what reads and ranks them
does not know. Peak memory is of a process of its own.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks.synthetic import COLUMNS, forget, synthetic_store
from benchmarks.timing import Cost, Rows, both, cost, elsewhere

ROWS, DIM, K = 1_000_000, 2048, 100
MOST, MOST_DIM, MOST_QUERIES = 10_000_000, 512, 1000
DISTINCT = 64  # chunks of them: with one, the best row of a query would be thousands
SAMPLE = 16  # queries of which the recall is measured
REPEATS = 5

console = Console()


def large(num_rows: int = ROWS, most: int = MOST) -> Rows:
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        table = one_query(Path(folder) / "one", num_rows)
        sparse_store(Path(folder) / "many", most)
        found = elsewhere(ask_many, Path(folder) / "many", torch.get_num_threads())
    table.append(
        (f"{MOST_QUERIES:,} queries, {most:,} int8 rows × {MOST_DIM}, exact top {K}: peak memory",
         f"{found.megabytes / 1024:.2f} GB", f"{found.result:.0f}", f"{found.busy:.0f}")
    )  # fmt: skip
    console.print(*table[-1])
    return table


def one_query(path: Path, num_rows: int) -> Rows:
    from tda.recipes import RECIPES
    from tda.scorer import prepare, top_k
    from tda.store import Store

    queries = np.random.default_rng(1).standard_normal((SAMPLE, DIM), dtype=np.float32)
    exact = np.empty((SAMPLE, num_rows), np.float32)

    def see(name: str, start: int, rows: np.ndarray) -> None:
        if name == "train":
            exact[:, start : start + len(rows)] = queries @ rows.T

    store = synthetic_store(path, num_rows, 1, DIM, 1, "int8", see=see)
    prepared = prepare(store, RECIPES["grad_dot"], store.table("queries/q"))

    def ask(store: Any) -> Callable[[], Any]:
        return lambda: top_k(prepare(store, RECIPES["grad_dot"], store.table("queries/q")), K)

    ask(store)()
    warm = [both(ask(store)) for _ in range(REPEATS)]
    cold = []
    for _ in range(2):
        forget(path)
        cold.append(both(lambda: ask(Store.open(path))()))
    weight = prepared.row_weights[0].numpy()
    sample = type(prepared)(
        prepared.recipe, prepared.train, (torch.from_numpy(queries),), prepared.row_weights
    )
    answer, shares = top_k(sample, K), []
    exact *= weight
    for sign, ranking in ((1, answer.proponents), (-1, answer.opponents)):
        wanted = np.argpartition(-sign * exact, K, axis=1)[:, :K]
        pairs = zip(wanted, ranking.indices, strict=True)
        shares += [np.isin(one, other).mean() for one, other in pairs]
    about = f"one query, {num_rows:,} int8 rows × {DIM:,}, exact top {K}"
    return [
        ("many rows", "found", "seconds", "processor seconds"),
        (f"{about}: warm", f"{torch.get_num_threads()} threads", *middle(warm)),
        (f"{about}: cold, the run opened anew", "", *middle(cold)),
        (f"recall@{K} of int8 rows against float32 rows, {SAMPLE} queries, both ends",
         f"{np.mean(shares):.3f}", "", ""),
    ]  # fmt: skip


def middle(found: list[Any]) -> tuple[str, str]:
    return f"{median(f.wall for f in found):.2f}", f"{median(f.busy for f in found):.2f}"


def sparse_store(path: Path, num_rows: int) -> None:
    """A finished store of few chunks, linked over and over: more rows than the disk would hold."""
    from tda.examples import Examples
    from tda.store.marks import Mark, chunk_mark, write_mark

    store = synthetic_store(path, 1, MOST_QUERIES, MOST_DIM, 1, "int8", tables=("queries/q",))
    generator = np.random.default_rng(2)
    digests = np.frombuffer(generator.bytes(16 * num_rows), np.uint8).reshape(num_rows, 16)
    ids = np.arange(num_rows).astype(np.str_)
    table = store.plan("train", Examples(ids, digests), None)
    size = table.chunk_rows
    columns = dict.fromkeys(COLUMNS, np.ones(size, np.float32))
    for chunk in range(min(DISTINCT, table.num_chunks)):
        table.write(0, chunk, generator.standard_normal((size, MOST_DIM), np.float32), columns)
    for chunk in range(DISTINCT, table.num_chunks):
        files, made = {}, chunk % DISTINCT
        first = table.mark(0, made)
        for key, same in zip(table.keys(0, made), table.keys(0, chunk), strict=True):
            (table.folder / same).parent.mkdir(parents=True, exist_ok=True)
            os.link(table.folder / key, table.folder / same)
            files[same] = first.files[key]
        mark = Mark(table.chunk_range(chunk), table._config(0, chunk), files)
        write_mark(table.folder, chunk_mark(0, chunk), mark)


def ask_many(path: Path, threads: int) -> Cost:
    from tda.recipes import RECIPES
    from tda.scorer import prepare, top_k
    from tda.store import Store

    torch.set_num_threads(threads)
    store = Store.open(path)

    def ask() -> None:
        top_k(prepare(store, RECIPES["grad_dot"], store.table("queries/q")), K)

    begin = time.perf_counter()
    return cost(ask)._replace(result=time.perf_counter() - begin)
