"""What else indexing costs: memory, more projected numbers, a second core, and bfloat16's error.

Peak memory is of processes of their own, beyond model and data, against plain training at the same
batch. Scores are those of the models as they are made, untrained.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import tda
from benchmarks.indexing import DIM, HAS_BFLOAT16, index_seconds, plain_seconds
from benchmarks.timing import Cost, Rows, cost, elsewhere
from benchmarks.workloads import Workload, workloads
from tda.projection import Projection

DIMS = (512, 2048, 16384)
QUERIES = 64  # of the training examples

console = Console()


def costs() -> Rows:
    table: Rows = [("indexing, count sketch", *(work.name for work in workloads()))]
    sketch = Projection("count_sketch", DIM)

    def row(name: str, of: Callable[[Workload], str]) -> None:
        table.append((name, *map(of, workloads())))
        console.print(*table[-1])

    row("peak memory, × plain training", memory)
    row(f"processor seconds at k = {', '.join(map(str, DIMS))}, × that at k={DIM}", flatness)
    row("two threads, × the speed of one", lambda work: two_cores(work, sketch))
    if HAS_BFLOAT16:
        row("correlation of scores, bf16 with fp32 pass: grad_dot, TRAK", fidelity)
    return table


def memory(work: Workload) -> str:
    place = [w.name for w in workloads()].index(work.name)
    plain, index = (elsewhere(peak, place, what).megabytes for what in ("plain", "index"))
    return f"{index / plain:.2f} ({index:.0f} / {plain:.0f} MB)"


def peak(place: int, what: str) -> Cost:
    torch.set_num_threads(1)
    work = workloads()[place]
    sketch = Projection("count_sketch", DIM)
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain_seconds(work),
        "index": lambda: index_seconds(work, sketch, "float32"),
    }
    return cost(ways[what])._replace(result=None)


def flatness(work: Workload) -> str:
    if work.name == "MLP":
        return "not asked for: its pass is shorter than a sketch"
    busy = [index_seconds(work, Projection("count_sketch", k), "float32").busy for k in DIMS]
    return " · ".join(f"{one / busy[DIMS.index(DIM)]:.2f}" for one in busy)


def two_cores(work: Workload, sketch: Projection) -> str:
    if (os.cpu_count() or 1) < 2:
        return "one core"
    before, walls = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        walls.append(min(index_seconds(work, sketch, "float32").wall for _ in range(2)))
    torch.set_num_threads(before)
    return f"{walls[0] / walls[1]:.2f}"


def fidelity(work: Workload) -> str:
    found = [scores(work, precision) for precision in ("float32", "bfloat16")]
    pairs = zip(*found, strict=True)
    return " · ".join(f"{np.corrcoef(a.ravel(), b.ravel())[0, 1]:.4f}" for a, b in pairs)


def scores(work: Workload, precision: str) -> list[np.ndarray]:
    """[query, train] of two recipes."""
    count = 16 * work.batch_size
    if isinstance(work.data, dict):
        data: Any = {name: values[:count] for name, values in work.data.items()}
        queries: Any = {name: values[:QUERIES] for name, values in data.items()}
    else:
        data = tuple(values[:count] for values in work.data)
        queries = tuple(values[:QUERIES] for values in data)
    task = tda.Task(work.model, measurement=work.measurement, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        run = tda.index(
            task, data, Path(folder) / "run", proj_dim=DIM, batch_size=work.batch_size,
            progress=False,
        )  # fmt: skip
        return [np.asarray(run.scores(queries, name)) for name in ("grad_dot", "trak")]
