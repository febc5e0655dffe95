"""Pieces of work side by side, each in a process of its own.

What a piece leaves open or forbids itself – descriptors, a limit of memory – ends with it.
"""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

LONGEST = 3600  # seconds after which a piece hangs and is killed
LOOK = 60  # seconds between two looks at who does

_spawn = multiprocessing.get_context("spawn")


class Piece(NamedTuple):
    """``name`` is of the kind of work; ``do(*given)`` is called there."""

    name: str
    do: Callable[..., Any]
    given: tuple[Any, ...]


class Done(NamedTuple):
    """What a piece answered, or why it did not."""

    name: str
    answer: Any
    error: str = ""


def side_by_side(pieces: Sequence[Piece], processes: int, until: float) -> Iterator[Done]:
    """The pieces as they are done, in the order given; after ``until`` none is begun."""
    waiting = list(reversed(pieces))
    running: dict[Connection, tuple[str, Any, float]] = {}  # with the process, and since when
    while waiting or running:
        while waiting and len(running) < processes and time.time() < until:
            piece = waiting.pop()
            end, process = _begin(piece)
            running[end] = piece.name, process, time.time()
        if not running:
            return  # the time is up
        answered = wait(list(running), timeout=LOOK)
        for end, (name, process, since) in list(running.items()):
            hangs = time.time() - since > LONGEST
            if end in answered or hangs:
                del running[end]
                if hangs:
                    process.kill()
                yield Done(name, *_answer(end, process))


def _begin(piece: Piece) -> tuple[Connection, Any]:
    here, there = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=_work, args=(there, piece.do, piece.given))
    process.start()
    there.close()  # so that its end is seen
    return here, process


def _work(end: Connection, do: Callable[..., Any], given: tuple[Any, ...]) -> None:
    try:
        end.send((do(*given), ""))
    except BaseException as error:
        end.send((None, f"{type(error).__name__}: {error}"))


def _answer(end: Connection, process: Any) -> tuple[Any, str]:
    with end:
        try:
            answer = end.recv() if end.poll() else None
        except EOFError:
            answer = None
    process.join()
    return answer or (None, f"ended with {process.exitcode}")
