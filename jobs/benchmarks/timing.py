"""Seconds of the clock and of processors, peak memory in a process of its own, rows of a table."""

from __future__ import annotations

import multiprocessing
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

Rows = list[tuple[str, ...]]


class Seconds(NamedTuple):
    """Of the clock, and of this process on processors."""

    wall: float
    busy: float


def both(function: Callable[[], Any]) -> Seconds:
    wall, busy = time.perf_counter(), time.process_time()
    function()
    return Seconds(time.perf_counter() - wall, time.process_time() - busy)


def timed(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


class Cost(NamedTuple):
    """Processor seconds, and peak megabytes beyond what the process had at the start."""

    busy: float
    megabytes: float
    result: Any = None


def elsewhere(function: Callable[..., Any], *given: Any) -> Any:
    """``function(*given)`` in a process of its own, with what all of them need already imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.growth", "tda", "zarr", "faiss", "tda.scorer"])
    with ProcessPoolExecutor(1, context) as pool:
        return pool.submit(function, *given).result()


def cost(function: Callable[[], Any]) -> Cost:
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    held, begin = _resident(), time.process_time()
    result = function()
    busy = time.process_time() - begin
    status = Path("/proc/self/status").read_text()
    peak = 1024 * int(status.split("VmHWM:")[1].split()[0])
    return Cost(busy, (peak - held) / 2**20, result)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
