"""Coarse pieces of one work, done here one after the other or by the workers of a Dask cluster.

A work is anything with ``work(piece, tick) -> result`` that pickles; it goes to each worker once.
What it makes goes to the store: results are small, or None. A piece may be done twice (a worker was
lost, or hangs), so doing it again must change nothing.
"""

from __future__ import annotations

import operator
import queue
import statistics
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from tda.cluster import leaving
from tda.cluster.crew import Crew
from tda.cluster.delivery import pack
from tda.errors import ClusterError, TdaError
from tda.progress import Tick, progress_bar

if TYPE_CHECKING:
    from distributed import Client, Future

Work = Callable[[Any, Tick], Any]

WINDOW = 2  # pieces a worker has: the one at hand and the next
PATIENCE = 4.0  # × the median time of a piece, then it is given to another worker as well …
LEAST_PATIENCE = 10.0  # … but not before so many seconds
_COPIES = 3  # of one piece at most
_FETCH = 30.0  # seconds for the result of a piece to come
_RESTART = 8.0  # seconds for a process that hangs to end before it is killed
_LOOK = 0.5  # seconds between two looks at who is late


def run(
    work: Work,
    pieces: Sequence[Any],
    sizes: Sequence[int] | None = None,
    what: str = "",
    show: bool = False,
    unit: str = "examples",
) -> list[Any]:
    """The results of all pieces, in order; by the open cluster's workers, or here if there is none.

    sizes: of the pieces, for the progress that is shown as ``what`` in ``unit`` if ``show``.
    Raises what the work raises; PreemptedError after SIGTERM, when the pieces at hand are done.
    """
    if not pieces:
        return []
    each = sizes or [1] * len(pieces)
    crew = Crew(unit if sizes else "") if _OPEN else None
    with progress_bar(what, sum(each), show, unit, crew.lines if crew else None) as tick:
        if crew is not None:
            return _OPEN[-1].run(work, pieces, each, tick, crew)
        return [_here(work, piece, tick, sizes is None) for piece in pieces]


def _here(work: Work, piece: Any, tick: Tick, whole: bool) -> Any:
    leaving.check()
    with leaving.a_piece():
        result = work(piece, (lambda count: None) if whole else tick)
    if whole:
        tick(1)
    return result


_OPEN: list[Workers] = []


def is_open() -> bool:
    """Whether work goes to a cluster."""
    return bool(_OPEN)


def shares(total: int, step: int, each: int = 1) -> list[tuple[int, int]]:
    """``[0, total)`` cut at whole steps, ``each`` ranges a worker; one range without a cluster."""
    count = each * len(_OPEN[-1].addresses()) if _OPEN else 1
    size = step * max(1, -(-total // (step * max(1, count))))
    return [(start, min(start + size, total)) for start in range(0, total, size)]


class Workers:
    """The workers a client of a Dask scheduler reaches."""

    def __init__(self, client: Client) -> None:
        self.client = client

    @contextmanager
    def taking_work(self) -> Iterator[None]:
        """All work goes to them inside."""
        _OPEN.append(self)
        try:
            yield
        finally:
            _OPEN.remove(self)

    def addresses(self) -> list[str]:
        return [*self.client.nthreads()]

    def run(
        self, work: Work, pieces: Sequence[Any], sizes: Sequence[int], tick: Tick, crew: Crew
    ) -> list[Any]:
        from tda.cluster.worker import MOST_TOLD, TELL, Delivery

        token = f"tda-{uuid.uuid4().hex[:16]}"
        tell = max(TELL, len(self.addresses()) / MOST_TOLD)
        self.client.register_plugin(Delivery(token, pack(work), tell), name=token)
        try:
            return _Dispatch(self, token, pieces, sizes, tick, crew).finish()
        finally:
            _briefly(self.client.unregister_worker_plugin, token)


class _Dispatch:
    """Gives out the pieces, a few ahead of the workers, and again where they do not come back."""

    def __init__(
        self,
        workers: Workers,
        token: str,
        pieces: Sequence[Any],
        sizes: Sequence[int],
        tick: Tick,
        crew: Crew,
    ) -> None:
        self.workers, self.client, self.token = workers, workers.client, token
        self.pieces, self.sizes, self.tick, self.crew = pieces, sizes, tick, crew
        self.todo = deque(range(len(pieces)))
        self.results: dict[int, Any] = {}
        self.given: dict[Future, tuple[int, float]] = {}
        self.copies = [0] * len(pieces)
        self.begun: dict[int, dict[str, float]] = {}  # piece → worker → when it was last begun
        self.times: list[float] = []
        self.warm: set[str] = set()
        self.ended: queue.SimpleQueue[Future] = queue.SimpleQueue()
        self.known: list[str] = []
        self.looked = 0.0

    def finish(self) -> list[Any]:
        self.client.subscribe_topic(self.token, self._hear)
        try:
            with leaving.a_piece():
                while len(self.results) < len(self.pieces):
                    self._step()
                    if leaving.is_asked():
                        self._leave()
            leaving.check()
            return [self.results[number] for number in range(len(self.pieces))]
        finally:
            with suppress(Exception):  # of a scheduler that is gone
                self.client.unsubscribe_topic(self.token)
                _briefly(self._drop)

    def _hear(self, event: tuple[float, Any]) -> None:
        message = event[1]
        workers = self.begun.setdefault(message["piece"], {})
        if message["rows"] == 0:
            workers[message["worker"]] = time.monotonic()
        self.crew.heard(message["worker"], message["piece"], message["rows"], message["memory"])

    def _step(self) -> None:
        now = time.monotonic()
        if now - self.looked > _LOOK:
            self.looked = now
            self._look(now)
        while self.todo and len(self.given) < WINDOW * len(self.known):
            self._give(self.todo.popleft())
        try:
            future = self.ended.get(timeout=_LOOK)
        except queue.Empty:
            return
        self._take(future)

    def _give(self, number: int, to: list[str] | None = None) -> None:
        from tda.cluster.worker import perform

        self.copies[number] += 1
        future = self.client.submit(
            perform,
            self.token,
            number,
            self.pieces[number],
            key=f"{self.token}-{number}-{self.copies[number]}",
            pure=False,
            workers=to,
        )
        self.given[future] = number, time.monotonic()
        future.add_done_callback(self.ended.put)

    def _take(self, future: Future) -> None:
        number, since = self.given.pop(future, (None, 0.0))
        if number is None or number in self.results:
            return
        if future.status == "finished":
            try:
                self.results[number] = _fetched(future)
            except TimeoutError:  # the worker that has it hangs: done again
                holders = {w for some in self.client.who_has([future]).values() for w in some}
                self._give(number, [w for w in self.known if w not in holders] or None)
                return
            worker, begun = max(
                self.begun.get(number, {"": since}).items(), key=operator.itemgetter(1)
            )
            if worker in self.warm:  # the first one of a worker loads the model
                self.times.append(time.monotonic() - begun)
            self.warm.add(worker)
            self.crew.done(worker, number, self.sizes[number])
            self.tick(self.sizes[number])
            return
        if any(other == number for other, _ in self.given.values()):
            return  # another worker has it
        if future.status == "error":
            raise _explained(future.exception())
        raise ClusterError(
            "the scheduler is gone",
            where=self.client.scheduler.address if self.client.scheduler else None,
            found=f"a piece of work was {future.status}",
            do="start it again, then the same command: what is finished is kept",
        )

    def _look(self, now: float) -> None:
        """Who is there, and who is late."""
        if self.client.status != "running":
            raise ClusterError(
                "the scheduler is gone",
                found=f"the connection is {self.client.status}",
                do="start it again, then the same command: what is finished is kept",
            )
        self.known = self.workers.addresses()
        self.crew.present(self.known)
        self.tick(0)
        if len(self.times) < 3:
            return
        median = statistics.median(self.times)
        late = [n for n, since in self.given.values() if self._is_late(n, since, median, now)]
        holders = self._holders() if late else {}
        for number in late:
            others = [worker for worker in self.known if worker not in holders.get(number, ())]
            if others:
                self._give(number, others)

    def _is_late(self, number: int, since: float, median: float, now: float) -> bool:
        begun = self.begun.get(number, {})
        # One that was never begun waits behind another that is late.
        start = max(begun.values()) if begun else since + WINDOW * median
        allowed = max(PATIENCE * median, LEAST_PATIENCE) * 2 ** (self.copies[number] - 1)
        return now - start > allowed and self.copies[number] < _COPIES

    def _holders(self) -> dict[int, set[str]]:
        """The workers that have each piece, as the scheduler knows: who hangs tells no more."""
        pieces = {future.key: number for future, (number, _) in self.given.items()}
        found: dict[int, set[str]] = {}
        for worker, keys in self.client.processing().items():
            for key in keys:
                if key in pieces:
                    found.setdefault(pieces[key], set()).add(worker)
        return found

    def _leave(self) -> None:
        """After SIGTERM: what was begun may end, what was not is taken back."""
        self.todo.clear()
        waiting = [f for f, (number, _) in self.given.items() if number not in self.begun]
        self.client.cancel(waiting)
        for future in waiting:
            self.given.pop(future)
        if not self.given:
            raise leaving.PreemptedError

    def _drop(self) -> None:
        """Take back what is not needed any more; end the processes that still do it.

        One that hung might wake up later and write what by then has another owner.
        """
        if not self.given:
            return
        is_done = len(self.results) == len(self.pieces)
        late = set().union(*self._holders().values()) if is_done else set()
        self.client.cancel([*self.given], force=True)
        if late:
            self.client.restart_workers([*late], timeout=_RESTART, raise_for_error=False)


def _briefly(tidying: Callable[..., Any], *arguments: Any) -> None:
    """Do it, but neither wait long for a worker that hangs nor mind a scheduler that is gone."""

    def tidy() -> None:
        with suppress(Exception):
            tidying(*arguments)

    thread = threading.Thread(target=tidy, daemon=True)
    thread.start()
    thread.join(2 * _RESTART)


def _fetched(future: Future) -> Any:
    """The result; most pieces have none, and then the worker need not be asked."""
    return None if future.type is type(None) else future.result(timeout=_FETCH)


def _explained(error: BaseException | None) -> BaseException:
    from distributed.scheduler import KilledWorker

    if isinstance(error, KilledWorker):
        return ClusterError(
            "a piece of work ended the process of every worker that took it",
            found=f"{error.allowed_failures + 1} workers were lost at it, the last one at "
            f"{error.last_worker.address}",
            do="look into the workers' logs: they may be short of memory (a smaller batch_size, "
            "fewer workers, more memory each), or a library crashes; what is finished is kept",
        )
    if isinstance(error, TdaError | KeyboardInterrupt):
        return error
    assert error is not None
    error.add_note("this happened in a worker")
    return error
