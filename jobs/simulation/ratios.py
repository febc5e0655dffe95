"""Indexing by one process and by two, and the same scores by a plain loop and by Dask."""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import dask
import numpy as np
import torch
import zarr

import tda
from benchmarks.workloads import GPT, cnn
from tda import scorer
from tda.cluster import Cluster
from tda.scorer import ScoreMatrix

DIM, NUM_QUERIES = 2048, 512


@dataclass(frozen=True)
class Workload:
    """A task and its data: usually ``rows`` examples, ``chunk_rows`` at a time.

    arrays: those of so many examples, by name. in_files: as large data are, each process reads
    those it needs; else they are sent to all.
    """

    what: str
    task: Callable[[], tda.Task]
    arrays: Callable[[int], dict[str, np.ndarray]]
    rows: int
    chunk_rows: int
    in_files: bool

    def index(self, folder: Path, num_rows: int) -> tda.Run:
        run = folder / self.what
        shutil.rmtree(run, ignore_errors=True)
        return tda.index(
            self.task(), self.data(folder, num_rows), run, proj_dim=DIM,
            chunk_rows=self.chunk_rows, progress=False,
        )  # fmt: skip

    def data(self, folder: Path, num_rows: int) -> Any:
        place = folder / f"{self.what}-data"
        if not place.exists():
            place.mkdir()
            for name, values in self.arrays(self.rows).items():
                np.save(place / f"{name}.npy", values)
        files = {file.stem: file for file in sorted(place.glob("*.npy"))}
        if self.in_files:
            return InFiles(files, num_rows)
        return {name: np.load(file)[:num_rows] for name, file in files.items()}


@dataclass(frozen=True)
class InFiles:
    """The first ``count`` of the examples whose values are in these files, by name."""

    files: dict[str, Path]
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: mapped(file)[index] for name, file in self.files.items()}


@cache
def mapped(file: Path) -> np.ndarray:
    return np.load(file, mmap_mode="r")


@dataclass(frozen=True)
class Indexing:
    """Of a workload: seconds of one worker, and medians of ratios."""

    what: str
    rows: int
    seconds: float
    two_processes: float  # one worker's time over two workers'
    plain: float  # one worker's time over the plain loop's

    @property
    def rows_per_second(self) -> float:
        return self.rows / self.seconds


@dataclass(frozen=True)
class Ratios:
    """Medians of ``repeats`` interleaved rounds. threads, processes: Dask's time for the scores of
    the first workload over the plain loop's."""

    repeats: int
    indexing: list[Indexing]
    threads: float
    processes: float


def _mlp() -> tda.Task:
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 256)]
    return tda.Task(torch.nn.Sequential(*layers, torch.nn.ReLU(), torch.nn.Linear(256, 10)))


def _cnn() -> tda.Task:
    torch.manual_seed(0)
    return tda.Task(cnn())


def _gpt() -> tda.Task:
    torch.manual_seed(0)
    return tda.Task(GPT(), measurement="causal_lm")


def _labelled(shape: tuple[int, ...], count: int) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((count, *shape), np.float32)
    return {"input": inputs, "target": generator.integers(0, 10, count)}


def _texts(count: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.random.default_rng(0).integers(0, 1024, (count, 128))}


SMALL = Workload("a small network", _mlp, partial(_labelled, (64,)), 131_072, 1024, in_files=False)
WORKLOADS = (
    SMALL,
    Workload("a CNN", _cnn, partial(_labelled, (3, 32, 32)), 16_384, 512, in_files=True),
    Workload("a GPT of 4 × 256", _gpt, _texts, 3_072, 64, in_files=True),
)


def measure(folder: Path, share: float, repeats: int) -> Ratios:
    """``share`` of the usual rows."""
    with Cluster(workers=1).started() as one, Cluster(workers=2).started() as two:
        places = {"here": None, "one": one, "two": two}
        indexing = [_indexing(folder, work, share, places, repeats) for work in WORKLOADS]
        run = tda.open(folder / SMALL.what, SMALL.task())
        run.add_queries(SMALL.data(folder, NUM_QUERIES), "q")
        scored = _interleaved(_scorings(folder, run, one.client), repeats)
    return Ratios(
        repeats,
        indexing,
        _ratio(scored["threads"], scored["loop"]),
        _ratio(scored["processes"], scored["loop"]),
    )


def _indexing(
    folder: Path, work: Workload, share: float, places: Mapping[str, Any], repeats: int
) -> Indexing:
    rows = round(share * work.rows)

    def way(place: Any) -> Callable[[], object]:
        def index() -> None:
            with nullcontext() if place is None else place.taking_work():
                work.index(folder, rows)

        return index

    spent = _interleaved({name: way(place) for name, place in places.items()}, repeats)
    one = statistics.median(spent["one"])
    two, plain = _ratio(spent["one"], spent["two"]), _ratio(spent["one"], spent["here"])
    return Indexing(work.what, rows, one, two, plain)


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
