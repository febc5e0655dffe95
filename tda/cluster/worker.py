"""What runs in a worker: the work is received once, then its pieces come, one at a time."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any, cast

import dask
import torch
from distributed import Worker, WorkerPlugin, get_worker

from tda.cluster.delivery import unpack
from tda.store.files import write_apart

TELL = 0.5  # seconds between two words about a piece …
MOST_TOLD = 200  # … and at most so many words a second of all workers together

_ONE_AT_A_TIME = threading.Lock()  # a worker with several threads has one model all the same


class Settling(WorkerPlugin):
    """One thread a worker unless told otherwise; Ctrl-C is the client's to answer.

    A worker that is terminated is as one that was killed: its piece goes to another.
    """

    name = "tda-settling"

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def setup(self, worker: Worker) -> None:
        self.worker = worker
        torch.set_num_threads(self.threads)
        write_apart()
        if threading.current_thread() is threading.main_thread() and worker.nanny is not None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


class Delivery(WorkerPlugin):
    """Some packed work: sent to each worker once, also to those that come later.

    tell: seconds between two words about a piece.
    """

    def __init__(self, token: str, packed: bytes, tell: float = TELL) -> None:
        self.name, self.tell = token, tell
        self._packed: bytes | None = packed
        self._work: Any = None

    def work(self) -> Any:
        if self._packed is not None:
            self._work = unpack(self._packed)
            self._packed = None
        return self._work

    def teardown(self, worker: Worker) -> None:
        self._work = self._packed = None


def perform(token: str, number: int, piece: Any) -> Any:
    """One piece of the delivered work."""
    worker = get_worker()
    with _ONE_AT_A_TIME:
        delivery = cast(Delivery, worker.plugins[token])
        told = Told(worker, token, number, delivery.tell)
        told(0)
        with dask.config.set(scheduler="synchronous"):
            return delivery.work()(piece, told)


class Told:
    """``tick(examples)`` of a piece on its way to the client: who, which, how many, memory."""

    def __init__(self, worker: Worker, token: str, number: int, tell: float) -> None:
        self.worker, self.token, self.number, self.tell = worker, token, number, tell
        self.count, self.last = 0, 0.0

    def __call__(self, count: int) -> None:
        self.count += count
        now = time.monotonic()
        if now - self.last < self.tell and self.count > count:
            return
        self.last = now
        memory = self.worker.monitor.get_process_memory()
        message = {
            "worker": self.worker.address,
            "piece": self.number,
            "rows": self.count,
            "memory": memory,
        }
        self.worker.log_event(self.token, message)
