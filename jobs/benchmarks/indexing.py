"""Indexing to disk against plain training.

Featurizing is measured whole – reading the data, hashing it, gradients, projection, columns and the
store – against a plain forward and backward pass over the same batches by the same model; the two
alternate, and the median of the ratios is what counts. The same ratio of processor seconds (which
leave out waiting for the disk) stands beside it: on a machine that others use, it is the steadier.
The floor is what no method can do without, as a ratio likewise: a forward pass and a backward pass
to the activations alone, with no gradient of any weight, in the same precision.

A quarter of the data is featurized as well: from the two, what each further example costs and what
is done once, whatever their number (the audit of the first batch, a pilot that fits a projection).
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import replace
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


def quarter_of(work: Workload) -> Workload:
    """The same model with the first quarter of the data."""
    if isinstance(work.data, dict):
        return replace(work, data={name: v[: len(v) // 4] for name, v in work.data.items()})
    return replace(work, data=tuple(values[: len(values) // 4] for values in work.data))


def indexing(repeats: int) -> Rows:
    paths = [
        ("exact count sketch, fp32", Projection("count_sketch", DIM), "float32"),
        ("exact count sketch, bf16", Projection("count_sketch", DIM), "bfloat16"),
        ("two-stage eigenbasis, bf16", Projection("two_stage", DIM), "bfloat16"),
    ]
    rows: Rows = [
        ("indexing to disk", "× plain fp32", "range", "by processor seconds",
         "each further example", "done once, s", "floor", "examples/s")
    ]  # fmt: skip
    for work in workloads():
        num_examples = len(work.data["input_ids"] if isinstance(work.data, dict) else work.data[0])
        plain_seconds(work)
        for name, projection, precision in paths:
            if precision == "bfloat16" and not HAS_BFLOAT16:
                why = ("not run", "no bf16 instructions")
                rows.append((f"{work.name}: {name}", *why, *("" for _ in rows[0][3:])))
                continue
            index_seconds(work, projection, precision)
            timed = [
                (
                    index_seconds(work, projection, precision),
                    plain_seconds(work),
                    floor_seconds(work, precision),
                    index_seconds(quarter_of(work), projection, precision),
                )
                for _ in range(repeats)
            ]
            rows.append((f"{work.name}: {name}", *figures(timed, num_examples)))
            console.print(*rows[-1])
    return rows


def figures(timed: Sequence[tuple[Seconds, ...]], num_examples: int) -> tuple[str, ...]:
    """Of repeats (whole, plain, floor, quarter): a row's columns."""
    whole, plain, floor, quarter = (list(each) for each in zip(*timed, strict=True))
    ratios = sorted(a.wall / b.wall for a, b in zip(whole, plain, strict=True))
    busy, least = (
        median(a.busy / b.busy for a, b in zip(each, plain, strict=True)) for each in (whole, floor)
    )
    rest = median(a.busy - b.busy for a, b in zip(whole, quarter, strict=True)) / 0.75
    further = rest / median(each.busy for each in plain)
    once = median(each.busy for each in whole) - rest
    speed = num_examples / median(each.wall for each in whole)
    return (
        f"{median(ratios):.2f}", f"{ratios[0]:.2f}–{ratios[-1]:.2f}", f"{busy:.2f}",
        f"{further:.2f}", f"{once:.1f}", f"{least:.2f}", f"{speed:,.0f}",
    )  # fmt: skip
