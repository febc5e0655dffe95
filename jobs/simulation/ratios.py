"""Indexing by one process and by two, and the same scores by a plain loop and by Dask."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
import zarr

import tda
from tda import scorer
from tda.cluster import Cluster
from tda.scorer import ScoreMatrix

DIM, NUM_QUERIES = 2048, 512
OPTIONS: dict[str, Any] = {"proj_dim": DIM, "chunk_rows": 1024, "progress": False}


@dataclass(frozen=True)
class Ratios:
    """Medians of ``repeats`` interleaved rounds; seconds of one worker, ratios of the others."""

    rows: int
    repeats: int
    seconds: float
    two_processes: float  # one worker's time over two workers'
    plain: float  # one worker's time over the plain loop's
    threads: float  # Dask's time over the plain loop's
    processes: float

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


def task() -> tda.Task:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)]
    return tda.Task(torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(256, 10)))


def data(count: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(count)
    return generator.normal(size=(count, 64)).astype("f4"), generator.integers(0, 10, count)


def measure(folder: Path, num_rows: int, repeats: int) -> Ratios:
    examples = data(num_rows)

    def index(name: str) -> tda.Run:
        shutil.rmtree(folder / name, ignore_errors=True)
        return tda.index(task(), examples, folder / name, **OPTIONS)

    with Cluster(workers=1).started() as one, Cluster(workers=2).started() as two:
        ways: dict[str, Callable[[], object]] = {}
        for name, place in {"here": None, "one": one, "two": two}.items():

            def way(name: str = name, place: Any = place) -> None:
                with nullcontext() if place is None else place.taking_work():
                    index(name)

            ways[name] = way
        spent = _interleaved(ways, repeats)
        run = tda.open(folder / "here", task())
        run.add_queries(data(NUM_QUERIES), "q")
        scored = _interleaved(_scorings(folder, run, one.client), repeats)
    return Ratios(
        num_rows,
        repeats,
        statistics.median(spent["one"]),
        _ratio(spent["one"], spent["two"]),
        _ratio(spent["one"], spent["here"]),
        _ratio(scored["threads"], scored["loop"]),
        _ratio(scored["processes"], scored["loop"]),
    )


def _scorings(folder: Path, run: tda.Run, client: Any) -> dict[str, Callable[[], object]]:
    """The full score matrix into a Zarr array, block by block, three ways."""
    prepared = run.prepare("q", "grad_dot")
    matrix: Any = scorer.scores(prepared)
    shape, chunks = matrix.shape, matrix.chunksize

    def empty(name: str) -> Any:
        shutil.rmtree(folder / name, ignore_errors=True)
        return zarr.create_array(folder / name, shape=shape, chunks=chunks, dtype="f4")

    def loop() -> None:
        array, scores = empty("loop"), ScoreMatrix(prepared)
        for q in range(0, shape[0], chunks[0]):
            for t in range(0, shape[1], chunks[1]):
                where = slice(q, q + chunks[0]), slice(t, t + chunks[1])
                array[where] = scores[where]

    def threads() -> None:
        with dask.config.set(scheduler="threads", num_workers=1):
            matrix.store(empty("threads"), lock=False)

    def processes() -> None:
        with dask.config.set(scheduler=client):
            matrix.store(empty("processes"), lock=False)

    return {"loop": loop, "threads": threads, "processes": processes}


def _interleaved(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, in rounds of all of them, after one round that counts for nothing."""
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(repeats + 1):
        for name, way in ways.items():
            os.sync()
            began = time.perf_counter()
            way()
            if number:
                spent[name].append(time.perf_counter() - began)
    return spent


def _ratio(upper: list[float], lower: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(upper, lower, strict=True))
