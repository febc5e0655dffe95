"""What the scheduler and the client cost a piece of work, with workers that do nothing.

A real `dask scheduler` in a process of its own, the engine's own way to give out work here, and all
workers' connections in a third process. Processor seconds of each, so that what else the machine
does matters little.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import tda.cluster.worker  # noqa: F401  (imported before anything is timed)
from tda.cluster.crew import Crew
from tda.cluster.pool import Workers, _Dispatch

PATIENCE = 120  # seconds for the workers to be there


@dataclass(frozen=True)
class Cost:
    """Of one piece, in milliseconds of a processor; wall: of everything together."""

    workers: int
    pieces: int
    client: float
    scheduler: float
    wall: float


def cost(num_workers: int, num_pieces: int) -> Cost:
    from distributed import Client

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scheduler, address = _scheduler(folder, stack)
        idle = [sys.executable, str(Path(__file__).with_name("idle_workers.py")), address]
        _ending(subprocess.Popen([*idle, str(num_workers)]), stack)
        client = stack.enter_context(Client(address))
        _wait(lambda: len(client.nthreads()) == num_workers)
        _dispatch(client, 50)  # the scheduler imports what the pieces are made of
        other = psutil.Process(scheduler.pid)
        before, began = sum(other.cpu_times()[:2]), time.perf_counter()
        own = time.process_time()
        _dispatch(client, num_pieces)
        spent = (
            time.process_time() - own,
            sum(other.cpu_times()[:2]) - before,
            time.perf_counter() - began,
        )
    return Cost(num_workers, num_pieces, *(1e3 * seconds / num_pieces for seconds in spent))


def _dispatch(client: Any, count: int) -> None:
    token, sizes = f"tda-{uuid.uuid4().hex[:16]}", [1] * count
    _Dispatch(Workers(client), token, range(count), sizes, lambda done: None, Crew("")).finish()


def _scheduler(folder: Path, stack: ExitStack) -> tuple[subprocess.Popen, str]:
    file = folder / "scheduler.json"
    where = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--port", "0"]
    command = [sys.executable, "-m", "dask", "scheduler", "--no-dashboard", *where]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _ending(process, stack)
    _wait(lambda: file.exists() and file.stat().st_size > 0)
    return process, json.loads(file.read_text())["address"]


def _ending(process: subprocess.Popen, stack: ExitStack) -> None:
    stack.callback(process.wait)
    stack.callback(process.kill)


def _wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not until():
        if time.monotonic() > deadline:
            raise TimeoutError("the simulated workers did not come")
        time.sleep(0.1)
