"""Indexing to disk against plain training.

Featurizing is measured whole – reading the data, hashing it, gradients, projection, columns and the
store – against a plain forward and backward pass over the same batches by the same model; the two
alternate, and the median of the ratios is what counts. The same ratio of processor seconds (which
leave out waiting for the disk) stands beside it: on a machine that others use, it is the steadier.
The floor is what no method can do without, as a ratio likewise: a forward pass and a backward pass
to the activations alone, with no gradient of any weight, in the same precision.
"""

from __future__ import annotations

import copy
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


def floor_seconds(work: Workload, precision: str) -> Seconds:
    """Forward and backward over all the data, to the first layer's outputs."""
    model = copy.deepcopy(work.model).requires_grad_(False)
    first = next(module for module in model.modules() if not any(module.children()))
    first.register_forward_hook(lambda module, given, outputs: outputs.requires_grad_())

    def differentiate() -> None:
        for batch in batches_of(work):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                loss = work.loss(model, batch)
            loss.backward()

    return both(differentiate)


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
        ("indexing to disk", "× plain fp32", "range", "by processor seconds", "floor", "examples/s")
    ]
    for work in workloads():
        num_examples = len(work.data["input_ids"] if isinstance(work.data, dict) else work.data[0])
        plain_seconds(work)
        for name, projection, precision in paths:
            if precision == "bfloat16" and not HAS_BFLOAT16:
                rows.append((f"{work.name}: {name}", "not run", "no bf16 instructions", "", "", ""))
                continue
            index_seconds(work, projection, precision)
            timed = [
                (
                    index_seconds(work, projection, precision),
                    plain_seconds(work),
                    floor_seconds(work, precision),
                )
                for _ in range(repeats)
            ]
            ratios = sorted(whole.wall / plain.wall for whole, plain, _ in timed)
            busy = median(whole.busy / plain.busy for whole, plain, _ in timed)
            floor = median(least.busy / plain.busy for _, plain, least in timed)
            speed = num_examples / median(whole.wall for whole, _, _ in timed)
            rows.append(
                (f"{work.name}: {name}", f"{median(ratios):.2f}",
                 f"{ratios[0]:.2f}–{ratios[-1]:.2f}", f"{busy:.2f}", f"{floor:.2f}",
                 f"{speed:,.0f}")
            )  # fmt: skip
            console.print(*rows[-1])
    return rows
