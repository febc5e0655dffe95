"""How time and memory grow with each size of the work, one at a time, and bytes an example.

    t ∝ sizeᵉ,  e by least squares in log t, log size over the largest three sizes

Each point runs in a process of its own, warmed up by a small run: processor seconds (the best of
two) and peak memory beyond what the process had before. An exponent above the one the work has is
a fault, and is called one. Draws jobs/GROWTH.png.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from benchmarks.synthetic import synthetic_store
from benchmarks.timing import Cost, Rows, cost, elsewhere

PLOT = Path(__file__).parents[1] / "GROWTH.png"
INPUTS, CLASSES = 64, 10
SLACK = 0.15  # of an exponent: what noise and caches do to a line
LARGEST = 3  # sizes that a line is fitted to
SMALL = {"n": 64, "k": 64, "c": 1, "width": 16, "m": 4}
BASES = {
    "indexing": {"n": 4096, "k": 2048, "c": 1, "width": 256},
    "exact top 100": {"n": 16384, "k": 1024, "c": 1, "m": 256},
    "TRAK's curvature and top 100": {"n": 16384, "k": 512, "c": 1, "m": 16},
}
# work, what grows, its sizes, exponents that time and memory are to have at most
LINES: tuple[tuple[str, str, tuple[int, ...], float, float], ...] = (
    ("indexing", "n", (4096, 8192, 16384, 32768), 1, 1),
    ("indexing", "k", (1024, 2048, 4096, 8192, 16384), 1, 1),
    ("indexing", "c", (1, 2, 4, 8), 1, 1),
    ("indexing", "width", (128, 512, 2048, 8192), 1, 1),
    ("exact top 100", "n", (16384, 32768, 65536, 131072), 1, 1),
    ("exact top 100", "k", (512, 1024, 2048, 4096), 1, 1),
    ("exact top 100", "c", (1, 2, 4, 8), 1, 1),
    ("exact top 100", "m", (64, 256, 1024, 4096), 1, 1),
    ("TRAK's curvature and top 100", "n", (16384, 32768, 65536, 131072), 1, 1),
    ("TRAK's curvature and top 100", "k", (256, 512, 1024, 2048), 3, 2),
    ("TRAK's curvature and top 100", "c", (1, 2, 4, 8), 1, 1),
)
NAMES = {
    "n": "examples", "k": "projected numbers", "c": "checkpoints", "m": "queries",
    "width": "parameters",
}  # fmt: skip

console = Console()


@dataclass(frozen=True)
class Point:
    size: int
    seconds: float
    megabytes: float


def growth() -> list[Rows]:
    head = ("growth", "with", "sizes", "processor seconds", "exponent", "peak MB", "exponent")
    table: Rows = [(*head, "at most")]
    lines = []
    for work, axis, sizes, most, most_memory in LINES:
        points = [measured(work, {**BASES[work], axis: size}, axis) for size in sizes]
        lines.append((work, axis, points))
        exponents = [exponent(points, of) for of in ("seconds", "megabytes")]
        told = [
            f"{e:.2f}" + (" TOO MUCH" if e > limit + SLACK else "")
            for e, limit in zip(exponents, (most, most_memory), strict=True)
        ]
        table.append(
            (work, NAMES[axis], spread(points, "size", ",.0f"), spread(points, "seconds", ".2f"),
             told[0], spread(points, "megabytes", ".0f"), told[1], f"{most:g}, {most_memory:g}")
        )  # fmt: skip
        console.print(*table[-1])
    draw(lines)
    return [table, bytes_an_example()]


def spread(points: Sequence[Point], of: str, form: str) -> str:
    return " · ".join(format(getattr(point, of), form) for point in points)


def exponent(points: Sequence[Point], of: str) -> float:
    some = points[-LARGEST:]
    values = [max(getattr(point, of), 1e-3) for point in some]
    return float(np.polyfit(np.log([p.size for p in some]), np.log(values), 1)[0])


def measured(work: str, sizes: dict[str, int], axis: str) -> Point:
    """The best of two, each in a process of its own."""
    found = [elsewhere(alone, work, sizes, torch.get_num_threads()) for _ in range(2)]
    size = num_parameters(sizes["width"]) if axis == "width" else sizes[axis]
    return Point(size, min(c.busy for c in found), min(c.megabytes for c in found))


def alone(work: str, sizes: dict[str, int], threads: int) -> Cost:
    """What a piece of work costs in a process that has done a small one before."""
    torch.set_num_threads(threads)
    prepare = index_once if work == "indexing" else ask_once
    recipe = "trak" if work.startswith("TRAK") else "grad_dot"
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "small", {**sizes, **SMALL}, recipe)()
        return cost(prepare(Path(folder) / "run", sizes, recipe))._replace(result=None)


def num_parameters(width: int) -> int:
    return INPUTS * width + width + width * CLASSES + CLASSES


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(INPUTS, width), nn.ReLU(), nn.Linear(width, CLASSES))


def index_once(path: Path, sizes: dict[str, int], recipe: str) -> Callable[[], Any]:
    import tda

    torch.manual_seed(0)
    model = network(sizes["width"])
    states = [
        tda.Checkpoint(copy.deepcopy(model.state_dict()), name=str(i)) for i in range(sizes["c"])
    ]
    task = tda.Task(model, checkpoints=states, measurement="cross_entropy")
    data = (torch.randn(sizes["n"], INPUTS), torch.randint(0, CLASSES, (sizes["n"],)))
    return lambda: tda.index(task, data, path, proj_dim=sizes["k"], batch_size=256, progress=False)


def ask_once(path: Path, sizes: dict[str, int], recipe: str) -> Callable[[], Any]:
    from tda.recipes import RECIPES
    from tda.scorer import prepare, top_k

    store = synthetic_store(path, sizes["n"], sizes["m"], sizes["k"], sizes["c"])
    return lambda: top_k(prepare(store, RECIPES[recipe], store.table("queries/q")), 100)


def bytes_an_example() -> Rows:
    """Of every projection and dtype, read off the files of a small run."""
    import tda
    from tda.projection import KINDS, Projection
    from tda.store.encoding import DTYPES

    count, dim = 256, 2048
    data = (torch.randn(count, INPUTS), torch.randint(0, CLASSES, (count,)))
    task = tda.Task(network(128), measurement="cross_entropy")
    total = num_parameters(128)
    table: Rows = [
        (f"bytes an example and checkpoint, k={dim:,}, {total:,} parameters", "numbers a row",
         "dtype", "row", "scale and columns", "last hidden layer", "once: id, digest, label")
    ]  # fmt: skip
    for kind in KINDS:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                run = tda.index(
                    task, data, Path(folder) / "run", projection=Projection(kind, dim),
                    dtype=dtype, chunk_rows=count, progress=False,
                )  # fmt: skip
                train = run.store.table("train")
                sizes = {n: spec.num_bytes / count for n, spec in train.specs.items()}
                changes = {n: b for n, b in sizes.items() if train.specs[n].per_checkpoint}
                row, hidden = changes.pop("rows"), changes.pop("embedding", 0)
                once = sum(sizes.values()) - row - hidden - sum(changes.values())
                told = (row, sum(changes.values()), hidden, once)
                table.append((kind, f"{train.dim:,}", dtype, *(f"{b:,.0f}" for b in told)))
    return table


def draw(lines: Sequence[tuple[str, str, Sequence[Point]]]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    works = list(BASES)
    figure = Figure(figsize=(4 * len(works), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    parts = (("seconds", "processor seconds"), ("megabytes", "peak MB beyond the start"))
    grid = figure.subplots(len(parts), len(works), sharex=True)
    for (of, label), across in zip(parts, grid, strict=True):
        for work, axes in zip(works, across, strict=True):
            for name, axis, points in lines:
                if name == work:
                    grown = [point.size / points[0].size for point in points]
                    e = exponent(points, of)
                    values = [getattr(point, of) for point in points]
                    axes.loglog(grown, values, "o-", label=f"{NAMES[axis]}: {e:.2f}")
            axes.set_title(work, fontsize=10)
            axes.set_ylabel(label)
            axes.legend(fontsize=8, title="exponent", title_fontsize=8)
            axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("size, × the smallest")
    figure.savefig(PLOT, dpi=110)
