"""What a run will cost, before it is run: counted where it can be, probed where it cannot.

disk     bytes of one example at one checkpoint × checkpoints × examples, read off the probe
memory   the peak of this process while it probed, and one chunk of rows
time     seconds of one example at one checkpoint × checkpoints × examples
"""

from __future__ import annotations

import copy
import math
import resource
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

import tda
from tda.cli import tables
from tda.cli.workload import task_of
from tda.curvature.table import ROWS_PER_DIMENSION
from tda.data import as_dataset
from tda.store.encoding import row_bytes

if TYPE_CHECKING:
    from tda.config import Config
    from tda.run import Run

_PROBE_SECONDS = 1.0
_FIRST_PROBE = 4  # examples
_MOST_PROBED = 4096


@dataclass(frozen=True)
class Plan:
    """The cost of ``tda index``. Bytes are on disk, ``peak_memory`` in bytes, times in seconds."""

    path: str
    num_train: int
    num_queries: int
    num_curvature: int
    num_checkpoints: int
    proj_dim: int
    dtype: str
    bytes_per_example: float
    bytes_on_disk: float
    peak_memory: float
    examples_per_second: float
    seconds: float

    def table(self) -> Table:
        rows = [
            ("run", self.path),
            ("training examples", f"{self.num_train:,}"),
            ("queries", f"{self.num_queries:,}"),
            ("curvature rows, at most", f"{self.num_curvature:,}"),
            ("checkpoints", f"{self.num_checkpoints}"),
            ("a row", f"{self.proj_dim:,} × {self.dtype}"),
            ("an example, all checkpoints", _size(self.bytes_per_example)),
            ("on disk", _size(self.bytes_on_disk)),
            ("peak memory, about", _size(self.peak_memory)),
            ("speed, a checkpoint", f"{self.examples_per_second:,.0f} examples/s"),
            ("time, about", _duration(self.seconds)),
        ]
        return tables.table("plan", ("what", "how much"), rows)


@dataclass(frozen=True)
class _Probe:
    """What indexing ``num_examples`` once cost: seconds, and bytes of the store's arrays."""

    num_examples: int
    seconds: float
    bytes_per_checkpoint: int
    bytes_once: int
    dim: int
    chunk_rows: int


class _First:
    """The first ``count`` examples of a data set."""

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset, self.count = dataset, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index]


def plan(config: Config) -> Plan:
    """Build the workload of ``config``, probe its first checkpoint, and add up what a run costs."""
    task = task_of(config)
    train = as_dataset(config.build_train())
    queries = [as_dataset(config.build_queries(name)) for name in config.workload.queries]
    num_train, num_queries = len(train), sum(map(len, queries))
    num_checkpoints = len(task.checkpoints)
    one = copy.copy(task)
    one.checkpoints = task.checkpoints[:1]
    arguments = {**config.index_arguments(), "gauss_newton": False}
    small, large = _two_probes(one, train, arguments)
    more = large.num_examples - small.num_examples
    seconds = max(large.seconds - small.seconds, 1e-9) / more if more else large.seconds
    row = large.bytes_per_checkpoint / large.num_examples
    once = large.bytes_once / large.num_examples
    stored = row_bytes(large.dim, config.index.dtype)
    has_table = config.index.gauss_newton and not task.measurement.scalar
    num_curvature = ROWS_PER_DIMENSION * large.dim if has_table else 0
    query_row = row + 4 * large.dim - stored  # the rows of queries stay float32

    def on_disk(count: int, row: float) -> float:
        """A chunk of rows that is not full takes the room of a full one."""
        padded = math.ceil(count / large.chunk_rows) * large.chunk_rows
        return padded * row * num_checkpoints + count * once

    return Plan(
        path=str(config.path),
        num_train=num_train,
        num_queries=num_queries,
        num_curvature=num_curvature,
        num_checkpoints=num_checkpoints,
        proj_dim=large.dim,
        dtype=config.index.dtype,
        bytes_per_example=row * num_checkpoints + once,
        bytes_on_disk=on_disk(num_train, row)
        + on_disk(num_curvature, row)
        + sum(on_disk(len(q), query_row) for q in queries),
        peak_memory=_peak_memory() + min(large.chunk_rows, num_train) * (4 * large.dim + stored),
        examples_per_second=1 / seconds,
        seconds=seconds * num_checkpoints * (num_train + num_queries + num_curvature)
        + small.seconds,
    )


def _two_probes(task: Any, train: Any, arguments: dict[str, Any]) -> tuple[_Probe, _Probe]:
    """Two probes of different length: their difference is free of what happens once a run.

    The longer one grows until the difference takes _PROBE_SECONDS, or the data ends.
    """
    most = min(_MOST_PROBED, len(train))
    small = _probe(task, train, min(_FIRST_PROBE, most), arguments)  # this one warms up, too
    small = _probe(task, train, small.num_examples, arguments)
    large = small
    while large.num_examples < most and large.seconds - small.seconds < _PROBE_SECONDS:
        large = _probe(task, train, min(4 * large.num_examples, most), arguments)
    return small, large


def _probe(task: Any, train: Any, count: int, arguments: dict[str, Any]) -> _Probe:
    with tempfile.TemporaryDirectory(prefix="tda-plan-") as folder:
        started = time.perf_counter()
        run = tda.index(
            task, _First(train, count), Path(folder) / "probe", progress=False, **arguments
        )
        seconds = time.perf_counter() - started
        table = run.store.table("train")
        per_checkpoint, once = _array_bytes(run)
        return _Probe(count, seconds, per_checkpoint, once, table.dim, table.chunk_rows)


def _array_bytes(run: Run) -> tuple[int, int]:
    """Bytes of the training table's arrays, those with a checkpoint axis and those without.

    By their shapes and types: the files of so small a store are mostly padding of its chunks.
    """
    import zarr

    per_checkpoint = once = 0
    for _, array in zarr.open_group(run.path / "train", mode="r").arrays():
        if "checkpoint" in (getattr(array.metadata, "dimension_names", None) or ()):
            per_checkpoint += array.nbytes
        else:
            once += array.nbytes
    return per_checkpoint, once


def _peak_memory() -> int:
    """The most this process has held, in bytes (Linux counts in KiB, macOS in bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
