"""Seconds of the clock and of processors, and the rows of a table."""

from __future__ import annotations

import time
from collections.abc import Callable
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
