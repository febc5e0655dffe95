"""Indexing to disk against plain training.

Featurizing is measured whole – reading the data, hashing it, gradients, projection, columns and the
store – against a plain forward and backward pass over the same batches by the same model; the two
alternate, and the median of the ratios is what counts. The same ratio of processor seconds (which
leave out waiting for the disk) stands beside it: on a machine that others use, it is the steadier.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

import torch
from rich.console import Console

import tda
from benchmarks.timing import Rows, Seconds, both
from benchmarks.workloads import Workload, batches_of, workloads
from tda.projection import Projection

DIM = 2048
HAS_BFLOAT16 = torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")

console = Console()


def plain_seconds(work: Workload) -> Seconds:
    """Forward and backward over all the data, gradients of every weight."""

    def train() -> None:
        for batch in batches_of(work):
            work.model.zero_grad()
            work.loss(work.model, batch).backward()

    return both(train)


def index_seconds(work: Workload, projection: Projection, precision: str) -> Seconds:
    """The same data featurized into a store."""
    task = tda.Task(work.model, measurement=work.measurement, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        return both(
            lambda: tda.index(
                task, work.data, Path(folder) / "run", projection=projection,
                batch_size=work.batch_size, progress=False,
            )
        )  # fmt: skip


def indexing(repeats: int) -> Rows:
    paths = [
        ("exact count sketch, fp32", Projection("count_sketch", DIM), "float32"),
        ("exact count sketch, bf16", Projection("count_sketch", DIM), "bfloat16"),
        ("two-stage eigenbasis, bf16", Projection("two_stage", DIM), "bfloat16"),
    ]
    rows: Rows = [
        ("indexing to disk", "× plain fp32", "range", "by processor seconds", "examples/s")
    ]
    for work in workloads():
        num_examples = len(work.data["input_ids"] if isinstance(work.data, dict) else work.data[0])
        plain_seconds(work)
        for name, projection, precision in paths:
            if precision == "bfloat16" and not HAS_BFLOAT16:
                rows.append((f"{work.name}: {name}", "not run", "no bf16 instructions", "", ""))
                continue
            index_seconds(work, projection, precision)
            pairs = [
                (index_seconds(work, projection, precision), plain_seconds(work))
                for _ in range(repeats)
            ]
            ratios = sorted(a.wall / b.wall for a, b in pairs)
            busy = median(a.busy / b.busy for a, b in pairs)
            speed = num_examples / median(a.wall for a, _ in pairs)
            rows.append(
                (f"{work.name}: {name}", f"{median(ratios):.2f}",
                 f"{ratios[0]:.2f}–{ratios[-1]:.2f}", f"{busy:.2f}", f"{speed:,.0f}")
            )  # fmt: skip
            console.print(*rows[-1])
    return rows
